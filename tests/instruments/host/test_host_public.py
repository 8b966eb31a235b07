"""What users call, with the CUDA C++ backend behind it, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate
from public_cases import check_logits_dpo_loss
from test_linear_logps import check, make

from fastdpo.backends import select
from fastdpo.loss import get_batch_logps, linear_dpo_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _served(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: (True, "on the CPU"))
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "cuda")
    select._serves.cache_clear()
    yield
    select._serves.cache_clear()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_materialized_logits(host, dtype, average):
    logits = (3 * torch.randn(4, 9, 301)).to(dtype)
    labels = torch.randint(0, 301, (4, 9))
    labels[:, :4] = -100
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0])

    def eager(dtype):
        z = logits.to(dtype).requires_grad_()
        wide = z[:, :-1] if dtype == torch.float64 else z[:, :-1].float()
        mask = labels[:, 1:] != -100
        target = labels[:, 1:].clamp(min=0).unsqueeze(-1)
        sums = (wide.log_softmax(-1).gather(-1, target).squeeze(-1) * mask).sum(-1)
        out = sums / (mask.sum(-1) if average else 1)
        return out.detach(), torch.autograd.grad(out, z, upstream.to(out.dtype))[0]

    (base, base_grad), (exact, exact_grad) = eager(dtype), eager(torch.float64)
    blocks = host.blocks()
    leaf = logits.requires_grad_()
    kept = get_batch_logps(leaf, labels, average_log_prob=average)
    (grad,) = torch.autograd.grad(kept, leaf, upstream, retain_graph=True)
    assert host.blocks() > blocks
    assert_as_accurate(kept.detach(), base, exact, 2, "logps")
    assert_as_accurate(grad, base_grad, exact_grad, 3, "gradient")
    assert not grad[:, -1].any()
    # Over logits that nobody else holds, the same bits.
    over = get_batch_logps(leaf * 1.0, labels, average_log_prob=average)
    assert torch.equal(torch.autograd.grad(over, leaf, upstream)[0], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states(host, dtype):
    """Its own kernels where it has them, the torch backend's product in between."""
    blocks = host.blocks()
    for workspace in (0, None):
        tensors = make(21, 500, 24, dtype, bias=True)
        check(*tensors, head={"softcap": 5.0}, workspace_bytes=workspace)
    assert host.blocks() > blocks


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_policy_and_reference_give_ln_2_to_the_bit(dtype, average):
    hidden = torch.randn(4, 9, 24).to(dtype).requires_grad_()
    weight, labels = torch.randn(301, 24).to(dtype), torch.randint(0, 301, (4, 9))
    out = linear_dpo_loss(
        hidden, weight, labels, ref_hidden=hidden.detach(), average_log_prob=average
    )
    assert out.loss.item() == torch.tensor(2.0).log().item()
    assert not out.chosen_rewards.any()


def test_autograd_knows_what_was_written_over():
    """A node that saved the logits may not find the gradient there."""
    logits = torch.randn(3, 50)
    labels = torch.randint(0, 50, (3,))
    scale = torch.ones(50, requires_grad=True)
    saved = logits * scale
    module = select.primitive("logits_logps_backward", logits)
    assert module.__name__ == "fastdpo.backends.cuda"
    from fastdpo.backends.contract import Head

    _, lse = module.logits_logps(logits, labels, Head(logits))
    module.logits_logps_backward(torch.ones(3), logits, labels, lse, Head(logits), logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_the_operators():
    """torch.library's own checks, on the CPU."""
    ops = torch.ops.fastdpo_cuda
    logits, labels = torch.randn(6, 50), torch.tensor([3, -100, 49, -1, 0, 7])
    hidden, weight, bias = torch.randn(6, 8), torch.randn(50, 8), torch.randn(50)
    offsets, ref = torch.tensor([0, 1, 3, 3, 6]), torch.zeros(4)
    transform, loss = (1.3, 9.0, 0.8), (0.1, 0.1, True, False)
    logps, lse = ops.logits_logps(logits, labels, *transform)
    for op, arguments in (
        (ops.target_logits, (hidden, weight, bias, labels.clamp(min=0), *transform)),
        (ops.logits_logps, (logits, labels, *transform)),
        (ops.logits_logps_backward,
         (logps, logits, labels, lse, *transform, torch.zeros(6, 50), torch.tensor(2.0))),
        (ops.sequence_loss, (logps, labels, offsets, ref, *loss)),
        (ops.logits_sequence_loss, (logits, labels, offsets, ref, *transform, *loss)),
    ):  # fmt: skip
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("reference", ["sequences", "tokens", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_to_the_loss_in_one_launch_sequence(monkeypatch, dtype, average, packed, reference):
    calls = []
    module = select.primitive("logits_logps", torch.empty(1, dtype=dtype))
    fused = module.logits_sequence_loss
    monkeypatch.setattr(
        module, "logits_sequence_loss", lambda *a: calls.append(len(a)) or fused(*a)
    )
    options = {"average_log_prob": average, "label_smoothing": 0.1, "pairs": "interleaved"}
    check_logits_dpo_loss(dtype, packed, reference, **options)
    assert len(calls) == 1
