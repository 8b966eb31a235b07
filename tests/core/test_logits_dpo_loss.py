"""logits_dpo_loss: what linear_dpo_loss computes, from logits that exist already."""

from __future__ import annotations

import inspect

import pytest
import torch
from public_cases import HEAD, check_logits_dpo_loss, data

from fastdpo.loss import linear_dpo_loss, logits_dpo_loss

OPTIONS = [
    {},
    {"average_log_prob": True, "label_smoothing": 0.1},
    {"pairs": "interleaved", "beta": 0.5},
    {"objective": "ipo", "length_normalized": True},
    {"objective": {"sigmoid": 0.8, "sft": 0.2}},
    {"ld_alpha": 0.5},
    {"objective": "aot"},
]


@pytest.mark.parametrize("reference", ["sequences", "tokens", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_from_hidden_states(dtype, options, packed, reference):
    check_logits_dpo_loss(dtype, packed, reference, **options)


def test_reference_free_objectives():
    logits, labels, _, _ = data(torch.float32)
    assert logits_dpo_loss(logits, labels, objective="simpo").loss.isfinite()


def test_it_compiles():
    logits, labels, ref, _ = data(torch.float32)
    weight = torch.ones(logits.shape[-1], requires_grad=True)

    def step(logits, weight):
        return logits_dpo_loss(logits * weight, labels, ref_logps=ref, **HEAD).loss

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = f(logits, weight)
        results.append([loss.detach(), torch.autograd.grad(loss, weight)[0]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": [1.0]}, "logits should be a torch.Tensor"),
        ({"logits": torch.ones(4, 5, 7, dtype=torch.int64)}, "logits should be of a floating"),
        ({"logits": torch.ones(20, 7)}, r"logits should be of shape \[2B, T, V\]"),
        ({"logits": torch.ones(4, 5, 7), "cu_seqlens": torch.arange(5)}, r"shape \[N, V\]"),
        ({"labels": torch.zeros(4, 6, dtype=torch.int64)}, "labels should be of shape"),
        ({"labels": torch.full((4, 5), 7)}, r"labels should be in \[0, 7\)"),
        ({"labels": torch.zeros(3, 5, dtype=torch.int64), "logits": torch.ones(3, 5, 7)},
         "number of sequences"),
        ({"ref_logps": torch.ones(3)}, "ref_logps should be of shape"),
        ({"temperature": 0.0}, "temperature should be a positive number"),
        ({"softcap": -1.0}, "softcap should be a positive number"),
        ({"beta": 0.0}, "beta"),
        ({"pairs": "zipped"}, "pairs should be one of"),
        ({"backend": "metal"}, "backend should be"),
        ({"use_weighting": True}, "use_weighting should be off"),
        ({"inplace_backward": 1}, "inplace_backward should be True or False"),
        ({"inplace_backward": True, "logits": torch.ones(5, 4, 7).transpose(0, 1)},
         "inplace_backward should be False for logits that are not contiguous"),
        ({"inplace_backward": True, "logits": torch.ones(4, 5, 7, requires_grad=True)},
         "inplace_backward should be False for logits that are a leaf"),
    ],
)  # fmt: skip
def test_bad_input(changed, message):
    given = {
        "logits": torch.ones(4, 5, 7),
        "labels": torch.zeros(4, 5, dtype=torch.int64),
        "ref_logps": torch.zeros(4),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        logits_dpo_loss(given.pop("logits"), given.pop("labels"), **given)


@pytest.mark.parametrize("ignored", [True, False])
def test_nothing_that_carries_loss(ignored):
    shape = (4, 5, 7) if ignored else (0, 5, 7)
    logits = torch.randn(shape).requires_grad_()
    out = logits_dpo_loss(logits, torch.full(shape[:2], -100))
    out.loss.backward()
    assert out.loss.isfinite()
    assert not logits.grad.any()


def test_linear_is_the_same_function_of_the_logits():
    """One certain example by hand: h = Σ log p(chosen) − Σ log p(rejected)."""
    logits, labels, ref, _ = data(torch.float64)
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = (logps * (labels != -100)).sum(-1) - ref
    margin = 0.1 * (sums[:2] - sums[2:])
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    torch.testing.assert_close(logits_dpo_loss(logits, labels, ref_logps=ref).loss, expected)
    for function in (linear_dpo_loss, logits_dpo_loss):
        assert inspect.signature(function).parameters["beta"].default == 0.1


def test_a_reference_per_token_says_anything_where_nothing_carries_loss():
    logits, labels, _, ref = data(torch.float32)
    expected = logits_dpo_loss(logits, labels, ref_logps=ref).loss
    spoilt = ref.masked_fill(labels == -100, torch.nan)
    assert torch.equal(logits_dpo_loss(logits, labels, ref_logps=spoilt).loss, expected)
