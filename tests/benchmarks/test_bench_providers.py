"""Peers of the benchmarks, by what they return: PyTorch's linear_cross_entropy, Liger-Kernel's
scaled cross-entropy, flash-attention's.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy.oracle import accuracy_record, oracle
from benchmarks.inputs import make_inputs
from benchmarks.loss.runner import why_not
from benchmarks.providers import BASELINES, by_name, registry
from benchmarks.providers.flash_attn import FlashAttention
from benchmarks.scenarios import Scenario

CPU = torch.device("cpu")
CHUNKED = ["torch-lce-chunked", "torch-lce-balanced", "torch-lce-accurate"]
SUMS = ["torch-lce-sum", "torch-lce-twice"]
LCE = ["torch-lce", *CHUNKED, *SUMS]
NEEDS_LCE = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="needs PyTorch 2.13 or later"
)
SCENARIO = Scenario("tiny", 64, share=0.5, dtype="fp32", sequences=4)


def closeness(name, scenario):
    """A provider's step, its inputs, and eager's; on a CPU, or where the provider says it runs."""
    (provider,) = by_name([name])
    inputs = make_inputs(scenario, CPU)
    return provider.step(inputs), BASELINES[provider.computes_reference].step(inputs), inputs


@NEEDS_LCE
@pytest.mark.parametrize("reference", ["given", "forward"])
@pytest.mark.parametrize("trains", ["head", "frozen", "forward"])
@pytest.mark.parametrize("name", LCE)
def test_linear_cross_entropy_is_eager_in_fp64(name, trains, reference):
    scenario = replace(SCENARIO, dtype="fp64", trains=trains, reference=reference)
    got, eager, inputs = closeness(name, scenario)
    for key in ("loss", "logps", "hidden", "weight"):
        mine, theirs = getattr(got, key), getattr(eager, key)
        assert (mine is None) == (theirs is None), key
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    if name not in SUMS:
        torch.testing.assert_close(got.token_logps, eager.token_logps, rtol=1e-10, atol=1e-12)
        assert not got.token_logps[~inputs.mask].any()


@pytest.mark.parametrize("trains", ["head", "frozen", "forward"])
@pytest.mark.parametrize("name", [p.name for p in registry() if not p.compiles])
def test_whoever_runs_keeps_the_rule_with_its_own_reference(name, trains):
    scenario = replace(SCENARIO, trains=trains, reference="forward")
    (provider,) = by_name([name])
    if why_not(provider, scenario, CPU):
        return
    got, eager, inputs = closeness(name, scenario)
    # The oracle is given the reference that eager computed: all of these do so themselves.
    inputs.ref_logps = (
        BASELINES[True]
        .token_logps(inputs.ref_hidden, inputs.ref_weight, inputs.labels, None)
        .sum(-1)
    )
    record = accuracy_record(got, oracle(inputs), eager)
    assert record["passes"], record["broken"]


@NEEDS_LCE
@pytest.mark.parametrize("name", ["torch-lce", "torch-lce-chunked", "torch-lce-balanced", *SUMS])
def test_in_16_bits_linear_cross_entropy_returns_16_bits_and_breaks_the_rule(name):
    """The next of such numbers are 2 nats apart in a sequence's 400: what no user would see."""
    scenario = replace(SCENARIO, tokens=2048, share=1.0, dtype="bf16")
    got, eager, inputs = closeness(name, scenario)
    values = got.logps if name in SUMS else got.token_logps
    assert values.dtype == torch.float32
    assert torch.equal(values, values.bfloat16().float())
    record = accuracy_record(got, oracle(inputs), eager)
    assert any("logps" in text for text in record["broken"])


@NEEDS_LCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_policies_that_are_left_out_on_a_cpu_are_others(dtype):
    """compact: its own choice in fp32, balanced in 16 bits; accurate: balanced, and its choice."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 48, generator=generator).to(dtype)
    weight = torch.randn(515, 48, generator=generator).to(dtype)
    labels = torch.randint(515, (37,), generator=generator)

    def gradients(policy):
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy, acc_dtype=torch.float32)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        nll = F.linear_cross_entropy(*leaves, labels, reduction="none", options=options)
        return nll, *torch.autograd.grad(nll.float().square().sum(), leaves)

    wide = dtype == torch.float32
    for one, other in (
        ("compact", "auto" if wide else "balanced"),
        ("accurate", "balanced" if wide else "auto"),
    ):
        for a, b in zip(gradients(one), gradients(other), strict=True):
            assert torch.equal(a, b), (one, other)
    (accurate,) = by_name(["torch-lce-accurate"])
    assert "torch-lce-balanced" in accurate.absent(CPU)


def test_an_older_pytorch_is_said_to_have_none(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    for provider in by_name(["torch-lce", "torch-lce-chunked", *SUMS]):
        status, reason = why_not(provider, SCENARIO, CPU)
        assert status == "absent"
        assert "2.13" in reason


def test_who_has_no_softcap_refuses_it():
    for provider in by_name([*LCE, "liger-scaled", "liger-sm90"]):
        assert "softcap" in provider.refuses(replace(SCENARIO, head="tiny-softcap"))
        assert provider.refuses(replace(SCENARIO, dtype="bf16")) is None


def test_who_needs_a_gpu_says_so():
    for name, needs in (("liger-sm90", "compute capability 9.0"), ("flash-attn", "CUDA GPU")):
        (provider,) = by_name([name])
        assert needs in provider.absent(CPU)
    (hopper,) = by_name(["liger-sm90"])
    assert "bf16" in hopper.refuses(SCENARIO)


def test_on_hopper_ligers_kernels_stand_for_its_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    scaled, hopper = by_name(["liger-scaled", "liger-sm90"])
    gpu = torch.device("cuda", 0)
    assert "liger-sm90" in scaled.absent(gpu)
    module = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    monkeypatch.setitem(sys.modules, module, None)
    assert "not installed" in hopper.absent(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0" in hopper.absent(gpu)


class StandIn(torch.autograd.Function):
    """flash-attention's cross_entropy_loss with inplace_backward, by what its source says."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return losses, torch.zeros_like(losses)

    @staticmethod
    def backward(ctx, grad, _):
        logits, labels = ctx.saved_tensors
        gradient = logits.float().softmax(-1)
        gradient[torch.arange(len(labels)), labels] -= 1
        with torch.no_grad():
            return logits.data.copy_(gradient * grad.unsqueeze(1)), None


@pytest.mark.parametrize("head", ["tiny", "tiny-softcap"])
def test_flash_attention_is_called_as_its_source_says(head, monkeypatch):
    """Not its kernel, which needs a GPU: a stand-in that overwrites the logits as it does."""

    def cross_entropy_loss(logits, labels, *, inplace_backward):
        assert inplace_backward
        assert logits.dim() == 2
        assert labels.shape == logits.shape[:1]
        return StandIn.apply(logits, labels)

    module = types.ModuleType("flash_attn.ops.triton.cross_entropy")
    module.cross_entropy_loss = cross_entropy_loss
    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inputs = make_inputs(replace(SCENARIO, head=head), CPU)
    record = accuracy_record(
        FlashAttention().step(inputs), oracle(inputs), BASELINES[False].step(inputs)
    )
    assert record["passes"], record["broken"]
