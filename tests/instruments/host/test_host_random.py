"""Shapes, strides, types and options at random, run on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

import cases
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

# Derandomised: a failure is the same on every machine. The fixture is a stateless module.
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
dtypes = st.sampled_from(cases.DTYPES)
transforms = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.sampled_from([0.25, -1.0, 3.0]),
        "softcap": st.sampled_from([5.0, 30.0]),
        "temperature": st.sampled_from([0.5, 2.0]),
    },
)
vocabularies = st.one_of(st.integers(1, 300), st.integers(2000, 10000), st.integers(16000, 40000))


@few
@given(st.data())
def test_logits(cuda, host, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000), "seed"))
    rows, vocab = draw(st.integers(1, 5), "rows"), draw(vocabularies, "vocab")
    dtype, transform = draw(dtypes, "dtype"), draw(transforms, "transform")
    logits, labels = cases.logits_and_labels(
        dtype,
        rows,
        vocab,
        spread=draw(st.sampled_from([0.0, 1.0, 8.0]), "spread"),
        row_stride=vocab + draw(st.integers(0, 17), "pad"),
        offset=draw(st.integers(0, 9), "offset"),
        ignored=tuple(draw(st.sets(st.integers(0, rows - 1)), "ignored")),
    )
    with host.schedule(draw(st.integers(0, 5), "schedule")):
        cases.check_forward(cuda, logits, labels, **transform)
        in_place = draw(st.booleans(), "in place")
        out = logits if in_place else torch.full((rows, vocab), cases.POISON, dtype=draw(dtypes))
        stride = draw(st.integers(0, 3), "the gradient's stride")
        grad = torch.randn(rows * max(1, stride)).as_strided((rows,), (stride,))
        scale = (
            torch.tensor(draw(st.sampled_from([-2.5, 0.0, 1e-3]))) if draw(st.booleans()) else None
        )
        cases.check_backward(cuda, logits, labels, out, grad=grad, grad_scale=scale, **transform)


@few
@given(st.data())
def test_target_logits(cuda, host, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000), "seed"))
    rows, vocab = draw(st.integers(1, 20), "rows"), draw(st.integers(1, 30), "vocab")
    width, pad = draw(st.integers(1, 1500), "width"), draw(st.integers(0, 9), "pad")
    dtype = draw(dtypes, "dtype")
    hidden = torch.randn(rows, width + pad).to(dtype)[:, pad:]
    weight = torch.randn(vocab, width + pad).to(dtype)[:, : width or None]
    bias = torch.randn(vocab).to(draw(dtypes)) if draw(st.booleans(), "bias") else None
    labels = torch.randint(0, vocab, (rows,))
    with host.schedule(draw(st.integers(0, 5), "schedule")):
        cases.check_target_logits(cuda, hidden, weight, labels, bias, **draw(transforms))


@few
@given(st.data())
def test_sequence_loss(cuda, host, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000), "seed"))
    half = draw(st.integers(1, 4), "pairs")
    lengths = draw(st.lists(st.integers(0, 600), min_size=2 * half, max_size=2 * half))
    with host.schedule(draw(st.integers(0, 5), "schedule")):
        cases.check_sequence_loss(
            cuda,
            *cases.sequences(lengths),
            beta=draw(st.sampled_from([0.01, 0.1, 2.0])),
            label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.5])),
            average=draw(st.booleans()),
            pairs=draw(st.sampled_from(["concatenated", "interleaved"])),
        )


@few
@given(st.data())
def test_logits_to_the_loss(cuda, host, data):
    """With rows that carry no loss, and rows of no sequence before and after them."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000), "seed"))
    half = draw(st.integers(1, 3), "pairs")
    lengths = draw(st.lists(st.integers(0, 6), min_size=2 * half, max_size=2 * half), "lengths")
    before, after = draw(st.integers(0, 3), "before"), draw(st.integers(0, 3), "after")
    offsets = before + torch.tensor([0, *lengths]).cumsum(0)
    rows = int(offsets[-1]) + after
    assume(sum(lengths))
    logits, labels = cases.logits_and_labels(
        draw(dtypes, "dtype"),
        rows,
        draw(vocabularies, "vocab"),
        ignored=tuple(draw(st.sets(st.integers(0, rows - 1)), "ignored")),
    )
    assume((labels[before : rows - after] >= 0).any())  # autograd wants something to follow
    with host.schedule(draw(st.integers(0, 5), "schedule")):
        cases.check_fused(
            cuda,
            logits,
            labels,
            offsets,
            -8 * torch.rand(2 * half),
            upstream=draw(st.sampled_from([1.0, -0.5, 1024.0]), "upstream"),
            label_smoothing=draw(st.sampled_from([0.0, 0.1])),
            average=draw(st.booleans(), "average"),
            pairs=draw(st.sampled_from(["concatenated", "interleaved"])),
            **draw(transforms, "transform"),
        )
