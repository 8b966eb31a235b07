"""linear_dpo_loss end to end: every layout, kind of reference and option against eager PyTorch, and
bad input.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from devices import device_of
from oracle import assert_as_accurate, eager_logps

from fastdpo import objectives
from fastdpo.core import sequences
from fastdpo.loss import linear_dpo_loss, linear_logps

B, T, D, V = 3, 11, 24, 331


def batch(dtype=torch.float32, seed=0, requires_grad=True):
    """A padded batch of B pairs with prompts ignored: hidden, weight, labels, ref_hidden,
    ref_weight.
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * B, T, D, generator=g).to(dtype)
    weight = (0.3 * torch.randn(V, D, generator=g)).to(dtype)
    ref_hidden = (hidden.float() + 0.1 * torch.randn(2 * B, T, D, generator=g)).to(dtype)
    ref_weight = (weight.float() + 0.05 * torch.randn(V, D, generator=g)).to(dtype)
    labels = torch.randint(0, V, (2 * B, T), generator=g)
    for s in range(2 * B):
        labels[s, : 2 + s % 3] = -100
        labels[s, T - s % 4 :] = -100
    return (
        hidden.requires_grad_(requires_grad),
        weight.requires_grad_(requires_grad),
        labels,
        ref_hidden,
        ref_weight,
    )


def eager_loss(
    hidden, weight, labels, ref_hidden=None, ref_weight=None, beta=0.1, smoothing=0.0, average=False
):
    """The DPO loss as trainers write it: loss, chosen_logps, rejected_logps, chosen_rewards,
    rejected_rewards.
    """
    count = (labels != -100).sum(-1) if average else 1
    sums = eager_logps(hidden, weight, labels).sum(-1) / count
    ref = torch.zeros_like(sums)
    if ref_hidden is not None:
        ref = eager_logps(ref_hidden, ref_weight, labels).sum(-1) / count
    rewards = beta * (sums - ref)
    margins = rewards[:B] - rewards[B:]
    loss = -((1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)).mean()
    return loss, sums[:B], sums[B:], rewards[:B], rewards[B:]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("reference", ["hidden", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"average_log_prob": True}, {"label_smoothing": 0.2, "beta": 0.5}], ids=str
)
def test_against_eager(dtype, reference, options):
    hidden, weight, labels, *ref = batch(dtype)
    ref = ref if reference == "hidden" else [None, None]
    names = {"average_log_prob": "average", "label_smoothing": "smoothing", "beta": "beta"}
    eager_options = {names[k]: v for k, v in options.items()}

    def run(function, tensors, **kwargs):
        h, w, rh, rw = (None if t is None else t.detach() for t in tensors)
        h, w = h.requires_grad_(), w.requires_grad_()
        out = function(h, w, labels, ref_hidden=rh, ref_weight=rw, **kwargs)
        return [t.detach() for t in out], torch.autograd.grad(out[0], (h, w))

    tensors = (hidden, weight, *ref)
    ours, our_grads = run(linear_dpo_loss, tensors, **options)
    base, base_grads = run(eager_loss, tensors, **eager_options)
    oracle, oracle_grads = run(
        eager_loss, [None if t is None else t.double() for t in tensors], **eager_options
    )
    fields = ("loss", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards")
    for name, a, b, c in zip(fields, ours, base, oracle, strict=True):
        # Rewards are differences of sums some hundred times their size, and keep the roundings of
        # those.
        assert_as_accurate(a, b, c, 2, name, slack=30.0)
    for name, a, b, c in zip(
        ("hidden", "weight"), our_grads, base_grads, oracle_grads, strict=True
    ):
        assert_as_accurate(a, b, c, 3, f"grad {name}")


def test_equal_policy_and_reference_give_ln2_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels, *_ = batch(dtype)
        out = linear_dpo_loss(
            hidden, weight, labels, ref_hidden=hidden.detach(), ref_weight=weight.detach()
        )
        assert out.loss.item() == torch.tensor(math.log(2.0)).item()
        assert (out.chosen_rewards == 0).all()
        assert (out.rejected_rewards == 0).all()
        frozen = linear_dpo_loss(hidden, weight.detach(), labels, ref_hidden=hidden.detach())
        assert torch.equal(frozen.loss, out.loss)


def interleave(t):
    return torch.stack([t[:B], t[B:]], 1).flatten(0, 1)


@pytest.mark.parametrize("objective", ["sigmoid", "ipo"])
def test_interleaved_pairs(objective):
    hidden, weight, labels, ref_hidden, ref_weight = batch()
    kwargs = {"ref_weight": ref_weight, "objective": objective}
    a = linear_dpo_loss(hidden, weight, labels, ref_hidden=ref_hidden, **kwargs)
    b = linear_dpo_loss(
        interleave(hidden),
        weight,
        interleave(labels),
        ref_hidden=interleave(ref_hidden),
        pairs="interleaved",
        **kwargs,
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def pack(labels, *tensors):
    """The same sequences without their padding on the right: cu_seqlens and packed tensors."""
    keep = torch.ones_like(labels, dtype=torch.bool)
    for s in range(len(labels)):
        keep[s, (labels[s] != -100).nonzero().max() + 1 :] = False
    ends = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    return ends, *(t[keep] for t in tensors)


@pytest.mark.parametrize("objective", ["sigmoid", "ipo"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed(objective, index_dtype):
    hidden, weight, labels, ref_hidden, ref_weight = batch()
    a = linear_dpo_loss(
        hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, objective=objective
    )
    ends, h, y, rh = pack(labels, hidden, labels, ref_hidden)
    assert h.shape[0] < 2 * B * T
    b = linear_dpo_loss(
        h,
        weight,
        y,
        ref_hidden=rh,
        ref_weight=ref_weight,
        cu_seqlens=ends.to(index_dtype),
        objective=objective,
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
    ga = torch.autograd.grad(a.loss, (hidden, weight))
    gb = torch.autograd.grad(b.loss, (hidden, weight))
    for x, y in zip(ga, gb, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("objective", ["sigmoid", "hinge"])
def test_kinds_of_reference_agree(average, objective):
    hidden, weight, labels, ref_hidden, ref_weight = batch()
    kwargs = {"average_log_prob": average, "objective": objective}
    expected = linear_dpo_loss(
        hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, **kwargs
    )
    per_token = linear_logps(ref_hidden, ref_weight, labels)
    sums = per_token.sum(-1)
    if average:
        sums = sums / (labels != -100).sum(-1)
    garbage = torch.where(labels == -100, torch.full_like(per_token, 1e9), per_token)
    for ref_logps in (sums, per_token, garbage, sums.double()):
        got = linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, **kwargs)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_reference_with_another_hidden_size_and_bias():
    hidden, weight, labels, *_ = batch()
    bias, ref_bias = torch.randn(V), torch.randn(V)
    ref_hidden, ref_weight = torch.randn(2 * B, T, 7), torch.randn(V, 7)
    got = linear_dpo_loss(
        hidden,
        weight,
        labels,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
    )
    ref = eager_logps(ref_hidden, ref_weight, labels, ref_bias).sum(-1)
    policy = eager_logps(hidden, weight, labels, bias).sum(-1)
    torch.testing.assert_close(
        got.chosen_rewards, 0.1 * (policy - ref)[:B].detach(), atol=1e-5, rtol=1e-5
    )


def test_head_options_reach_policy_and_reference():
    hidden, weight, labels, ref_hidden, ref_weight = batch()
    head = {"logit_scale": 0.5, "softcap": 4.0, "temperature": 1.5}
    got = linear_dpo_loss(
        hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, **head
    )
    policy = eager_logps(hidden, weight, labels, **head).sum(-1)
    ref = eager_logps(ref_hidden, ref_weight, labels, **head).sum(-1)
    torch.testing.assert_close(
        got.rejected_rewards, 0.1 * (policy - ref)[B:].detach(), atol=1e-5, rtol=1e-5
    )


# What an objective cannot be called without, beyond the defaults.
NEEDED = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "odpo": {"offset": 0.5},
}
PAIR_OBJECTIVES = [name for name, entry in objectives.OBJECTIVES.items() if entry.layout == "pairs"]


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_every_objective_matches_autograd_through_eager_logps(name):
    """The objective of the fused log-probabilities has the loss and gradients of the objective of
    eager ones.
    """
    entry = objectives.OBJECTIVES[name]
    hidden, weight, labels, ref_hidden, ref_weight = batch(torch.float64)
    ref = entry.reference != "refused"
    options = dict(NEEDED.get(name, {}))
    kwargs = {"beta": 0.3, "label_smoothing": options.pop("label_smoothing", 0.0)}
    ours = linear_dpo_loss(
        hidden,
        weight,
        labels,
        ref_hidden=ref_hidden if ref else None,
        ref_weight=ref_weight if ref else None,
        objective=name,
        **kwargs,
        **options,
    )
    resolved = objectives.resolve(name, has_reference=ref, options=options, **kwargs)
    per_token = eager_logps(hidden, weight, labels)
    lengths = (labels != -100).sum(-1)
    expected = resolved(
        objectives.SequenceLogps(
            per_token.sum(-1),
            eager_logps(ref_hidden, ref_weight, labels).sum(-1) if ref else None,
            lengths,
            nll=-per_token[:B].sum() / lengths[:B].sum(),
        )
    )
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)
    a = torch.autograd.grad(ours.loss, (hidden, weight))
    b = torch.autograd.grad(expected.loss, (hidden, weight))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["simpo", "orpo", "sigmoid_norm"])
def test_objectives_that_average_do_not_average_twice(name):
    hidden, weight, labels, ref_hidden, ref_weight = batch(torch.float64)
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight} if name == "sigmoid_norm" else {}
    a, b = (
        linear_dpo_loss(
            hidden, weight, labels, objective=name, beta=2.0, average_log_prob=average, **ref
        ).loss
        for average in (False, True)
    )
    torch.testing.assert_close(a, b)


def test_wpo_and_ld_weights_reach_the_loss():
    hidden, weight, labels, ref_hidden, ref_weight = batch(torch.float64)
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    logits = (hidden @ weight.t()).log_softmax(-1)
    mask = labels != -100
    tokens = eager_logps(hidden, weight, labels)
    ref_tokens = eager_logps(ref_hidden, ref_weight, labels)

    weighted = linear_dpo_loss(hidden, weight, labels, use_weighting=True, **ref)
    aligned = ((tokens - (2 * logits).logsumexp(-1)) * mask).sum(-1) / mask.sum(-1)
    w = aligned.exp().detach()
    margin = 0.1 * (tokens - ref_tokens).sum(-1)
    expected = (-F.logsigmoid(margin[:B] - margin[B:]) * w[:B] * w[B:]).mean()
    torch.testing.assert_close(weighted.loss, expected)
    for x, y in zip(
        *(torch.autograd.grad(t, hidden)[0] for t in (weighted.loss, expected)), strict=True
    ):
        torch.testing.assert_close(x, y)

    tokens = eager_logps(hidden, weight, labels)
    ld = linear_dpo_loss(hidden, weight, labels, ld_alpha=0.3, **ref)
    shared = torch.minimum(mask[:B].sum(-1), mask[B:].sum(-1)).repeat(2)
    token_weights = torch.where(mask.cumsum(-1) <= shared[:, None], 1.0, 0.3)
    margin = 0.1 * ((tokens - ref_tokens) * token_weights).sum(-1)
    torch.testing.assert_close(ld.loss, -F.logsigmoid(margin[:B] - margin[B:]).mean())


def test_unpaired_and_ranked_layouts():
    hidden, weight, labels, ref_hidden, ref_weight = batch()
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    desirable = torch.tensor([True, False, True, True, False])
    out = linear_dpo_loss(
        hidden[:5],
        weight,
        labels[:5],
        ref_hidden=ref_hidden[:5],
        ref_weight=ref_weight,
        objective="kto",
        desirable=desirable,
        kl=torch.tensor(0.1),
    )
    assert out.chosen_logps.shape == (3,)
    assert out.rejected_logps.shape == (2,)
    assert torch.autograd.grad(out.loss, hidden)[0][:5].abs().sum() > 0
    ranked = linear_dpo_loss(
        hidden, weight, labels, objective="plackett_luce", num_candidates=3, **ref
    )
    rewards = 0.1 * (
        eager_logps(hidden, weight, labels) - eager_logps(ref_hidden, ref_weight, labels)
    ).sum(-1).view(3, 2)
    expected = -(rewards.log_softmax(0)[0] + rewards[1:].log_softmax(0)[0]).mean()
    torch.testing.assert_close(ranked.loss, expected)


@pytest.mark.parametrize("objective", PAIR_OBJECTIVES)
@pytest.mark.parametrize("kind", ["empty batch", "all ignored", "one completion of length zero"])
def test_degenerate_batches(objective, kind):
    entry = objectives.OBJECTIVES[objective]
    hidden, weight, labels, ref_hidden, _ = batch()
    if kind == "empty batch":
        hidden, labels, ref_hidden = hidden[:0], labels[:0], ref_hidden[:0]
    elif kind == "all ignored":
        labels = torch.full_like(labels, -100)
    else:
        labels[B] = -100
    out = linear_dpo_loss(
        hidden,
        weight,
        labels,
        ref_hidden=ref_hidden if entry.reference != "refused" else None,
        objective=objective,
        **NEEDED.get(objective, {}),
    )
    assert out.loss.isfinite()
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    for grad in grads:
        assert grad.isfinite().all()
        if kind != "one completion of length zero":
            assert (grad == 0).all()


def test_gradients_through_logps_and_loss_add():
    hidden, weight, labels, ref_hidden, ref_weight = batch(torch.float64)
    out = linear_dpo_loss(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
    (a,) = torch.autograd.grad(2 * out.loss - 0.1 * out.chosen_logps.sum(), hidden)
    eager = eager_loss(hidden, weight, labels, ref_hidden, ref_weight)
    (b,) = torch.autograd.grad(2 * eager[0] - 0.1 * eager[1].sum(), hidden)
    torch.testing.assert_close(a, b)
    assert not out.chosen_rewards.requires_grad


def test_row_index_gives_the_same_loss():
    hidden, weight, labels, ref_hidden, ref_weight = batch()
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    index = (labels != -100).flatten().nonzero().squeeze(1)
    a = linear_dpo_loss(hidden, weight, labels, **ref)
    b = linear_dpo_loss(hidden, weight, labels, row_index=index, **ref)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def good():
    hidden, weight, labels, *_ = batch(requires_grad=False)
    return {"hidden": hidden, "weight": weight, "labels": labels, "ref_logps": torch.zeros(2 * B)}


BAD = {
    "hidden": [lambda g: {"hidden": g["hidden"][0]}],
    "labels": [
        lambda g: {"labels": g["labels"][:, :-1]},
        lambda g: {
            "hidden": g["hidden"][:5],
            "labels": g["labels"][:5],
            "ref_logps": torch.zeros(5),
        },
        lambda g: {"labels": g["labels"].masked_fill(g["labels"] >= 0, V)},
    ],
    "ref_logps": [
        lambda g: {"ref_logps": torch.zeros(B)},
        lambda g: {"ref_logps": torch.zeros(2 * B, dtype=torch.int64)},
        lambda g: {"ref_hidden": g["hidden"]},
        lambda g: {"ref_logps": [0.0] * 6},
    ],
    "ref_hidden": [
        lambda g: {"ref_logps": None, "ref_weight": g["weight"]},
        lambda g: {"ref_logps": None, "ref_hidden": g["hidden"][:, 1:], "ref_weight": g["weight"]},
    ],
    "ref_weight": [
        lambda g: {"ref_logps": None, "ref_hidden": g["hidden"], "ref_weight": g["weight"][1:]},
    ],
    "ref_bias": [
        lambda g: {"ref_logps": None, "ref_hidden": g["hidden"], "ref_bias": torch.zeros(V)}
    ],
    "beta": [lambda g: {"beta": 0.0}, lambda g: {"beta": -1.0}, lambda g: {"beta": float("nan")}],
    "label_smoothing": [lambda g: {"label_smoothing": -0.1}, lambda g: {"label_smoothing": 1.0}],
    "objective": [lambda g: {"objective": "dpo2"}],
    "pairs": [lambda g: {"pairs": "zipped"}],
    "discopop_tau": [lambda g: {"discopop_tau": 0.05}],
    "use_wighting": [lambda g: {"use_wighting": True}],
    "cu_seqlens": [
        lambda g: {
            "hidden": g["hidden"][0],
            "labels": g["labels"][0],
            "ref_logps": torch.zeros(2),
            "cu_seqlens": torch.tensor([0, 5, 12]),
        },
        lambda g: {
            "hidden": g["hidden"][0],
            "labels": g["labels"][0],
            "ref_logps": torch.zeros(2),
            "cu_seqlens": torch.tensor([0.0, 5.0, 11.0]),
        },
    ],
}


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, cs in BAD.items() for c in cs])
def test_bad_input(name, change):
    arguments = good()
    linear_dpo_loss(**arguments)
    with pytest.raises(ValueError, match=name):
        linear_dpo_loss(**{**arguments, **change(arguments)})


def test_a_reference_is_asked_for_where_it_is_needed():
    arguments = good()
    with pytest.raises(ValueError, match="simpo"):
        linear_dpo_loss(**arguments, objective="simpo")
    del arguments["ref_logps"]
    assert linear_dpo_loss(**arguments).loss.isfinite()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"average_log_prob": "false"}, "average_log_prob should be True or False"),
        ({"stats": 3}, "stats should be a sequence of names"),
        ({"stats": None}, "stats should be a sequence of names"),
    ],
)
def test_flags_and_names_of_another_type(changed, message):
    hidden, weight, labels, *_ = batch()
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(hidden, weight, labels, **changed)


def test_only_what_was_asked_for_comes_back():
    hidden, weight, labels, ref_hidden, _ = batch()
    out = linear_dpo_loss(
        hidden, weight, labels, ref_hidden=ref_hidden, use_weighting=True, stats=("entropy",)
    )
    assert out.tokens.entropy is not None
    assert out.tokens.log_sum_sq_probs is None


# --- the ends of the numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("margin", [-1e4, -100.0, -17.0, 0.0, 5.0, 17.0, 30.0, 60.0, 85.0, 1e4])
def test_the_sigmoid_loss_is_right_at_any_margin(backend, margin):
    """Against 1 / (1 + e^m) and log(1 + e^(−m)), which are fp32 numbers up to a margin of 87."""
    logps = torch.tensor([-2.0, -2.0 - margin / 0.5]) if margin > 0 else None
    logps = torch.tensor([-2.0 + margin / 0.5, -2.0]) if logps is None else logps
    device = device_of(backend)
    logps = logps.to(device).requires_grad_()
    loss, _, _ = sequences.sigmoid_loss(
        logps,
        torch.tensor([1, 1], device=device),
        torch.tensor([-2.0, -2.0], device=device),
        beta=0.5,
        label_smoothing=0.0,
        average=False,
        pairs="concatenated",
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss, logps)
    e = math.exp(-abs(margin))
    assert loss.item() == pytest.approx(max(-margin, 0.0) + math.log1p(e), rel=3e-7, abs=1e-37)
    slope = 0.5 * (e if margin > 0 else 1.0) / (1.0 + e)
    assert grad.tolist() == pytest.approx([-slope, slope], rel=3e-7, abs=1e-37)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_impossible_rejected_answer_costs_nothing(backend):
    device = device_of(backend)
    logps = torch.tensor([-2.0, -math.inf], device=device, requires_grad=True)
    loss, _, _ = sequences.sigmoid_loss(
        logps,
        torch.tensor([1, 1], device=device),
        torch.tensor([-2.0, -2.0], device=device),
        beta=0.5,
        label_smoothing=0.0,
        average=False,
        pairs="concatenated",
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss, logps)
    assert loss == 0
    assert grad.cpu().equal(torch.zeros(2))


def test_a_tail_of_weight_0_may_be_impossible():
    """LD-DPO with ld_alpha = 0, and a token of probability 0 beyond the shared length."""
    hidden = torch.zeros(2, 4, 1)
    labels = torch.tensor([[-100, 0, 1, 2], [-100, 0, 1, -100]])
    bias = torch.tensor([0.0, 0.0, -math.inf])
    head = {"weight": torch.zeros(3, 1, requires_grad=True), "bias": bias}
    loss = linear_dpo_loss(
        hidden, head["weight"], labels, bias=bias, ld_alpha=0.0, ref_logps=torch.zeros(2)
    ).loss
    assert loss.item() == pytest.approx(math.log(2.0))
    loss.backward()
    assert head["weight"].grad.isfinite().all()
