"""Which backend serves a primitive: argument, environment variable, automatic choice, and
refusals.
"""

from __future__ import annotations

import pytest
import torch

from fastdpo.backends import select
from fastdpo.loss import linear_logps

X = torch.zeros(1)


@pytest.fixture(autouse=True)
def _ask_again(monkeypatch):
    monkeypatch.delenv(select.ENVIRONMENT_VARIABLE, raising=False)
    select._serves.cache_clear()
    yield
    select._serves.cache_clear()


def name_of(*args):
    return select.primitive(*args).__name__.rsplit(".", 1)[-1]


def test_a_cpu_gets_torch():
    for primitive in select.PREFERENCE:
        assert name_of(primitive, X) == "torch"
        assert name_of(primitive, X, "auto") == "torch"


def test_the_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "cuda")
    assert name_of("target_logits", X, "torch") == "torch"
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "torch")
    assert name_of("target_logits", X) == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch):
    with pytest.raises(select.BackendUnavailable, match=r"'cuda' cannot run target_logits: .+"):
        select.primitive("target_logits", X, "cuda")
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(select.BackendUnavailable):
        linear_logps(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64))


def test_a_wrong_environment_variable_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match=r"FASTDPO_BACKEND should be .*cudnn"):
        linear_logps(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64))


def test_a_missing_library_is_a_reason_and_no_crash(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(select, "_module", missing)
    assert all(tuple(row)[1:] == (False, "No module named 'triton'") for row in select.report())


def test_every_backend_keeps_the_contract():
    for row in select.report():
        assert row.available in (True, False)
        assert row.reason
        module = select._module(row.name)
        assert set(select.PREFERENCE) >= module.PRIMITIVES
        for primitive in module.PRIMITIVES:
            assert callable(getattr(module, primitive))
        ok, reason = module.supports(torch.device("cpu"), torch.float32)
        assert ok or reason
    for order in select.PREFERENCE.values():
        assert order[-1] == "torch"
