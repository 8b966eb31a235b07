"""The benchmarks' gate: the oracle is right, every provider passes it, and a wrong one does not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sampling import sampled

from benchmarks.accuracy import command as accuracy
from benchmarks.accuracy.oracle import accuracy_record, dpo_loss, oracle
from benchmarks.inputs import BETA, IGNORE_INDEX, make_inputs
from benchmarks.loss.runner import why_not
from benchmarks.providers import BASELINES, by_name, ours, registry
from benchmarks.providers.base import missing
from benchmarks.providers.eager import Eager
from benchmarks.scenarios import Scenario
from fastdpo.loss import linear_dpo_loss

CPU = torch.device("cpu")
TRAINED = Scenario("tiny", 64, share=0.5, dtype="fp32", sequences=4)
FROZEN = Scenario("tiny-softcap", 64, share=0.5, dtype="bf16", sequences=4, trains="frozen")
NAMES = [p.name for p in registry()]
COMPILES = {p.name for p in registry() if p.compiles}


@pytest.mark.parametrize("head", ["tiny", "tiny-softcap"])
@pytest.mark.parametrize("trains", ["head", "frozen", "forward"])
def test_the_oracle_is_autograd_in_fp64(head, trains):
    inputs = make_inputs(
        Scenario(head, 24, share=0.5, dtype="fp64", sequences=4, trains=trains), CPU
    )
    z = inputs.hidden @ inputs.weight.t()
    cap = inputs.scenario.shape.softcap
    z = z if cap is None else cap * torch.tanh(z / cap)
    carries = inputs.labels != IGNORE_INDEX
    own = z.gather(-1, inputs.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = torch.where(carries, own - z.logsumexp(-1), 0.0).sum(-1)
    chosen, rejected = (BETA * (sums - inputs.ref_logps)).chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean()
    grads = iter(torch.autograd.grad(loss, inputs.trained) if inputs.trained else ())

    found = oracle(inputs, block=5)
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.logps, sums.detach())
    for tensor, grad in ((inputs.hidden, found.hidden), (inputs.weight, found.weight)):
        if tensor.requires_grad:
            torch.testing.assert_close(grad, next(grads))
        else:
            assert grad is None


def test_inputs_are_a_trained_models_and_masked_as_asked():
    inputs = make_inputs(Scenario("tiny", 400, share=0.25, dtype="fp32", sequences=4), CPU)
    assert inputs.mask.sum().item() == inputs.scenario.loss_tokens == 100
    assert not inputs.mask[:, :75].any()
    token_logps = oracle(inputs).token_logps[inputs.mask]
    assert (token_logps > -1).double().mean() > 0.5  # most labels are likely ...
    assert (token_logps < -5).any()  # ... and some are not
    flat = make_inputs(Scenario("tiny", 40, dtype="fp32", sequences=4, peaked=False), CPU)
    assert abs(oracle(flat).token_logps.mean().item() + math.log(515)) < 0.5


COMPILED = [name for name in NAMES if "compile" in name]


@pytest.mark.parametrize("name", sampled(NAMES, set(NAMES) - set(COMPILED)))
def test_provider_on_a_trained_head(name):
    check(name, TRAINED)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in COMPILES])
def test_provider_on_a_frozen_head_in_bf16_with_a_softcap(name):
    check(name, FROZEN, but_not={"trl-selective"})


def check(name, scenario, but_not=frozenset()):
    """A provider runs and keeps the rule, or says why it does not run."""
    (provider,) = by_name([name])
    excuse = why_not(provider, scenario, CPU)
    if excuse:
        assert excuse[0] in ("absent", "refused")
        assert excuse[1]
        return
    inputs = make_inputs(scenario, CPU)
    got = provider.step(inputs)
    assert (got.hidden is None) == (scenario.trains == "forward")
    assert (got.weight is None) == (scenario.trains != "head")
    eager = BASELINES[provider.computes_reference].step(inputs)
    record = accuracy_record(got, oracle(inputs), eager)
    assert record["passes"] or name in but_not, record["broken"]


def test_who_is_given_the_rows(monkeypatch):
    """The flattened positions that carry loss, for one provider alone."""
    given = {}

    def loss(*arguments, row_index, **options):
        given[name] = row_index
        return linear_dpo_loss(*arguments, row_index=row_index, **options)

    monkeypatch.setattr(ours, "linear_dpo_loss", loss)
    inputs = make_inputs(TRAINED, CPU)
    for name in ("fastdpo", "fastdpo-rows"):
        by_name([name])[0].step(inputs)
    assert given["fastdpo"] is None
    carries = torch.zeros(inputs.labels.numel(), dtype=torch.bool)
    carries[given["fastdpo-rows"]] = True
    assert torch.equal(carries.view_as(inputs.labels), inputs.labels != IGNORE_INDEX)


def test_who_runs_on_this_machine_is_not_nobody():
    here = [p.name for p in registry() if why_not(p, TRAINED, CPU) is None]
    assert {"fastdpo", "fastdpo-w0", "eager", "compiled"} <= set(here)
    assert ("trl-selective" in here) == (missing("trl.trainer.utils") is None)


class Wrong(Eager):
    name = "wrong"

    def __init__(self, break_it):
        self.break_it = break_it

    def step(self, inputs):
        out = super().step(inputs)
        self.break_it(out)
        return out


@pytest.mark.parametrize(
    "break_it",
    [
        lambda out: out.logps.mul_(1.001),
        lambda out: out.loss.add_(0.01),
        lambda out: out.hidden.mul_(1.01),
        lambda out: out.weight[7].zero_(),
        lambda out: out.hidden[0, -1, 0].fill_(math.nan),
    ],
)
def test_a_wrong_provider_is_caught(break_it):
    inputs = make_inputs(TRAINED, CPU)
    record = accuracy_record(
        Wrong(break_it).step(inputs), oracle(inputs), BASELINES[False].step(inputs)
    )
    assert not record["passes"]
    assert record["broken"]


def test_unknown_providers_are_refused():
    with pytest.raises(ValueError, match="fastest"):
        by_name(["fastdpo", "fastest"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_accuracy_rows_and_the_margin_at_initialisation(dtype):
    scenario = Scenario("tiny", 48, dtype=dtype, sequences=2)
    rows = accuracy.measure(scenario, CPU, ["fastdpo", "eager", "liger-1", "cce"])
    by = {r["provider"]: r for r in rows}
    assert by["fastdpo"]["margin_at_initialisation"] == 0.0
    assert by["fastdpo"]["passes"]
    assert by["fastdpo"]["token_nats"]["rms"] <= by["eager"]["token_nats"]["rms"]
    assert by["liger-1"]["token_nats"] is None  # it returns sums alone
    assert by["cce"]["status"] == "absent"


def test_the_loss_is_log_two_without_a_difference():
    logps = torch.tensor([-3.0, -9.0])
    assert dpo_loss(logps, logps).item() == pytest.approx(math.log(2))
