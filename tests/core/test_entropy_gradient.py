"""The entropy in a loss: its gradient, alone and beside that of the log-probabilities."""

from __future__ import annotations

import pytest
import torch
from devices import device_of
from oracle import assert_as_accurate, eager_logits
from test_linear_logps import make
from test_parallel import vocabulary

from fastdpo.core import linear
from fastdpo.loss import linear_logps

HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3, "temperature": 0.7},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def eager(hidden, weight, bias, labels, **head):
    logps = eager_logits(hidden, weight, bias, **head).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    carries = labels != -100
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(carries, picked, 0.0), torch.where(carries, entropy, 0.0)


def gradients(function, tensors, trained, upstream, dtype=None, **options):
    hidden, weight, bias, labels = tensors
    leaves = []
    for t, needed in zip((hidden, weight, bias), trained, strict=True):
        t = None if t is None else t.detach().to(dtype or t.dtype)
        leaves.append(t if t is None else t.requires_grad_(needed))
    outputs = function(*leaves, labels, **options)
    total = sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True))
    return torch.autograd.grad(total, [t for t in leaves if t is not None and t.requires_grad])


def ours(hidden, weight, bias, labels, **options):
    found = linear_logps(hidden, weight, labels, bias=bias, stats=("entropy",), **options)
    return found.logps, found.entropy


def upstreams(labels, which):
    n = labels.numel()
    g, h = torch.linspace(-1, 2, n), torch.linspace(1.5, -0.5, n).roll(3)
    if which == "entropy":
        g = torch.zeros(n)
    if which == "few":
        h[::2], g[1::3] = 0.0, 0.0
    return g.view(labels.shape), h.view(labels.shape)


def check(tensors, trained, which, head, backend="torch", **options):
    device = device_of(backend)
    up = upstreams(tensors[3], which)
    exact = gradients(eager, tensors, trained, up, torch.float64, **head)
    base = gradients(eager, tensors, trained, up, **head)
    moved = [None if t is None else t.to(device) for t in tensors]
    got = gradients(
        ours, moved, trained, [u.to(device) for u in up], backend=backend, **head, **options
    )
    for name, a, b, e in zip(("hidden", "weight", "bias"), got, base, exact, strict=False):
        assert_as_accurate(a.cpu(), b, e, factor=3.0, what=f"gradient of {name}")


@pytest.mark.parametrize("which", ["both", "entropy", "few"])
@pytest.mark.parametrize("workspace", [0, 40_000, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_head(dtype, head, workspace, which):
    tensors = make(24, 500, 32, dtype, bias=True)
    check(tensors, (True, True, True), which, HEADS[head], workspace_bytes=workspace)


@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_trained(dtype, head, trained):
    check(make(24, 500, 32, dtype, bias=True), trained, "both", HEADS[head])


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton(dtype, trained):
    tensors = make(6, 200, 32, dtype, bias=True)
    check(tensors, trained, "both", {}, backend="triton", workspace_bytes=4096)


def test_gradcheck():
    hidden, weight, bias, labels = make(5, 12, 4, torch.float64, bias=True)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for head in HEADS.values():
        assert torch.autograd.gradcheck(
            lambda h, w, b, head=head: ours(h, w, b, labels, **head), leaves
        )


def test_impossible_entries_and_certain_labels():
    """p log p is 0 at 0, and a row that is certain has no gradient."""
    bias = torch.zeros(40)
    bias[10:30] = -torch.inf
    hidden, weight = torch.randn(4, 8), torch.randn(40, 8)
    labels = torch.tensor([0, 35, 12, 3])
    bias_certain = torch.full((40,), -torch.inf)
    bias_certain[3] = 0.0
    for b, expected in ((bias, None), (bias_certain, 0.0)):
        leaf = hidden.clone().requires_grad_()
        found = linear_logps(leaf, weight, labels, bias=b, stats=("entropy",))
        (got,) = torch.autograd.grad(found.entropy.sum(), leaf)
        assert got.isfinite().all()
        if expected is None:
            other = hidden.clone().requires_grad_()
            z = torch.cat([(other @ weight.t() + b)[:, :10], (other @ weight.t() + b)[:, 30:]], 1)
            p = z.log_softmax(-1)
            (want,) = torch.autograd.grad(-(p.exp() * p).sum(), other)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        else:
            assert not got.any()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e20])
def test_upstream_gradients_of_any_size(size):
    hidden, weight, _, labels = make(12, 300, 16, torch.float32)
    (expected,) = gradients(
        ours, (hidden, weight, None, labels), (True, False, False), upstreams(labels, "both")
    )
    up = [size * u for u in upstreams(labels, "both")]
    (got,) = gradients(ours, (hidden, weight, None, labels), (True, False, False), up)
    torch.testing.assert_close(got / size, expected, rtol=1e-5, atol=1e-7)


def test_the_entropy_costs_nothing_until_it_enters_a_loss(monkeypatch):
    calls = []
    blocks = linear.with_entropy
    monkeypatch.setattr(linear, "with_entropy", lambda *a: calls.append(a) or blocks(*a))
    for trained in ((True, True, False), (True, False, False)):
        hidden, weight, _, labels = make(12, 300, 16, torch.float32)
        hidden.requires_grad_()
        weight.requires_grad_(trained[1])
        found = linear_logps(hidden, weight, labels, stats=("entropy",))
        found.logps.sum().backward()
        assert not calls
        expected = hidden.grad.clone()
        hidden.grad = None
        linear_logps(hidden, weight, labels).sum().backward()
        assert hidden.grad.equal(expected)
        hidden.grad = None
        linear_logps(hidden, weight, labels, stats=("entropy",)).entropy.sum().backward()
        assert calls
        calls.clear()


def test_a_graph_that_is_gone_through_twice():
    hidden, weight, _, labels = make(24, 500, 32, torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    found = linear_logps(*leaves, labels, stats=("entropy",))
    total = (found.logps + found.entropy).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(total, leaves), first, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("trained", [True, False])
def test_compiled(trained):
    hidden, weight, _, labels = make(24, 500, 32, torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]

    def loss(hidden, weight):
        found = linear_logps(hidden, weight, labels, stats=("entropy",))
        return (found.logps + 0.3 * found.entropy).sum()

    wanted = leaves if trained else leaves[:1]
    expected = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _shared(tensors, trained, upstream, options):
    hidden, weight, bias, labels = tensors
    mine, spread = vocabulary(weight)
    part = (hidden, weight[mine], bias[mine], labels)
    return gradients(ours, part, trained, upstream, vocab_parallel=spread, **options), mine


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("head", HEADS)
def test_a_shared_vocabulary(three, head, trained):
    tensors = make(24, 500, 32, torch.float32, bias=True)
    up = upstreams(tensors[3], "both")
    expected = gradients(ours, tensors, trained, up, **HEADS[head])
    for got, mine in three.run(_shared, tensors, trained, up, HEADS[head]):
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b[mine], rtol=1e-4, atol=1e-5)
