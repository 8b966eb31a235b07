"""Columns of the weight that are kept apart from it (`Head.extra`, LoRA's B): the same numbers as
those of one weight, a gradient of their own and none of the weight's size, and no copy of it.
"""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate, eager_logps
from test_schedule import CountProducts

from fastdpo.backends.contract import Head
from fastdpo.core import linear, operator, rows
from fastdpo.core.call import Call

N, V, D, R = 96, 4096, 64, 8
IGNORED = 32
UNIT = 2 * (N - IGNORED) * V * D
NARROW = R / D  # of a unit: a product of the extra columns


class Fresh(CountProducts):
    """The largest storage, in bytes, that is none of an operation's own arguments'."""

    def __init__(self):
        super().__init__()
        self.largest_made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        for t in _tensors(out):
            if t.untyped_storage().data_ptr() not in given:
                self.largest_made = max(self.largest_made, t.untyped_storage().nbytes())
        return out


def _tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def inputs(dtype=torch.float32, vocab=V, size=D, columns=R, n=N, **trained):
    generator = torch.Generator().manual_seed(0)

    def leaf(name, *shape, scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_(trained.get(name, True))

    tensors = {
        "hidden": leaf("hidden", n, size + columns),
        "weight": leaf("weight", vocab, size, scale=size**-0.5),
        "bias": leaf("bias", vocab),
        "extra": leaf("extra", vocab, columns, scale=size**-0.5),
    }
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[: n // 3] = -100
    return tensors, labels


def logps(tensors, labels, stats=(), head=None, **call):
    head = Head(tensors["weight"], tensors["bias"], extra=tensors.get("extra"), **(head or {}))
    found = rows.find(labels, -100, head.vocab_size)
    tokens = operator.token_logps(tensors["hidden"], head, found, Call(stats=stats, **call))
    return tokens if stats else found.at_labels(tokens.logps)


def joined(tensors):
    weight = torch.cat([tensors["weight"], tensors["extra"]], 1).detach().requires_grad_()
    hidden, bias = (tensors[n].detach().clone().requires_grad_() for n in ("hidden", "bias"))
    return {"hidden": hidden, "weight": weight, "bias": bias}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("trained", "workspace", "forward", "backward"),
    [
        # A frozen weight: E · [W, B] and r columns, where E is kept.
        ({"weight": False}, None, 1, 1 + 2 * NARROW),
        ({"weight": False}, 0, 1, 2 + 3 * NARROW),
        ({"weight": False, "hidden": False}, None, 1, NARROW),
        ({"weight": False, "extra": False}, None, 2 + NARROW, 0),
        ({}, None, 1, 2 + 2 * NARROW),
    ],
)
def test_products(dtype, trained, workspace, forward, backward):
    tensors, labels = inputs(dtype, **trained, bias=False)
    with CountProducts() as there:
        found = logps(tensors, labels, workspace_bytes=workspace)
    with CountProducts() as back:
        found.sum().backward()
    assert (there.operations / UNIT, back.operations / UNIT) == (forward + NARROW, backward)


@pytest.mark.parametrize("workspace", [None, 0])
def test_nothing_of_the_weights_size_is_made(workspace):
    """E has fewer rows here than the weight has columns."""
    tensors, labels = inputs(size=512, weight=False, bias=False)
    with Fresh() as there:
        found = logps(tensors, labels, workspace_bytes=workspace)
    with Fresh() as back:
        found.sum().backward()
    assert tensors["weight"].grad is None
    assert tensors["extra"].grad.shape == (V, R)
    weight_bytes = tensors["weight"].nbytes
    assert there.largest_made < weight_bytes / 2
    assert back.largest_made < weight_bytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "head",
    [{}, {"scale": 0.5, "softcap": 4.0, "temperature": 0.7}],
    ids=["plain", "softcap"],
)
@pytest.mark.parametrize("workspace", [None, 0])
def test_accuracy(dtype, head, workspace):
    tensors, labels = inputs(dtype, vocab=1037, size=37, columns=5, n=41)
    upstream = torch.linspace(-1.0, 2.0, len(labels))
    curve = {"logit_scale" if k == "scale" else k: v for k, v in head.items()}

    def eager(kind):
        leaves = {k: v.detach().to(kind).requires_grad_() for k, v in tensors.items()}
        weight = torch.cat([leaves["weight"], leaves["extra"]], 1)
        found = eager_logps(leaves["hidden"], weight, labels, leaves["bias"], **curve)
        (found * upstream.to(found.dtype)).sum().backward()
        return [found.detach(), *(t.grad for t in leaves.values())]

    found = logps(tensors, labels, head=head, workspace_bytes=workspace)
    (found * upstream).sum().backward()
    ours = [found.detach(), *(t.grad for t in tensors.values())]
    names = ["logps", *tensors]
    for name, got, base, exact in zip(names, ours, eager(dtype), eager(torch.float64), strict=True):
        assert got.dtype == (torch.float32 if name == "logps" else dtype)
        assert_as_accurate(got, base, exact, 2 if name == "logps" else 3, name)


def test_gradcheck():
    tensors, labels = inputs(torch.float64, vocab=23, size=7, columns=3, n=6)
    names = list(tensors)
    for head in ({}, {"softcap": 3.0, "scale": 0.8}):
        assert torch.autograd.gradcheck(
            lambda *given, head=head: logps(
                dict(zip(names, given, strict=True)), labels, head=head
            ),
            tuple(tensors.values()),
        )


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_statistics_and_the_entropys_gradient_are_those_of_one_weight(softcap):
    stats = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    tensors, labels = inputs(torch.float64, vocab=301, size=19, columns=5, n=40)
    labels[-10:] = 7
    one = joined(tensors)
    apart, whole = (logps(t, labels, stats, {"softcap": softcap}) for t in (tensors, one))
    for name, a, b in zip(apart._fields, apart, whole, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for found in (apart, whole):
        (found.entropy * 0.3 + found.logps).sum().backward()
    torch.testing.assert_close(tensors["hidden"].grad, one["hidden"].grad)
    grads = torch.cat([tensors["weight"].grad, tensors["extra"].grad], 1)
    torch.testing.assert_close(grads, one["weight"].grad)


@pytest.mark.parametrize("trained", [{}, {"weight": False}, {"weight": False, "extra": False}])
def test_equal_rows_have_equal_logits(trained):
    """Also where the tie is between columns of both."""
    tensors, labels = inputs(vocab=640, size=16, columns=4, n=30, **trained)
    with torch.no_grad():
        for name in ("weight", "extra", "bias"):
            tensors[name].copy_(tensors[name][:1].expand_as(tensors[name]))
    labels[:] = torch.arange(30)
    found = logps(tensors, labels, ("is_top1",))
    assert found.is_top1.tolist() == [True] + 29 * [False]


@pytest.mark.parametrize("workspace", [None, 0, 3000])
@pytest.mark.parametrize("trained", [{}, {"weight": False}, {"weight": False, "extra": False}])
def test_compiled(trained, workspace):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        tensors, labels = inputs(vocab=211, size=16, columns=4, n=24, **trained)

        def step(tensors, labels):
            return logps(tensors, labels, workspace_bytes=workspace)

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        found = run(tensors, labels)
        found.sum().backward()
        results.append([found.detach(), *(t.grad for t in tensors.values())])
    for eager, traced in zip(*results, strict=True):
        assert (eager is None) == (traced is None)
        if eager is not None:
            torch.testing.assert_close(traced, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("workspace", [None, 0])
def test_kernels_that_read_one_weight(workspace, monkeypatch):
    """Through Triton's interpreter. The backward joins a block of columns at a time."""
    pytest.importorskip("triton")
    sizes, joins = {"vocab": 700, "size": 24, "columns": 4, "n": 20}, []
    own = Head.joined
    monkeypatch.setattr(linear, "recompute_columns", lambda *_: 512)
    monkeypatch.setattr(Head, "joined", lambda head: joins.append(head.vocab_size) or own(head))
    results = []
    for backend in ("torch", "triton"):
        tensors, labels = inputs(**sizes, weight=False)
        found = logps(tensors, labels, backend=backend, workspace_bytes=workspace)
        made = list(joins)
        found.sum().backward()
        results.append([found.detach(), *(t.grad for t in tensors.values() if t.requires_grad)])
        assert tensors["weight"].grad is None
    assert set(made) == {700}
    assert joins[len(made) :] == ([512, 188] if workspace == 0 else [])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
