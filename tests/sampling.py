"""Sweeps of which the ordinary run takes a sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], kept: Collection[Any], *, several: bool = False) -> list[Any]:
    """For `parametrize`: all but `kept` are for `pytest -m exhaustive`. `several`: cases are of
    several names.
    """
    cases = list(cases)
    assert all(case in cases for case in kept)
    marks = pytest.mark.exhaustive
    return [c if c in kept else pytest.param(*(c if several else (c,)), marks=marks) for c in cases]
