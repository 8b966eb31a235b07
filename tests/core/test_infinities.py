"""Logits of −∞: entries and labels that cannot occur, by definition (p log p = 0 at p = 0)."""

from __future__ import annotations

import itertools

import pytest
import torch
from devices import device_of, of_processes
from test_parallel import vocabulary

from fastdpo.loss import linear_logps

STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.7, "temperature": 1.3},
}
TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2,
}  # fmt: skip
CASES = [
    (backend, dtype)
    for backend, dtype in itertools.product(("torch", "triton"), DTYPES)
    if (backend, dtype) != ("triton", torch.float64)
]
CALLS = [(True, 0), (True, None), (False, None)]
# Interpreted, infinities make numpy talk.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def by_definition(hidden, weight, bias, labels, upstream, logit_scale=1.0, softcap=None,
                  temperature=1.0):  # fmt: skip
    """(statistics with logps, gradients of hidden, weight and bias) in fp64."""
    hidden, weight, bias, upstream = (t.detach().double() for t in (hidden, weight, bias, upstream))
    z, slope = (hidden @ weight.t() + bias) * logit_scale, torch.ones(())
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    e = torch.exp(z - z.amax(1, keepdim=True))
    p = e / e.sum(1, keepdim=True)
    plogp = torch.where(p > 0, p * p.clamp_min(1e-320).log(), 0.0)
    column = labels.unsqueeze(1)
    found = {
        "logps": (z - z.logsumexp(1, keepdim=True)).gather(1, column).squeeze(1),
        "entropy": -plogp.sum(1),
        "log_sum_sq_probs": p.square().sum(1).log(),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == labels,
    }
    grad = -p * upstream.unsqueeze(1)
    grad.scatter_add_(1, column, upstream.unsqueeze(1))
    grad = grad * slope * (logit_scale / temperature)
    return found, (grad @ weight, grad.t() @ hidden, grad.sum(0))


def make(dtype):
    """Six rows: possible and impossible labels, two of the rows 80 below their maximum."""
    hidden = torch.randn(6, 16).to(dtype)
    weight, bias = (0.3 * torch.randn(301, 16)).to(dtype), torch.zeros(301).to(dtype)
    hidden[2:4, 0], weight[:, 0], weight[5, 0] = 80.0, 0.0, 1.0
    for start, stop in ((100, 130), (200, 201), (240, 300)):
        bias[start:stop] = -torch.inf
    return hidden, weight, bias, torch.tensor([200, 10, 200, 12, 250, 300])


def same(got, expected, dtype, what):
    tolerance = TOLERANCE[dtype]
    got, expected = got.double(), expected.double()
    finite = expected[expected.isfinite()].abs()
    size = max(1e-30, float(finite.max())) if finite.numel() else 1.0
    torch.testing.assert_close(
        got, expected, atol=tolerance * size, rtol=tolerance,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


@pytest.mark.parametrize(("trained", "workspace"), CALLS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_every_statistic_and_gradient(backend, dtype, head, workspace, trained):
    device, tensors = device_of(backend), make(dtype)
    hidden, weight, bias, labels = (t.to(device) for t in tensors)
    upstream = torch.linspace(-1, 2, 6)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    out = linear_logps(
        hidden, weight, labels, bias=bias, stats=STATS, backend=backend,
        workspace_bytes=workspace, **HEADS[head],
    )  # fmt: skip
    grads = torch.autograd.grad(
        out.logps, leaves[: 3 if trained else 1], upstream.to(device, out.logps.dtype)
    )
    expected, exact = by_definition(*tensors, upstream, **HEADS[head])
    for name, value in expected.items():
        same(getattr(out, name).detach().cpu(), value, dtype, name)
    for name, a, b in zip(("hidden", "weight", "bias"), grads, exact, strict=False):
        same(a.cpu(), b, dtype, f"gradient of {name}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_entry_that_can_occur(backend):
    """All others are −∞: the label is certain, or everything else is."""
    device = device_of(backend)
    bias, weight = torch.full((3,), -torch.inf, device=device), torch.zeros(3, 1, device=device)
    bias[1] = 2.0
    for label, expected in ((1, (0.0, 0.0, 0.0, True)), (2, (-torch.inf, 0.0, 0.0, False))):
        hidden = torch.zeros(1, 1, device=device, requires_grad=True)
        out = linear_logps(
            hidden, weight, torch.tensor([label], device=device), bias=bias, backend=backend,
            stats=("entropy", "log_sum_sq_probs", "is_top1"),
        )  # fmt: skip
        assert (out.logps, out.entropy, out.log_sum_sq_probs, out.is_top1) == expected
        (grad,) = torch.autograd.grad(out.logps.sum(), hidden)
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("entries", "label"), [((0, 1, 2), 1), ((1,), 1), ((1,), 0)])
def test_no_probabilities_are_no_numbers(backend, entries, label):
    """Nothing that can occur, or a logit of +∞: NaN, as log_softmax has it, and no other number."""
    device = device_of(backend)
    bias, zeros = torch.zeros(3, device=device), torch.zeros(3, 1, device=device)
    bias[list(entries)] = torch.inf if len(entries) == 1 else -torch.inf
    out = linear_logps(
        zeros[:1], zeros, torch.tensor([label], device=device), bias=bias, backend=backend,
        stats=("entropy", "log_sum_sq_probs"),
    )  # fmt: skip
    assert torch.log_softmax(bias, 0)[label].isnan()
    assert all(value.isnan().all() for value in (out.logps, out.entropy, out.log_sum_sq_probs))


def _shared(tensors, backend, workspace, trained, upstream, head):
    hidden, weight, bias, labels = tensors
    mine, spread = vocabulary(weight)
    tensors = hidden, weight[mine], bias[mine]
    leaves = [
        t.detach().clone().requires_grad_(flag)
        for t, flag in zip(tensors, (True, trained, trained), strict=True)
    ]
    out = linear_logps(
        leaves[0], leaves[1], labels, bias=leaves[2], vocab_parallel=spread, backend=backend,
        workspace_bytes=workspace, stats=STATS, **head,
    )  # fmt: skip
    grads = torch.autograd.grad(
        out.logps, leaves[: 3 if trained else 1], upstream.to(out.logps.dtype)
    )
    return {name: getattr(out, name).detach() for name in ("logps", *STATS)}, grads


@pytest.mark.parametrize("nothing", [False, True], ids=["some", "a process without any"])
@pytest.mark.parametrize(("trained", "workspace"), CALLS)
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.float16), ("triton", torch.float32)],
    ids=str,
)
def test_a_shared_vocabulary(three, backend, dtype, head, workspace, trained, nothing):
    """Also where one process has nothing that can occur."""
    of_processes(backend)
    hidden, weight, bias, labels = make(dtype)
    if nothing:
        bias[:104] = -torch.inf
    upstream = torch.linspace(-1, 2, 6)
    found = three.run(
        _shared, (hidden, weight, bias, labels), backend, workspace, trained, upstream, HEADS[head]
    )
    expected, exact = by_definition(hidden, weight, bias, labels, upstream, **HEADS[head])
    for values, grads in found:
        for name, value in expected.items():
            same(values[name], value, dtype, name)
        same(grads[0], exact[0], dtype, "gradient of hidden")
    for i, name in enumerate(("weight", "bias"), 1):
        if trained:
            whole = torch.cat([grads[i] for _, grads in found])
            same(whole, exact[i], dtype, f"gradient of {name}")
