"""torch.library's own checks of the Triton operators, and torch.compile through them."""

from __future__ import annotations

import pytest
import torch
from sampling import sampled
from torch import nn

from fastdpo.loss import linear_dpo_loss

ops = pytest.importorskip("fastdpo.backends.triton.ops")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiled, they are tests of the GPU as well. Interpreted, infinities make numpy talk.
pytestmark = (
    pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("ignore::RuntimeWarning")
)
N, V, D = 9, 130, 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def opcheck(op, *arguments):
    """Schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(op, arguments)


def tensors(dtype):
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    labels = torch.randint(0, V, (N,))
    return *(t.to(dtype).to(DEVICE) for t in (hidden, weight, bias)), labels.to(DEVICE)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_logits(dtype, softcap):
    hidden, weight, bias, labels = tensors(dtype)
    for b in (bias, None):
        opcheck(ops.target_logits, hidden, weight, b, 0.5, softcap, 1.1, labels)
    opcheck(ops.target_logits, hidden[:0], weight, None, 0.5, softcap, 1.1, labels[:0])


@pytest.mark.parametrize("rows", [0, 1, N])
@pytest.mark.parametrize("dtype", sampled(DTYPES, (torch.bfloat16,)), ids=str)
def test_exp_logits(dtype, rows):
    hidden, weight, bias, labels = tensors(dtype)
    hidden, labels = hidden[:rows], labels[:rows]
    anchor = torch.randn(rows, device=DEVICE)
    # opcheck itself cannot copy a padded view of no rows.
    whole = torch.zeros(rows, 192 if rows else V, dtype=dtype, device=DEVICE)
    reanchored = torch.arange(rows, device=DEVICE) % 2 == 0
    tolerance = torch.full((rows,), 1e-3, device=DEVICE)
    for fixed, flagged, out, entry, stats in (
        (False, None, None, None, ""),
        (True, None, None, None, "is_top1"),
        (False, None, whole[:, :V], None, "entropy,mean_logits"),
        (
            True,
            reanchored,
            whole[:, : 77 if rows else V],
            anchor,
            "entropy,log_sum_sq_probs,mean_logits,is_top1",
        ),
    ):
        head = (hidden, weight, bias, 1.0, None if fixed else 4.0, 1.0)
        opcheck(ops.exp_logits, *head, labels, anchor, fixed, flagged, out, entry, stats, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_materialized_logits(dtype):
    logits = torch.randn(N, V).to(dtype).to(DEVICE)
    labels = torch.randint(0, V, (N,)).to(DEVICE)
    labels[3] = -1
    for z, y in ((logits, labels), (logits[:0], labels[:0])):
        opcheck(ops.logits_logps, z, y, 1.0, 3.0, 1.0)
        logps, lse = ops.logits_logps(z, y, 1.0, None, 1.0)
        out = torch.empty_like(z)
        opcheck(ops.logits_logps_backward, logps, z, y, lse, 1.0, None, 1.0, out)
        expanded = torch.ones(1, device=DEVICE).expand(len(y))
        opcheck(ops.logits_logps_backward, expanded, z, y, lse, 1.0, None, 1.0, out)
        opcheck(ops.logits_logps_backward_, logps, z.clone(), y, lse, 1.0, None, 1.0)


@pytest.mark.parametrize("average", [False, True])
def test_sequence_loss(average):
    offsets = torch.tensor([0, 2, 2, 5, 9], device=DEVICE)
    logps, ref = -torch.rand(9, device=DEVICE), -torch.rand(4, device=DEVICE)
    opcheck(ops.sequence_loss, logps, offsets, ref, 0.1, 0.2, average, True)
    opcheck(ops.sequence_loss, logps[:0], offsets[:1] * 0, ref[:0], 0.1, 0.2, average, False)


def test_every_operator_was_checked():
    """Whoever adds an operator adds a check: these are the ones above."""
    defined = {k for k, v in vars(ops).items() if isinstance(v, torch.library.CustomOpDef)}
    backward = {"logits_logps_backward", "logits_logps_backward_"}
    assert defined == {"target_logits", "exp_logits", "logits_logps", "sequence_loss"} | backward


def test_operators_write_nothing_but_what_they_declare():
    hidden, weight, bias, labels = tensors(torch.bfloat16)
    anchor = torch.randn(N, device=DEVICE)
    inputs = (hidden, weight, bias, labels, anchor)
    before = [t.clone() for t in inputs]
    head = (weight, bias, 1.0, None, 1.0)
    ops.exp_logits(hidden, *head, labels, anchor, False, None, None, None, "", None)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_compiles_whole(frozen):
    """One graph with backend="triton" inside, and the same numbers as eager."""
    hidden = torch.randn(4, 6, D, device=DEVICE)
    labels = torch.randint(0, V, (4, 6), device=DEVICE)
    labels[:, :2] = -100
    layer = nn.Linear(D, D, device=DEVICE)
    weight = torch.randn(V, D, device=DEVICE, requires_grad=not frozen)

    def step(hidden, labels):
        return linear_dpo_loss(
            torch.tanh(layer(hidden)), weight, labels, ref_hidden=hidden, backend="triton"
        ).loss

    def run(function):
        loss = function(hidden, labels)
        parameters = [layer.weight, *([] if frozen else [weight])]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(step), run(compiled), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
