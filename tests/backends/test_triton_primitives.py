"""The Triton kernels against the torch backend in fp64, primitive by primitive.

On a machine without a GPU they run in Triton's interpreter (`conftest`), where fp32 and bf16 take
the two paths of `exp_logits`: plain pointers and descriptors. Tolerances are bounds, per row: fp32
roundings of the products (Σ |h w|), of the logit and of its distance from the anchor.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch
from sampling import sampled

from fastdpo.backends import torch as oracle
from fastdpo.backends.contract import COLLISION_SHIFT, REANCHOR_ABOVE, Head
from fastdpo.backends.workspace import padded_empty

triton = pytest.importorskip("fastdpo.backends.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiled, they are tests of the GPU as well. Interpreted, infinities make numpy talk.
pytestmark = (
    pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("ignore::RuntimeWarning")
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, V, D = 20, 300, 48
EPS = 2.0**-23
# Half an ulp, relative, and the least number: results below it may be flushed. The interpreter
# rounds to bf16 by cutting off.
ROUNDING = {
    torch.float32: (0.0, 1e-37),
    torch.bfloat16: (2.0 ** (-7 if DEVICE == "cpu" else -8), 1e-37),
    torch.float16: (2.0**-11, 6e-8),
}

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale and temperature": {"scale": 0.6, "temperature": 1.7},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "scale": 1.3, "softcap": 7.0, "temperature": 0.8},
}


def inputs(dtype, n=N, v=V, d=D, spread=1.0, bias=False, **head):
    """hidden, head, labels: logits of standard deviation about `spread`."""
    hidden = (torch.randn(n, d) * math.sqrt(spread / math.sqrt(d))).to(dtype).to(DEVICE)
    weight = (torch.randn(v, d) * math.sqrt(spread / math.sqrt(d))).to(dtype).to(DEVICE)
    bias = torch.randn(v).to(dtype).to(DEVICE) if bias else None
    return hidden, Head(weight, bias, **head), torch.randint(0, v, (n,)).to(DEVICE)


def wide(head):
    bias = None if head.bias is None else head.bias.double()
    return Head(head.weight.double(), bias, head.scale, head.softcap, head.temperature)


def roundings(hidden, head, anchor):
    """Absolute error allowed in z − anchor, per row [N]."""
    products = (hidden.double().abs() @ head.weight.double().abs().t()).amax(1)
    if head.bias is not None:
        products = products + head.bias[head.bias.isfinite()].double().abs().amax()
    return EPS * (4 * head.gain * products + 4 * anchor.double().abs() + 16)


def check(
    hidden, head, labels, anchor, *, k=None, out_dtype=None, pad=0, stats=STATS, fixed=False,
    entry=None, tolerance=1e-3,
):  # fmt: skip
    """Runs both, compares everything, and returns what the kernels returned (sums, E)."""
    n = hidden.shape[0]
    k = head.vocab_size if k is None else k
    buffer = torch.full((n, k + pad), 7.0, dtype=out_dtype or hidden.dtype, device=DEVICE)
    out, expected_out = buffer[:, :k], torch.zeros(n, k, dtype=torch.float64, device=DEVICE)
    options = {"fixed_anchor": fixed, "stats": stats}
    if "is_top1" in stats:
        options["tolerance"] = torch.full_like(anchor, tolerance)
    got = triton.exp_logits(hidden, head, labels, anchor, out=out, label_entry=entry, **options)
    expected = oracle.exp_logits(
        hidden.double(), wide(head), labels, anchor.double(), out=expected_out,
        label_entry=None if entry is None else entry.double(), **options,
    )  # fmt: skip
    assert (buffer[:, k:] == 7.0).all(), "written beyond the columns asked for"
    delta = roundings(hidden, head, expected.anchor)
    reanchored = expected.anchor != anchor.double()
    assert torch.equal(got.anchor[~reanchored], anchor[~reanchored]), "an anchor moved without need"
    assert ((got.anchor - expected.anchor).abs() <= delta).all(), "anchors"
    # Every e carries the same factor where the two anchors differ by a rounding.
    shift = (got.anchor.double() - expected.anchor).unsqueeze(1)
    relative = 2 * delta
    close(got.sum, expected.sum, relative * expected.sum + 1e-35, "sum")
    if "entropy" in stats:
        z = oracle.logits_of(hidden.double(), wide(head))
        distance = z - expected.anchor.unsqueeze(1)
        weighted = (distance.exp() * distance.abs()).nan_to_num(0.0, posinf=0.0).sum(1)
        size = weighted + expected.sum
        close(got.entropy, expected.entropy, 4 * delta * size + 1e-33, "entropy")
    if "log_sum_sq_probs" in stats:
        # Beside the label's own e^(2 · COLLISION_SHIFT), what is smaller by EPS may be flushed.
        allowed = 4 * delta * expected.collision + EPS * math.exp(2 * COLLISION_SHIFT)
        close(got.collision, expected.collision, allowed, "collision")
    if "mean_logits" in stats:
        close(got.logits, expected.logits, delta * head.vocab_size, "logits")
    if "is_top1" in stats:
        close(got.top, expected.top, 2 * delta, "top")
        close(got.own, expected.own, 2 * delta, "own")
        # Of a row that was not settled it may be anything that is no more than top.
        assert ((got.earlier <= got.top) | got.top.isnan()).all()
    rounding, floor = ROUNDING[out.dtype]
    allowed = (relative.unsqueeze(1) + rounding + shift.abs()) * expected_out.abs() + floor
    if head.softcap is not None:
        # d = 1 − t² carries t's error, absolute.
        t_error = 8 * EPS + delta.unsqueeze(1) * head.temperature / head.softcap
        e = (oracle.logits_of(hidden.double(), wide(head)) - expected.anchor.unsqueeze(1)).exp()
        allowed = allowed + 2 * t_error * e[:, :k]
    close(out, expected_out, allowed, "E")
    return got, out


def close(got, expected, allowed, what):
    expected = expected.double()
    same = got.double() == expected  # infinities
    error = torch.where(same, 0.0, (got.double() - expected).abs())
    worst = (error / allowed.clamp_min(1e-300)).max() if error.numel() else 0.0
    assert (error <= allowed).all(), f"{what}: {worst:.1f} times the error allowed"


def same_bits(a, b):
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- target_logits


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_logits(dtype, name):
    hidden, head, labels = inputs(dtype, **HEADS[name])
    a = triton.target_logits(hidden, head, labels)
    assert a.dtype == torch.float32
    expected = oracle.target_logits(hidden.double(), wide(head), labels)
    close(a, expected, roundings(hidden, head, expected), "a")


def test_target_logits_of_labels_in_another_tile_are_zero():
    hidden, head, labels = inputs(torch.float32)
    labels[3], labels[4] = -5, V
    a = triton.target_logits(hidden, head, labels)
    assert (a[3], a[4]) == (0.0, 0.0)
    assert a[:3].all()


def test_target_logits_of_any_strides():
    hidden, head, labels = inputs(torch.bfloat16, d=2 * D)
    sliced = Head(head.weight[:, ::2])
    a = triton.target_logits(hidden[:, 1::2], sliced, labels)
    b = triton.target_logits(hidden[:, 1::2].contiguous(), Head(sliced.weight.contiguous()), labels)
    same_bits(a, b)


# ---- exp_logits


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exp_logits(dtype, name):
    hidden, head, labels = inputs(dtype, **HEADS[name])
    anchor = triton.target_logits(hidden, head, labels)
    # E in fp16 has no room for an anchor chosen before the sum: there see `test_fixed_anchors`.
    kept = torch.float32 if dtype == torch.float16 else dtype
    # With one that large every row's tiles are looked through for ties.
    tolerance = 30.0 if name in ("plain", "everything") else 1e-3
    check(hidden, head, labels, anchor, pad=20, out_dtype=kept, tolerance=tolerance)


@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (1, 300, 47), (17, 63, 16), (33, 65, 1), (16, 64, 32)]
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ragged_shapes(dtype, shape):
    hidden, head, labels = inputs(dtype, *shape)
    check(hidden, head, labels, triton.target_logits(hidden, head, labels), pad=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_asked_of_no_rows(dtype):
    hidden, head, labels = inputs(dtype, n=0)
    out = torch.empty(0, V, dtype=dtype, device=DEVICE)
    assert triton.target_logits(hidden, head, labels).shape == (0,)
    sums = triton.exp_logits(
        hidden, head, labels, hidden.new_empty(0).float(), out=out, stats=STATS,
        tolerance=hidden.new_empty(0).float(),
    )  # fmt: skip
    assert [t.shape for t in sums] == [(0,)] * len(sums)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 3000.0])
@pytest.mark.parametrize(
    ("dtype", "softcap"),
    sampled(
        [(dtype, softcap) for dtype in DTYPES[:2] for softcap in (None, 30.0)],
        [(torch.float32, None), (torch.bfloat16, 30.0)],
        several=True,
    ),
    ids=str,
)
def test_flat_and_peaked(dtype, spread, softcap):
    hidden, head, labels = inputs(dtype, spread=spread, softcap=softcap)
    labels[::2] = oracle.logits_of(hidden.double(), wide(head)).argmax(1)[::2]
    got, _ = check(hidden, head, labels, triton.target_logits(hidden, head, labels))
    if spread == 3000.0 and softcap is None:
        assert (got.anchor != triton.target_logits(hidden, head, labels)).any()


@pytest.mark.parametrize("distance", [45.0, 65.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_unlikely_labels_are_exact(dtype, distance):
    hidden, head, labels = inputs(dtype, bias=True)
    bias = head.bias.float()
    labels[:] = torch.arange(N, device=DEVICE)
    bias[1:N:2] -= distance
    head = Head(head.weight, bias.to(dtype))
    anchor = triton.target_logits(hidden, head, labels)
    got, _ = check(hidden, head, labels, anchor)
    moved = got.anchor != anchor
    assert not moved[::2].any()
    assert bool(moved[1::2].all()) == (distance > 60)
    delta = (got.anchor - anchor).double()
    logps = -torch.nn.functional.softplus(delta + got.sum.double().log())
    expected = oracle.logits_of(hidden.double(), wide(head)).log_softmax(1)
    expected = expected.gather(1, labels.unsqueeze(1)).squeeze(1)
    close(logps, expected, 4 * roundings(hidden, head, anchor), "logps")


def test_flagged_rows_leave_the_others_alone():
    hidden, head, labels = inputs(torch.bfloat16, bias=True)
    plain = triton.target_logits(hidden, head, labels)
    out = torch.empty(N, V, dtype=torch.bfloat16, device=DEVICE)
    calm = triton.exp_logits(hidden, head, labels, plain, out=out, stats=STATS)
    flagged = plain.clone()
    flagged[[0, 7, 19]] = -300.0  # anchors far below: e^300
    mixed_out = torch.empty_like(out)
    mixed = triton.exp_logits(hidden, head, labels, flagged, out=mixed_out, stats=STATS)
    rest = [i for i in range(N) if i not in (0, 7, 19)]
    for a, b in zip((*calm, out), (*mixed, mixed_out), strict=True):
        same_bits(a[rest], b[rest])
    assert mixed.sum.isfinite().all()
    assert (mixed.anchor[[0, 7, 19]] > -100).all()


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_sum_that_is_no_number_is_reanchored(softcap):
    """Neither inf nor NaN passes the test S ≤ REANCHOR_ABOVE."""
    assert math.isclose(REANCHOR_ABOVE, math.exp(60))
    hidden, head, labels = inputs(torch.float32, softcap=softcap)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[2], anchor[5] = -1e30, -math.inf
    got, _ = check(hidden, head, labels, anchor)
    assert got.anchor.isfinite().all()
    hidden[1] = math.nan
    got = triton.exp_logits(hidden, head, labels, anchor)
    assert got.sum.isnan().nonzero().tolist() == [[1]]


def test_entries_that_cannot_occur():
    hidden, head, labels = inputs(torch.float32, bias=True)
    head.bias[:100] = -math.inf
    labels += 100 - labels.clamp(max=100)  # all ≥ 100
    anchor = triton.target_logits(hidden, head, labels)
    got, out = check(hidden, head, labels, anchor, stats=("entropy", "log_sum_sq_probs", "is_top1"))
    assert (out[:, :100] == 0).all()
    # A label that cannot occur: everything is above it.
    labels[4] = 3
    anchor = triton.target_logits(hidden, head, labels)
    assert anchor[4] == -math.inf
    got = triton.exp_logits(hidden, head, labels, anchor)
    assert got.sum.isfinite().all()
    assert got.anchor[4].isfinite()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_labels_in_another_tile(dtype):
    hidden, head, labels = inputs(dtype, bias=True)
    labels -= 150
    labels[0], labels[1] = V, V + 9
    anchor = torch.randn(N, device=DEVICE)
    entry = torch.randn(N, device=DEVICE)
    check(hidden, head, labels, anchor, entry=entry)


@pytest.mark.parametrize("k", [1, 64, 100, 299])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_fewer_columns_kept_than_there_are(dtype, k):
    hidden, head, labels = inputs(dtype)
    labels[0], labels[1] = k - 1, k
    entry = -torch.rand(N, device=DEVICE)
    pad = -k % 64
    _, out = check(
        hidden, head, labels, triton.target_logits(hidden, head, labels), k=k, pad=pad, entry=entry
    )
    rows = (labels < k).nonzero().squeeze(1)
    stored = out[rows, labels[rows]]
    close(stored, entry[rows], entry[rows].double().abs() * ROUNDING[dtype][0], "entries")


def test_without_an_entry_the_labels_column_is_zero():
    hidden, head, labels = inputs(torch.bfloat16)
    _, out = check(hidden, head, labels, triton.target_logits(hidden, head, labels))
    assert (out.gather(1, labels.unsqueeze(1)) == 0).all()


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fixed_anchors(dtype, softcap):
    """As the backward asks: anchored so that S = 2^10, the entry known, whatever the sum."""
    hidden, head, labels = inputs(dtype, spread=4.0, softcap=softcap)
    anchor = triton.target_logits(hidden, head, labels)
    first = triton.exp_logits(hidden, head, labels, anchor)
    anchor = anchor + first.sum.log() - 10 * math.log(2)
    entry = torch.full_like(anchor, -1024.0)
    got, _ = check(hidden, head, labels, anchor, fixed=True, entry=entry, stats=())
    assert got.anchor is anchor
    close(got.sum, torch.full_like(anchor, 1024.0), torch.full_like(anchor, 0.05).double(), "sum")
    far = anchor - 70.0  # a sum above REANCHOR_ABOVE that fp32 still holds: it stays
    check(hidden, head, labels, far, fixed=True, stats=(), out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_flagged_rows_computed_again_have_the_same_bits(dtype):
    """All columns, or some of them at a time, E alone."""
    hidden, head, labels = inputs(dtype, bias=True)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[::3] -= 1000.0
    out = torch.empty(N, V, dtype=dtype, device=DEVICE)
    entry = torch.randn(N, device=DEVICE)
    first = triton.exp_logits(hidden, head, labels, anchor, out=out, label_entry=entry)
    reanchored = first.anchor != anchor
    assert reanchored.nonzero().squeeze(1).tolist() == list(range(0, N, 3))
    for start, stop in ((0, V), (0, 128), (128, V)):
        again = torch.empty(N, stop - start, dtype=dtype, device=DEVICE)
        sums = triton.exp_logits(
            hidden, head.columns(start, stop), labels - start, first.anchor, out=again,
            label_entry=entry, fixed_anchor=True, reanchored=reanchored,
        )  # fmt: skip
        same_bits(again, out[:, start:stop])
        if stop - start == V:
            same_bits(sums.sum, first.sum)


def test_collision_neither_underflows_nor_overflows():
    hidden, head, labels = inputs(torch.float32)
    for shift in (50.0, -8.0):
        anchor = triton.target_logits(hidden, head, labels) - shift
        got = triton.exp_logits(hidden, head, labels, anchor, fixed_anchor=True, stats=STATS[1:2])
        z = oracle.logits_of(hidden.double(), wide(head)) - anchor.double().unsqueeze(1)
        z.scatter_(1, labels.unsqueeze(1), -math.inf)
        expected = (2 * (z + COLLISION_SHIFT)).exp().sum(1)
        close(got.collision, expected, expected * 1e-4, "collision")


# ---- exp_logits, to the bit


def everything(hidden, head, labels, anchor, rows=slice(None), stats=STATS, store=True):
    hidden, labels, anchor = hidden[rows], labels[rows], anchor[rows]
    out = padded_empty(len(hidden), head.vocab_size, hidden).zero_()  # as the schedule lays out E
    sums = triton.exp_logits(hidden, head, labels, anchor, out=out if store else None, stats=stats)
    return [*(t for t in sums if t is not None), *([out] if store else [])]


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    sampled(
        [(dtype, softcap) for dtype in DTYPES for softcap in (None, 8.0)],
        [(torch.float32, 8.0), (torch.bfloat16, None), (torch.float16, 8.0)],
        several=True,
    ),
    ids=str,
)
def test_a_row_does_not_depend_on_its_batch(dtype, softcap):
    hidden, head, labels = inputs(dtype, n=37, softcap=softcap)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[5] = -200.0
    whole = everything(hidden, head, labels, anchor)
    for rows in (slice(5, 6), slice(0, 7), slice(30, 37)):
        part = everything(hidden, head, labels, anchor, rows)
        for a, b in zip(whole, part, strict=True):
            same_bits(a[rows], b)
        same_bits(
            triton.target_logits(hidden, head, labels)[rows],
            triton.target_logits(hidden[rows], head, labels[rows]),
        )


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("dtype", sampled(DTYPES[:2], (torch.bfloat16,)), ids=str)
def test_sums_do_not_depend_on_what_else_is_asked(dtype, softcap):
    hidden, head, labels = inputs(dtype, softcap=softcap)
    anchor = triton.target_logits(hidden, head, labels)
    anchor[5] = -200.0
    anchors, sums, *_, out = everything(hidden, head, labels, anchor)
    for stats in ((), STATS[:1], STATS[2:]):
        for store in (True, False):
            found = everything(hidden, head, labels, anchor, stats=stats, store=store)
            same_bits(anchors, found[0])
            same_bits(sums, found[1])
            if store:
                same_bits(out, found[-1])


def test_the_two_paths_agree():
    """Descriptors (aligned) and plain pointers (not): the same products in the same order."""
    hidden, head, labels = inputs(torch.bfloat16)
    anchor = triton.target_logits(hidden, head, labels)
    shifted = torch.empty(V * D + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(V, D)
    shifted.copy_(head.weight)
    for a, b in zip(
        everything(hidden, head, labels, anchor),
        everything(hidden, Head(shifted), labels, anchor),
        strict=True,
    ):
        close(a, b.double(), b.double().abs() * (2.0**-7) + 1e-30, "paths")


def test_strided_hidden_and_weight():
    hidden, head, labels = inputs(torch.float32, d=2 * D)
    anchor = triton.target_logits(hidden, head, labels)
    weight = head.weight.t().contiguous().t()  # column-major
    for w, h in ((weight, hidden), (head.weight[:, ::2], hidden[:, ::2])):
        check(h, Head(w), labels, anchor if w is weight else anchor * 0, stats=("mean_logits",))


# ---- materialized logits


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "v"),
    sampled([(5, 5000), (2, 16_400), (3, 16), (1, 1)], [(5, 5000), (3, 16)], several=True),
)
def test_logits_logps_and_logits_logps_backward(dtype, name, n, v):
    options = {k: x for k, x in HEADS[name].items() if k != "bias"}
    logits = (torch.randn(n, v) * 3).to(dtype).to(DEVICE)
    labels = torch.randint(0, v, (n,)).to(DEVICE)
    check_logits(logits, labels, Head(logits, **options))


def check_logits(logits, labels, head):
    expected_logps, expected_lse = oracle.logits_logps(logits.double(), labels, wide(head))
    logps, lse = triton.logits_logps(logits, labels, head)
    assert (logps.dtype, lse.dtype) == (torch.float32, torch.float32)
    finite = logits.double().masked_fill(~logits.isfinite(), 0)
    size = EPS * (8 + 4 * head.gain * finite.abs().amax(1))
    close(logps, expected_logps, 2 * size, "logps")
    close(lse.sum(1), expected_lse.sum(1), 2 * size, "lse")
    grad = torch.randn(logits.shape[0], device=DEVICE)
    expected = torch.empty_like(logits, dtype=torch.float64)
    oracle.logits_logps_backward(
        grad.double(), logits.double(), labels, expected_lse, wide(head), expected
    )
    out = torch.full_like(logits, 7.0)
    triton.logits_logps_backward(grad, logits, labels, lse, head, out)
    rounding, floor = ROUNDING[out.dtype]
    slope = 0.0 if head.softcap is None else 16 * EPS
    scale = (grad.abs() * head.gain).double().unsqueeze(1)
    allowed = expected.abs() * rounding + floor + scale * (2 * size.unsqueeze(1) + slope)
    close(out, expected, allowed, "gradient")
    if logits.shape[1] == 1:  # forward and backward round a logit alike: probability 1 is exact
        assert not out.any()
    again = logits.clone()
    triton.logits_logps_backward(grad, again, labels, lse, head, again)
    same_bits(again, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_loss_are_not_read(dtype):
    logits = torch.randn(6, 700).to(dtype).to(DEVICE)
    labels = torch.tensor([3, -100, 699, -1, 0, -100], device=DEVICE)
    logits[labels < 0] = math.nan
    logps, lse = triton.logits_logps(logits, labels, Head(logits))
    assert (logps[labels < 0] == 0).all()
    assert (lse[labels < 0] == 0).all()
    assert logps.isfinite().all()
    grad = torch.ones(1, device=DEVICE).expand(6)
    triton.logits_logps_backward(grad, logits, labels, lse, Head(logits), logits)
    assert (logits[labels < 0] == 0).all()
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size(dtype, size):
    logits = torch.randn(8, 5000)
    logits[torch.arange(8), torch.arange(8)] = torch.tensor([size, -size] * 4)
    logits[5, 100:] = -math.inf
    logits[6, :4500] = -math.inf  # more than one block of nothing before the first finite one
    labels = torch.arange(8).to(DEVICE)
    labels[6] = 4700
    check_logits(logits.to(dtype).to(DEVICE), labels, Head(logits.to(dtype).to(DEVICE)))


@pytest.mark.parametrize("backend", [oracle, triton], ids=["torch", "triton"])
def test_a_large_common_offset_costs_no_accuracy(backend):
    cases.check_common_offset(backend, DEVICE)


def test_logits_of_any_strides_and_another_dtype_out():
    wide_logits = torch.randn(9, 1400, device=DEVICE)
    for logits in (wide_logits[:, :700], wide_logits[:, ::2], torch.randn(700, 9).to(DEVICE).t()):
        labels = torch.randint(0, 700, (9,)).to(DEVICE)
        check_logits(logits, labels, Head(logits))
        logps, lse = triton.logits_logps(logits, labels, Head(logits))
        out = torch.empty(9, 701, dtype=torch.bfloat16, device=DEVICE)[:, :700]
        expected = torch.empty(9, 700, device=DEVICE)
        for o in (out, expected):
            triton.logits_logps_backward(logps, logits, labels, lse, Head(logits), o)
        rounding, floor = ROUNDING[torch.bfloat16]
        close(out, expected, expected.double().abs() * rounding + floor, "gradient in bf16")


def test_no_logits():
    logits = torch.empty(0, 50, device=DEVICE)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    logps, lse = triton.logits_logps(logits, labels, Head(logits))
    assert (logps.shape, lse.shape) == ((0,), (0, 2))
    triton.logits_logps_backward(logps, logits, labels, lse, Head(logits), logits)


# ---- sequence_loss


@pytest.mark.parametrize("pairs", ["concatenated", "interleaved"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("lengths", [[3, 5], [0, 1, 700, 256], [2] * 66], ids=len)
def test_sequence_loss(lengths, smoothing, average, pairs):
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    logps = -3 * torch.rand(int(offsets[-1]), device=DEVICE)
    ref = -3 * torch.rand(len(lengths), device=DEVICE) * (1 if average else len(lengths))
    options = (0.3, smoothing, average, pairs)
    got = triton.sequence_loss(logps, offsets, ref, *options)
    expected = oracle.sequence_loss(logps.double(), offsets, ref.double(), *options)
    assert got.loss.shape == ()
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert a.dtype == torch.float32
        size = expected.logps.abs().amax() if name != "coefficients" else b.abs().amax()
        close(a, b, torch.as_tensor(8 * EPS * (size + 1), device=DEVICE).expand(b.shape), name)


def test_sequence_loss_is_ln_2_for_equal_models_and_holds_far_margins():
    logps = -torch.rand(40, device=DEVICE)
    offsets = torch.tensor([0, 10, 17, 30, 40], device=DEVICE)
    zero = torch.zeros(4, device=DEVICE)
    sums = triton.sequence_loss(logps, offsets, zero, 0.1, 0.0, False, "concatenated").logps
    equal = triton.sequence_loss(logps, offsets, sums, 0.1, 0.0, False, "concatenated")
    assert equal.loss == torch.tensor(math.log(2.0))
    assert (equal.rewards == 0).all()
    for sign in (1.0, -1.0):
        ref = sign * torch.tensor([1e4, 1e4, -1e4, -1e4], device=DEVICE)
        far = triton.sequence_loss(logps, offsets, ref, 1.0, 0.0, False, "concatenated")
        expected = oracle.sequence_loss(
            logps.double(), offsets, ref.double(), 1.0, 0.0, False, "concatenated"
        )
        torch.testing.assert_close(far.loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(far.coefficients.double(), expected.coefficients)


def test_no_pairs():
    empty = torch.empty(0, device=DEVICE)
    got = triton.sequence_loss(
        empty,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        empty,
        0.1,
        0.0,
        True,
        "interleaved",
    )
    assert got.loss == 0
    assert got.coefficients.shape == (0,)


# ---- what the backend says of itself


def test_it_says_what_it_serves():
    from fastdpo.backends.triton.reduce_sums import _REANCHOR_ABOVE

    assert _REANCHOR_ABOVE.value == REANCHOR_ABOVE
    for dtype in DTYPES:
        assert triton.supports(torch.device(DEVICE), dtype)[0]
    ok, why = triton.supports(torch.device(DEVICE), torch.float64)
    assert not ok
    assert "float64" in why
    ok, why = triton.available()
    assert ok, why
    for name in triton.PRIMITIVES:
        assert callable(getattr(triton, name))


def test_a_triton_that_is_too_old_is_refused(monkeypatch):
    for version, expected in (("3.5.1", False), ("3.6.0", True), ("3.10.0+git", True)):
        monkeypatch.setattr("triton.__version__", version)
        ok, why = triton.available()
        assert ok is expected, why
        assert expected or why == "Triton 3.5.1 is older than 3.6"
