"""Sweeps of which the ordinary run takes a sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """For `parametrize`: all but `kept` are for `pytest -m exhaustive`."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return [c if c in kept else pytest.param(c, marks=pytest.mark.exhaustive) for c in cases]
