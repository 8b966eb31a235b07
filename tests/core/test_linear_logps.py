"""linear_logps against the fp64 oracle, with eager PyTorch of the same dtype as the baseline."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
import torch.utils.checkpoint
from devices import device_of
from oracle import assert_as_accurate, eager_logits, eager_logps, grads_of

from fastdpo.loss import linear_logps

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.0625, "temperature": 0.7},
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 1.5, "temperature": 1.3},
}


def make(n, vocab, d, dtype, *, bias=False, ignored=0.3, spread=0.3, seed=0):
    """hidden [n, d], weight [vocab, d], bias [vocab] or None, labels [n]."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    weight = (spread * torch.randn(vocab, d, generator=g)).to(dtype)
    b = torch.randn(vocab, generator=g).to(dtype) if bias else None
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, b, labels


def check(
    hidden,
    weight,
    bias,
    labels,
    trained=(True, True, True),
    upstream=None,
    head=None,
    slack=1.0,
    **options,
):
    """Values and gradients by the accuracy rule, its floor times `slack`; returns ours."""
    head = head or {}

    def run(dtype, function, **kwargs):
        tensors = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(flag)
            for t, flag in zip((hidden, weight, bias), trained, strict=True)
        ]
        logps = function(tensors[0], tensors[1], labels, bias=tensors[2], **head, **kwargs)
        g = upstream
        if g is None:
            g = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64, device=logps.device)
            g = g.view(logps.shape)
        if g.dtype != logps.dtype:  # where it is the same, its strides stay
            g = g.to(logps.dtype)
        return logps.detach(), grads_of(logps, g.expand(logps.shape), tensors)

    ours, our_grads = run(None, linear_logps, **options)
    base, base_grads = run(None, eager_logps)
    oracle, oracle_grads = run(torch.float64, eager_logps)
    assert ours.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert (ours[labels == -100] == 0).all()
    assert_as_accurate(ours, base, oracle, 2, "logps", slack)
    for name, a, b, c in zip(
        ("hidden", "weight", "bias"), our_grads, base_grads, oracle_grads, strict=True
    ):
        assert (a is None) == (c is None)
        if c is not None:
            assert a.dtype == hidden.dtype
            assert_as_accurate(a, b, c, 3, f"grad {name}", slack)
    return ours, our_grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shape", [(37, 1301, 48), (64, 1024, 64), (1, 7, 3), (5, 1, 4)], ids=str)
def test_values_and_gradients(dtype, head, shape):
    options = dict(HEADS[head])
    tensors = make(*shape, dtype, bias=options.pop("bias", False))
    check(*tensors, head=options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [0, 150_000, None])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_workspace_changes_nothing_but_memory(dtype, workspace, head):
    options = dict(HEADS[head])
    tensors = make(50, 1700, 40, dtype, bias=options.pop("bias", False))
    check(*tensors, head=options, workspace_bytes=workspace)


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frozen_parts(trained, dtype):
    tensors = make(33, 600, 40, dtype, bias=True)
    check(*tensors, trained=trained, head={"softcap": 4.0})


def test_nothing_trained_has_no_graph():
    hidden, weight, _, labels = make(9, 50, 8, torch.float32)
    assert not linear_logps(hidden, weight, labels).requires_grad
    hidden.requires_grad_()
    with torch.no_grad():
        assert not linear_logps(hidden, weight, labels).requires_grad


@pytest.mark.parametrize("kind", ["zero", "expanded", "strided"])
def test_upstream_gradients(kind):
    hidden, weight, _, labels = make(24, 300, 16, torch.float32)
    upstream = {
        "zero": torch.zeros(24),
        "expanded": torch.tensor(0.5).expand(24),
        "strided": torch.randn(48)[::2],
    }[kind]
    assert upstream.is_contiguous() == (kind == "zero")
    _, (grad_hidden, grad_weight, _) = check(hidden, weight, None, labels, upstream=upstream)
    if kind == "zero":
        assert (grad_hidden == 0).all()
        assert (grad_weight == 0).all()


def test_leading_dimensions_and_strides():
    hidden, weight, _, labels = make(24, 300, 16, torch.float32)
    flat = linear_logps(hidden, weight, labels)
    assert torch.equal(
        linear_logps(hidden.view(2, 3, 4, 16), weight, labels.view(2, 3, 4)).flatten(), flat
    )
    wide = torch.randn(24, 32)
    wide[:, ::2] = hidden
    transposed = weight.t().contiguous().t()
    torch.testing.assert_close(linear_logps(wide[:, ::2], transposed, labels), flat)
    check(wide[:, ::2], transposed, None, labels)
    check(hidden.view(4, 6, 16).transpose(0, 1), weight, None, labels.view(4, 6).t())


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)])
def test_no_rows(trained):
    for n, ignored in ((0, 0.0), (7, 2.0)):
        hidden, weight, bias, labels = make(n, 100, 8, torch.float32, bias=True, ignored=ignored)
        tensors = [
            t.requires_grad_(flag) for t, flag in zip((hidden, weight, bias), trained, strict=True)
        ]
        logps = linear_logps(hidden, weight, labels, bias=bias)
        assert logps.shape == (n,)
        assert (logps == 0).all()
        logps.sum().backward()
        for t in tensors:
            assert t.grad is None or (t.grad == 0).all()
        assert hidden.grad is not None


@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936, 256_000])
def test_real_vocabularies(vocab):
    check(*make(6, vocab, 16, torch.bfloat16), head={"softcap": 30.0} if vocab == 256_000 else {})


@pytest.mark.parametrize("spread", [1e-4, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flat_and_peaked_softmax(spread, dtype):
    hidden, weight, _, labels = make(40, 2000, 32, dtype, spread=spread)
    check(hidden, weight, None, labels)
    if spread > 1:  # and with the most likely label everywhere, whose gradient vanishes
        labels = torch.where(
            labels == -100, labels, (hidden.float() @ weight.float().t()).argmax(-1)
        )
        check(hidden, weight, None, labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nats", [30, 59, 61, 70, 90, 200, 1000])
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("head_trained", [True, False])
def test_unlikely_labels(dtype, nats, workspace, head_trained):
    """One token takes the probability; the label is `nats` below it; other rows of the batch are
    ordinary.
    """
    hidden, weight, _, labels = make(12, 640, 16, dtype, ignored=0.0)
    hidden[::3, 0] = float(nats)
    weight[:, 0] = 0.0
    weight[5, 0] = 1.0
    labels[::3] = 77
    trained = (True, head_trained, head_trained)
    ours, _ = check(hidden, weight, None, labels, trained=trained, workspace_bytes=workspace)
    assert (ours[::3] < -0.7 * nats).all()


def far_labels(n, vocab, d, size, gap, dtype=torch.float32):
    """hidden, weight, None and labels: logits of ±`size`, the label's about `gap` below the
    largest.
    """
    hidden, weight, *_ = make(n, vocab, d, torch.float32, spread=d**-0.5)
    hidden *= size / (hidden @ weight.t()).abs().amax(1, keepdim=True)
    z = hidden @ weight.t()
    labels = (z - z.amax(1, keepdim=True) + gap).abs().argmin(1)
    return hidden.to(dtype), weight.to(dtype), None, labels


@pytest.mark.parametrize(
    ("shape", "size", "gap"),
    [
        ((12, 640, 48), 130, 70),
        ((12, 640, 48), 1300, 70),
        ((12, 640, 48), 13_000, 1000),
        ((64, 1301, 2048), 13_000, 70),
        ((300, 2000, 896), 13_000, 50),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_e_computed_again_is_what_was_summed(dtype, shape, size, gap):
    """Large logits, where summing over D in another order moves e by up to a rounding of the
    logit.
    """
    check(*far_labels(*shape, size, gap, dtype), workspace_bytes=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_e_computed_again_over_several_blocks(dtype, monkeypatch):
    """Of rows and of columns; the rows that are anchored again are some of each block."""
    tensors = far_labels(300, 2000, 128, 1300, 65, dtype)
    bytes_ = torch.finfo(dtype).bits // 8
    monkeypatch.setattr("fastdpo.backends.workspace._BLOCK_BYTES", {"cpu": 128 * 2000 * bytes_})
    monkeypatch.setattr("fastdpo.backends.workspace._RECOMPUTE_BYTES", {"cpu": 300 * 600 * bytes_})
    for workspace in (0, 300 * 700 * bytes_):
        check(*tensors, workspace_bytes=workspace)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("upstream", [1e-17, 1e-23])
@pytest.mark.parametrize(
    ("trained", "workspace"),
    [((True, True, True), 0), ((True, True, True), None), ((True, False, False), None)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_upstream_gradients_of_unlikely_labels(dtype, workspace, trained, upstream, backend):
    """Labels at e^-57, not anchored at their maximum: r is 1e-25, and E as large."""
    device = device_of(backend)
    hidden, weight, bias, labels = make(12, 640, 16, dtype, bias=True, ignored=0.0)
    hidden[:, 1:] *= 0.1
    hidden[:, 0], weight[:, 0], weight[5, 0], labels[:] = 57.0, 0.0, 1.0, torch.arange(77, 89)
    bias *= 0.3
    hidden[3, 0] = 0.0  # an ordinary row among them
    g = torch.full((12,), upstream, dtype=torch.float64)
    g[::2] *= -0.7
    hidden, weight, bias, labels, g = (t.to(device) for t in (hidden, weight, bias, labels, g))
    tensors = [t.requires_grad_(f) for t, f in zip((hidden, weight, bias), trained, strict=True)]
    logps = linear_logps(
        hidden, weight, labels, bias=bias, workspace_bytes=workspace, backend=backend
    )
    far = (logps > -60) & (logps < -54)
    assert far.sum() == 11
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    exact = grads_of(eager_logps(*wide[:2], labels, wide[2]), g, wide)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(grads_of(logps, g.float(), tensors), exact, strict=True):
        if b is not None:
            assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(dtype):
    """Logits of ±10,000."""
    hidden, weight, _, labels = make(10, 300, 4, dtype, ignored=0.0)
    hidden *= 10_000 / hidden.abs().amax(1, keepdim=True)
    weight = (weight / weight.abs().max()).to(dtype)
    check(hidden, weight, None, labels, head={})


def test_impossible_entries():
    """A bias of −inf removes entries, as logit masks do; a label that is removed has
    log-probability −inf.
    """
    hidden, weight, bias, labels = make(8, 50, 8, torch.float32, bias=True, ignored=0.0)
    bias[10:20] = -torch.inf
    labels = labels.clamp(max=9)
    hidden.requires_grad_()
    expected = eager_logps(hidden, weight, labels, bias)
    ours = linear_logps(
        hidden, weight, labels, bias=bias, stats=("entropy", "log_sum_sq_probs", "is_top1")
    )
    torch.testing.assert_close(ours.logps, expected, atol=1e-5, rtol=1e-5)
    (a,) = torch.autograd.grad(ours.logps.sum(), hidden)
    (b,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert ours.entropy.isfinite().all()
    labels[0] = 15
    assert linear_logps(hidden, weight, labels, bias=bias)[0] == -torch.inf


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_statistics(head, dtype):
    options = dict(HEADS[head])
    hidden, weight, bias, labels = make(60, 900, 32, dtype, bias=options.pop("bias", False))
    hidden[3] *= 60  # one very peaked row
    labels[3] = 5
    top = eager_logits(
        hidden.double(), weight.double(), None if bias is None else bias.double(), **options
    )
    labels[10] = top[10].argmax()
    stats = ("is_top1", "entropy", "mean_logits", "log_sum_sq_probs")
    ours = linear_logps(hidden, weight, labels, bias=bias, stats=stats, **options)
    assert torch.equal(ours.logps, linear_logps(hidden, weight, labels, bias=bias, **options))
    carries = labels != -100
    z = top[carries]
    p = z.log_softmax(-1)
    expected = {
        "entropy": -(p.exp() * p).sum(-1),
        "log_sum_sq_probs": (2 * p).logsumexp(-1),
        "mean_logits": z.mean(-1),
    }
    tolerance = 1e-12 if dtype == torch.float64 else 4e-5
    for name, value in expected.items():
        got = getattr(ours, name)
        assert (got[~carries] == 0).all()
        torch.testing.assert_close(
            got[carries].double(), value, atol=tolerance, rtol=tolerance, msg=name
        )
    assert torch.equal(ours.is_top1[carries], z.argmax(-1) == labels[carries])
    assert ours.is_top1[10]
    assert not ours.is_top1[~carries].any()


def test_statistics_are_detached_but_for_the_entropy():
    hidden, weight, _, labels = make(12, 60, 8, torch.float32)
    hidden.requires_grad_()
    out = linear_logps(hidden, weight, labels, stats=("entropy", "mean_logits", "is_top1"))
    assert not out.mean_logits.requires_grad
    assert not out.is_top1.requires_grad
    (out.logps.sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False)]
)
@pytest.mark.parametrize("workspace", [0, None])
def test_gradcheck(trained, workspace):
    hidden, weight, bias, labels = make(6, 11, 4, torch.float64, bias=True)
    tensors = [
        t.requires_grad_(flag) for t, flag in zip((hidden, weight, bias), trained, strict=True)
    ]

    def function(h, w, b):
        return linear_logps(
            h, w, labels, bias=b, softcap=2.0, logit_scale=1.3, workspace_bytes=workspace
        )

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("workspace", [0, 60_000, None])
def test_backward_twice(workspace):
    """A retained graph gives the same gradients again, although the first backward spends E as
    scratch.
    """
    hidden, weight, _, labels = make(20, 1500, 16, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_logps(hidden, weight, labels, workspace_bytes=workspace).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("workspace", [None, 15_000])
def test_nothing_is_kept_once_the_gradient_is_there(workspace):
    """E and what else the backward needs: freed with the graph, though the loss is still held."""
    hidden, weight, _, labels = make(24, 3000, 16, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    saved = []

    def pack(t):
        saved.append((t.numel(), weakref.ref(t)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logps = linear_logps(hidden, weight, labels, workspace_bytes=workspace)
    rows = int((labels != -100).sum())
    largest = max(saved, key=lambda entry: entry[0])
    columns = 3000 if workspace is None else 15_000 // (4 * rows) // 512 * 512
    if columns:
        assert largest[0] >= rows * columns
    logps.sum().backward()
    assert largest[1]() is None or largest[0] == weight.numel()
    with pytest.raises(RuntimeError, match="second time"):
        logps.sum().backward()


def test_checkpointing_keeps_no_e():
    hidden, weight, _, labels = make(24, 3000, 16, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_logps(h, w, labels), hidden, weight, use_reentrant=False
    )
    plain = linear_logps(hidden, weight, labels)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight)),
        torch.autograd.grad(plain.sum(), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_frozen_head_does_not_keep_hidden():
    hidden, weight, _, labels = make(12, 50, 8, torch.float32)
    states = hidden.requires_grad_() * 1.0
    logps = linear_logps(states, weight, labels)
    expected = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)[0]
    with torch.no_grad():
        states.zero_()
    assert torch.equal(torch.autograd.grad(logps.sum(), hidden)[0], expected)


def test_two_runs_agree_to_the_bit():
    def run():
        tensors = make(70, 900, 32, torch.float32)
        hidden, weight = (t.requires_grad_() for t in tensors[:2])
        logps = linear_logps(hidden, weight, tensors[3], workspace_bytes=100_000)
        return logps, *torch.autograd.grad(logps.square().sum(), (hidden, weight))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_what_is_trained_does_not_change_the_bits():
    hidden, weight, bias, labels = make(300, 900, 32, torch.bfloat16, bias=True)
    reference = linear_logps(hidden, weight, labels, bias=bias)
    for trained, workspace in itertools.product(
        [(1, 1, 1), (1, 0, 0), (0, 1, 0)], [0, 100_000, None]
    ):
        for t, flag in zip((hidden, weight, bias), trained, strict=True):
            t.requires_grad_(bool(flag))
        logps = linear_logps(hidden, weight, labels, bias=bias, workspace_bytes=workspace)
        assert torch.equal(logps, reference)


def test_a_row_does_not_depend_on_its_batch():
    hidden, weight, _, labels = make(64, 700, 32, torch.float32, ignored=0.0)
    whole = linear_logps(hidden, weight, labels)
    for count in (1, 7, 33):
        part = linear_logps(hidden[:count], weight, labels[:count])
        torch.testing.assert_close(part, whole[:count], atol=2e-6, rtol=2e-6)


def test_row_index():
    hidden, weight, _, labels = make(30, 200, 16, torch.float32)
    index = (labels != -100).nonzero().squeeze(1)
    assert torch.equal(
        linear_logps(hidden, weight, labels, row_index=index), linear_logps(hidden, weight, labels)
    )
    some = linear_logps(hidden, weight, labels, row_index=index[:3])
    assert (some != 0).sum() == 3


def test_integer_dtypes_of_labels_and_other_ignore_index():
    hidden, weight, _, labels = make(30, 100, 16, torch.float32)
    expected = linear_logps(hidden, weight, labels)
    assert torch.equal(linear_logps(hidden, weight, labels.int()), expected)
    shifted = labels.masked_fill(labels == -100, 7)
    out = linear_logps(hidden, weight, shifted, ignore_index=7)
    assert torch.equal(out, expected.masked_fill(shifted == 7, 0.0))


BAD = {
    "hidden": [
        {"hidden": torch.zeros(4, 9)},
        {"hidden": torch.zeros(4, 8, dtype=torch.int64)},
        {"hidden": [1.0]},
    ],
    "weight": [
        {"weight": torch.zeros(8)},
        {"weight": torch.zeros(5, 8, dtype=torch.float64)},
        {"weight": torch.zeros(0, 8)},
    ],
    "bias": [{"bias": torch.zeros(4)}, {"bias": torch.zeros(5, dtype=torch.bfloat16)}],
    "labels": [
        {"labels": torch.zeros(3, dtype=torch.int64)},
        {"labels": torch.zeros(4)},
        {"labels": torch.tensor([0, 1, 5, 2])},
        {"labels": torch.tensor([0, 1, -1, 2])},
        {"labels": torch.zeros(4, dtype=torch.bool)},
    ],
    "logit_scale": [{"logit_scale": float("nan")}, {"logit_scale": 0.0}, {"logit_scale": "1"}],
    "softcap": [{"softcap": 0.0}, {"softcap": -1.0}],
    "temperature": [{"temperature": 0.0}, {"temperature": float("inf")}],
    "ignore_index": [{"ignore_index": 1.5}],
    "stats": [{"stats": ("entropie",)}, {"stats": ("entropy", "entropy")}],
    "workspace_bytes": [{"workspace_bytes": -1}, {"workspace_bytes": 1.5}],
    "backend": [{"backend": "cudnn"}],
    "row_index": [
        {"row_index": torch.tensor([0.0])},
        {"row_index": torch.tensor([0, 4])},
        {"row_index": torch.tensor([2, 1])},
    ],
}


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, cs in BAD.items() for c in cs], ids=str)
def test_bad_input(name, change):
    good = {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(5, 8),
        "labels": torch.tensor([0, 1, 2, -100]),
    }
    linear_logps(**good)
    with pytest.raises(ValueError, match=name):
        linear_logps(**{**good, **change})


def test_mismatched_devices():
    meta = torch.zeros(5, 8, device="meta")
    with pytest.raises(ValueError, match="weight should be on hidden's device"):
        linear_logps(torch.zeros(4, 8), meta, torch.zeros(4, dtype=torch.int64))
