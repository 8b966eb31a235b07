"""The registry of objectives: what has to hold for any of them."""

from __future__ import annotations

import math

import pytest
import torch
from test_objectives_reference import CASES, DIVERGENCES
from torch import Tensor

from fastdpo.objectives import (
    COMMON_OPTIONS,
    OBJECTIVES,
    ObjectiveOutput,
    ResolvedObjective,
    RunningMean,
    SequenceLogps,
    kl_estimate,
    ld_token_weights,
    markdown_table,
    resolve,
    wpo_weights,
)

PAIRS = [name for name, entry in OBJECTIVES.items() if entry.layout == "pairs"]
ALL_CASES = [(name, options, eps) for name, cases in CASES.items() for options, eps in cases]
DIVERGENT_CASES = [
    (name, {**options, "f_divergence": divergence, "f_alpha_divergence_coef": alpha}, eps)
    for name, options, eps in ALL_CASES
    if OBJECTIVES[name].f_divergence == "composes"
    for divergence, alpha in DIVERGENCES
    if divergence != "reverse_kl"
]


def build(name: str, options: dict[str, object], eps: float = 0.0) -> ResolvedObjective:
    return resolve(
        name,
        beta=0.3,
        label_smoothing=eps,
        has_reference=OBJECTIVES[name].reference != "refused",
        options=options,
    )


def batch(
    resolved: ResolvedObjective,
    logps: Tensor,  # [S]
    ref_logps: Tensor | None = None,  # [S]
    **fields: object,
) -> SequenceLogps:
    """A batch that fits `resolved`; lengths of 5 unless given."""
    reference = torch.zeros_like(logps) if ref_logps is None else ref_logps
    fields.setdefault("lengths", torch.full(logps.shape, 5, device=logps.device))
    if resolved.needs_nll:
        fields.setdefault("nll", logps.new_tensor(1.5).requires_grad_())
    return SequenceLogps(logps, reference if resolved.has_reference else None, **fields)


def sized(options: dict[str, object], rows: int) -> dict[str, object]:
    """Options with their per-row tensors cut or repeated to so many rows."""
    resized = dict(options)
    for key in ("desirable", "density_ratio", "offset"):
        value = options.get(key)
        if isinstance(value, Tensor) and value.dim() == 1:
            resized[key] = value.repeat(rows // len(value) + 1)[:rows]
    return resized


def interleave(values: Tensor, ranks: int) -> Tensor:
    return values.reshape(ranks, -1).t().flatten()


def assert_same(got: ObjectiveOutput, expected: ObjectiveOutput) -> None:
    for field, a, b in zip(ObjectiveOutput._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=field)


# --- what holds for every objective ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options", "eps"), ALL_CASES + DIVERGENT_CASES)
def test_extreme_values_are_finite(
    name: str, options: dict[str, object], eps: float, dtype: torch.dtype
) -> None:
    scales = torch.tensor([0.0, 1e-8, 1.0, 80.0, 200.0, 1e3, 1e4], dtype=dtype)
    ratios = torch.cat([scales, -scales[1:]])
    chosen, rejected = torch.cartesian_prod(ratios, ratios).unbind(1)
    pairs = chosen.shape[0]
    count = 2 * pairs
    if OBJECTIVES[name].layout == "ranked":
        ranks = int(options["num_candidates"])
        count = ranks * (count // ranks)
    options = sized(options, count if OBJECTIVES[name].layout == "unpaired" else count // 2)
    resolved = build(name, options, eps)
    logps = torch.cat([chosen, rejected])[:count].requires_grad_()
    out = resolved(batch(resolved, logps))
    (grad,) = torch.autograd.grad(out.loss, logps, allow_unused=True, materialize_grads=True)
    assert out.loss.dtype == dtype
    for value in (*out, grad):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(("name", "options", "eps"), ALL_CASES)
def test_an_empty_batch_has_no_loss_and_no_gradient(
    name: str, options: dict[str, object], eps: float
) -> None:
    resolved = build(name, sized(options, 0), eps)
    logps = torch.zeros(0, requires_grad=True)
    nll = torch.tensor(0.0, requires_grad=True)
    out = resolved(batch(resolved, logps, nll=nll))
    assert out.loss.item() == 0.0
    assert out.loss.requires_grad
    out.loss.backward()
    assert logps.grad is None or logps.grad.shape == (0,)
    assert nll.grad is None or nll.grad.item() == 0.0
    assert all(value.shape == (0,) for value in out[1:])


@pytest.mark.parametrize(("name", "options", "eps"), ALL_CASES)
def test_empty_sequences_never_give_nan(name: str, options: dict[str, object], eps: float) -> None:
    resolved = build(name, options, eps)
    logps = torch.zeros(8, requires_grad=True)
    out = resolved(batch(resolved, logps, lengths=torch.zeros(8, dtype=torch.int64)))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert logps.grad is None or torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(value).all() for value in out[1:])


@pytest.mark.parametrize(
    ("name", "options", "eps"),
    [case for case in ALL_CASES if OBJECTIVES[case[0]].layout != "unpaired"],
)
def test_interleaved_equals_concatenated(name: str, options: dict[str, object], eps: float) -> None:
    resolved = build(name, options, eps)
    generator = torch.Generator().manual_seed(0)
    logps = -10 * torch.rand(8, dtype=torch.float64, generator=generator)
    refs = -10 * torch.rand(8, dtype=torch.float64, generator=generator)
    lengths = torch.arange(8)
    ranks = resolved.num_candidates
    expected = resolved(batch(resolved, logps, refs, lengths=lengths))
    got = resolved(
        batch(
            resolved,
            interleave(logps, ranks),
            interleave(refs, ranks),
            lengths=interleave(lengths, ranks),
            pairs="interleaved",
        )
    )
    assert_same(got, expected)
    torch.testing.assert_close(expected.chosen_logps, logps[: 8 // ranks], rtol=0, atol=0)
    torch.testing.assert_close(expected.rejected_logps, logps[8 // ranks :], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options", "eps"), ALL_CASES)
def test_gradcheck(name: str, options: dict[str, object], eps: float) -> None:
    resolved = build(name, options, eps)
    logps = -torch.linspace(1.0, 9.3, 8, dtype=torch.float64)[
        torch.tensor([3, 0, 6, 1, 4, 7, 2, 5])
    ]
    refs = logps + torch.sin(torch.arange(8.0, dtype=torch.float64) + 0.4)
    nll = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logps, nll: resolved(batch(resolved, logps, refs, nll=nll)).loss,
        (logps.requires_grad_(), nll),
    )


@pytest.mark.parametrize(
    ("name", "options", "eps"),
    [case for case in ALL_CASES if OBJECTIVES[case[0]].layout != "unpaired"],
)
def test_nothing_is_read_on_the_host(name: str, options: dict[str, object], eps: float) -> None:
    """On the meta device there are no values: `.item()`, `bool()` and masks as an index raise."""
    moved = {
        key: value.to("meta") if isinstance(value, Tensor) else value
        for key, value in options.items()
    }
    resolved = build(name, moved, eps)
    logps = torch.empty(8, device="meta", requires_grad=True)
    nll = torch.empty((), device="meta", requires_grad=True)
    resolved(batch(resolved, logps, nll=nll)).loss.backward()


@pytest.mark.parametrize("name", PAIRS)
def test_traces_without_a_graph_break(name: str) -> None:
    options, eps = CASES[name][-1]
    resolved = build(name, options, eps)
    logps = -torch.arange(1.0, 9.0)
    torch._dynamo.reset()
    compiled = torch.compile(resolved, backend="eager", fullgraph=True)
    assert_same(compiled(batch(resolved, logps)), resolved(batch(resolved, logps)))


@pytest.mark.parametrize(("name", "options", "eps"), ALL_CASES)
def test_rewards(name: str, options: dict[str, object], eps: float) -> None:
    resolved = build(name, options, eps)
    logps, refs = -torch.arange(1.0, 9.0).requires_grad_(), -torch.arange(8.0).flip(0)
    lengths = torch.arange(8)
    out = resolved(batch(resolved, logps, refs, lengths=lengths))
    expected = 0.3 * (logps - refs if resolved.has_reference else logps)
    if name in ("simpo", "orpo"):  # their reward is per token
        expected = expected / lengths.clamp(min=1)
    if resolved.layout == "unpaired":
        desirable = options["desirable"]
        chosen, rejected = expected[desirable], expected[~desirable]
    else:
        chosen, rejected = expected.split(
            [8 // resolved.num_candidates, 8 - 8 // resolved.num_candidates]
        )
    torch.testing.assert_close(out.chosen_rewards, chosen.detach())
    torch.testing.assert_close(out.rejected_rewards, rejected.detach())
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "orpo"])
def test_averages_are_not_divided_again(name: str) -> None:
    options = {"length_normalized": True} if name == "ipo" else {}
    resolved = build(name, options)
    lengths = torch.tensor([3, 5, 2, 7])
    sums, refs = torch.tensor([-3.0, -9.0, -2.5, -4.0]), torch.tensor([-2.0, -8.0, -3.0, -5.0])
    expected = resolved(batch(resolved, sums, refs, lengths=lengths))
    got = resolved(batch(resolved, sums / lengths, refs / lengths, lengths=lengths, averaged=True))
    torch.testing.assert_close(got.loss, expected.loss)


def test_a_policy_equal_to_its_reference_has_a_loss_of_exactly_ln_2() -> None:
    logps = -torch.rand(6) * 300
    for name, options in [("sigmoid", {}), ("plackett_luce", {"num_candidates": 2})]:
        out = build(name, options)
        assert (
            out(batch(out, logps, logps.clone())).loss.item() == torch.tensor(math.log(2.0)).item()
        )


def test_no_gradient_reaches_the_reference_and_the_detached_terms() -> None:
    logps = -torch.arange(1.0, 5.0).requires_grad_()
    refs, kl, offset, weights = (torch.ones(n, requires_grad=True) for n in (4, 1, 2, 4))
    kto = build("kto", {"desirable": torch.tensor([True, True, False, False]), "kl": kl})
    odpo = build("odpo", {"offset": offset, "use_weighting": True})
    loss = kto(batch(kto, logps, refs)).loss + odpo(batch(odpo, logps, refs, weights=weights)).loss
    leaves = (refs, kl, offset, weights)
    assert torch.autograd.grad(loss, leaves, allow_unused=True) == (None,) * 4


# --- particular objectives ------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["concatenated", "interleaved"])
def test_plackett_luce_of_two_is_sigmoid_to_the_bit(pairs: str) -> None:
    logps, refs = (-torch.rand(2, 10) * 200).requires_grad_().unbind(0)
    ranked, paired = build("plackett_luce", {"num_candidates": 2}), build("sigmoid", {})
    outputs = [f(batch(f, logps, refs.detach(), pairs=pairs)) for f in (ranked, paired)]
    for got, expected in zip(*outputs, strict=True):
        assert torch.equal(got, expected)


def test_plackett_luce_prefers_the_better_order() -> None:
    resolved = build("plackett_luce", {"num_candidates": 3})
    ranked, reversed_ = torch.tensor([5.0, 0.0, -5.0]), torch.tensor([-5.0, 0.0, 5.0])
    assert resolved(batch(resolved, ranked)).loss < resolved(batch(resolved, reversed_)).loss
    uniform = resolved(batch(resolved, torch.zeros(3))).loss
    torch.testing.assert_close(uniform, torch.tensor(math.log(6.0)))


def test_kto_without_kl_is_apo_zero_on_single_answers() -> None:
    logps, refs = -torch.arange(1.0, 7.0), -torch.arange(6.0).flip(0)
    kto = build("kto", {"desirable": torch.arange(6) < 3, "kl": 0.0})
    apo = build("apo_zero", {})
    torch.testing.assert_close(
        2 * kto(batch(kto, logps, refs)).loss, apo(batch(apo, logps, refs)).loss
    )


def test_orpo_at_certain_answers() -> None:
    """A probability of exactly 1 has finite odds and pulls the loss the right way."""
    resolved = build("orpo", {})
    certain, unsure = torch.tensor([0.0]), torch.tensor([-3.0])
    nll = torch.tensor(0.0)
    good = resolved(batch(resolved, torch.cat([certain, unsure]), nll=nll)).loss
    bad = resolved(batch(resolved, torch.cat([unsure, certain]), nll=nll)).loss
    assert 0 <= good < 1e-3 < 1 < bad < 100


@pytest.mark.parametrize("average", [-1e-5, -1e-3, -0.5, -0.7, -5.0, -15.0])
def test_orpo_odds_are_accurate_in_fp32(average: float) -> None:
    """Near a = 0 a direct 1 − e^a keeps few of fp32's digits."""
    resolved = build("orpo", {})
    even = -math.log(2.0)  # odds of 1
    logps = 5 * torch.tensor([even, average])
    got = resolved(batch(resolved, logps, nll=torch.tensor(0.0))).loss.item()
    log_odds = average - math.log(-math.expm1(average))
    assert got == pytest.approx(0.3 * math.log1p(math.exp(log_odds)), rel=2e-6)


def test_f_divergences_agree_where_they_meet() -> None:
    """The α-divergence is the forward KL at α = 0 and the reverse KL at α = 1."""
    logps = torch.tensor([-3.0, -1.0, -2.0, -4.0], dtype=torch.float64)
    refs = torch.tensor([-2.5, -1.5, -1.0, -4.5], dtype=torch.float64)

    def loss(**options: object) -> Tensor:
        resolved = build("sigmoid", options)
        return resolved(batch(resolved, logps, refs)).loss

    alpha = {"f_divergence": "alpha_divergence"}
    torch.testing.assert_close(
        loss(**alpha, f_alpha_divergence_coef=0.0), loss(f_divergence="forward_kl")
    )
    torch.testing.assert_close(
        loss(**alpha, f_alpha_divergence_coef=1.0 + 1e-5), loss(), rtol=1e-4, atol=0
    )
    assert loss(**alpha, f_alpha_divergence_coef=1.0).equal(loss())
    assert not build("sigmoid", {**alpha, "f_alpha_divergence_coef": 0.5}).fused_sigmoid
    assert build("sigmoid", {**alpha, "f_alpha_divergence_coef": 1.0}).fused_sigmoid


# --- sums, NLL, weights ---------------------------------------------------------------------------


def test_weighted_sum() -> None:
    logps, refs = -torch.rand(8, dtype=torch.float64) * 9, -torch.rand(8, dtype=torch.float64) * 9
    parts = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    nll = torch.tensor(2.5, dtype=torch.float64)

    def loss(objective: object, eps: float = 0.1, **options: object) -> Tensor:
        resolved = resolve(
            objective, beta=0.3, label_smoothing=eps, has_reference=True, options=options
        )
        return resolved(batch(resolved, logps, refs, nll=nll)).loss

    single = {name: loss(name, 0.1 if name == "sigmoid" else 0.0) for name in parts}
    expected = sum(weight * single[name] for name, weight in parts.items())
    torch.testing.assert_close(loss(parts), expected)
    torch.testing.assert_close(loss(list(parts), loss_weights=list(parts.values())), expected)
    torch.testing.assert_close(loss(list(parts)), sum(single.values()))
    # An option goes to the part that has it.
    torch.testing.assert_close(
        loss(["sigmoid", "bco_pair"], delta=0.5),
        single["sigmoid"] + loss("bco_pair", 0.0, delta=0.5),
    )


@pytest.mark.parametrize("key", ["sft_weight", "rpo_alpha"])
@pytest.mark.parametrize("name", PAIRS)
def test_nll_term(name: str, key: str) -> None:
    options, eps = CASES[name][0]
    logps = -torch.rand(8)
    nll = torch.tensor(2.5, requires_grad=True)
    plain, with_nll = build(name, options, eps), build(name, {**options, key: 0.25}, eps)
    assert with_nll.needs_nll
    difference = (
        with_nll(batch(with_nll, logps, nll=nll)).loss - plain(batch(plain, logps, nll=nll)).loss
    )
    torch.testing.assert_close(difference, 0.25 * nll)
    assert torch.autograd.grad(difference, nll)[0].item() == pytest.approx(0.25)


def test_who_needs_nll() -> None:
    needing = {name for name in PAIRS if build(name, *CASES[name][0]).needs_nll}
    assert needing == {"sft", "cpo", "orpo"}
    assert not build("cpo", {"cpo_alpha": 0.0}).needs_nll
    assert not build("sigmoid", {"sft_weight": 0.0}).needs_nll


@pytest.mark.parametrize("pairs", ["concatenated", "interleaved"])
def test_wpo_multiplies_each_pair_by_its_two_weights(pairs: str) -> None:
    resolved, plain = build("sigmoid", {"use_weighting": True}), build("sigmoid", {})
    assert resolved.wpo
    logps = -torch.rand(4, dtype=torch.float64) * 5
    weights = torch.tensor([0.5, 0.25, 2.0, 3.0], dtype=torch.float64)
    chosen, rejected = ([0, 1], [2, 3]) if pairs == "concatenated" else ([0, 2], [1, 3])
    expected = 0.0
    for w, lo in zip(chosen, rejected, strict=True):
        expected += weights[w] * weights[lo] * plain(batch(plain, logps[[w, lo]])).loss / 2
    got = resolved(batch(resolved, logps, weights=weights, pairs=pairs)).loss
    torch.testing.assert_close(got, expected)


def test_wpo_weights() -> None:
    offsets = torch.tensor([0, 2, 2, 5, 6])
    logps = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.25, -0.75], requires_grad=True)
    log_sum_sq_probs = torch.tensor([-0.5, -1.0, -0.2, -2.0, -0.1, -1.0])
    weights = wpo_weights(logps, log_sum_sq_probs, offsets)
    expected = [math.exp((-0.5 - 1.0) / 2), 1.0, math.exp((-0.3 - 1.0 - 0.15) / 3), math.exp(0.25)]
    assert weights.tolist() == pytest.approx(expected)
    assert not weights.requires_grad
    assert wpo_weights(logps[:0], logps[:0], torch.tensor([0, 0, 0])).tolist() == [1.0, 1.0]


def test_wpo_weight_of_a_sequence_does_not_depend_on_the_others() -> None:
    logps, collision = torch.tensor([-1.0, -2.0, -math.inf]), torch.tensor([-0.5, -0.5, -0.5])
    weights = wpo_weights(logps, collision, torch.tensor([0, 2, 3]))
    assert weights.tolist() == pytest.approx([math.exp(-1.0), 0.0])
    alone = wpo_weights(logps[:2], collision[:2], torch.tensor([0, 2]))
    assert alone[0].equal(weights[0])


@pytest.mark.parametrize("pairs", ["concatenated", "interleaved"])
def test_ld_token_weights(pairs: str) -> None:
    # Pairs of lengths (3, 1) and (0, 2), laid out either way.
    lengths = [3, 0, 1, 2] if pairs == "concatenated" else [3, 1, 0, 2]
    shared = [1, 0, 1, 0] if pairs == "concatenated" else [1, 1, 0, 0]
    rows = [(s, t) for s, length in enumerate(lengths) for t in range(length)]
    ids, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    weights = ld_token_weights(torch.tensor(lengths), positions, ids, 0.25, pairs=pairs)
    assert weights.tolist() == [1.0 if t < shared[s] else 0.25 for s, t in rows]
    assert weights.dtype == torch.float32
    every = ld_token_weights(
        torch.tensor(lengths), positions, ids, 1.0, pairs=pairs, dtype=torch.float64
    )
    assert every.equal(torch.ones(6, dtype=torch.float64))
    none = torch.zeros(0, dtype=torch.int64)
    assert ld_token_weights(none, none, none, 0.5, pairs=pairs).shape == (0,)


def test_running_mean_is_the_mean_of_all_rewards_seen() -> None:
    running = RunningMean()
    assert running(torch.zeros(0)).item() == 0.0
    seen: list[float] = []
    for rewards in ([1.0, 2.0, 6.0], [-4.0], [0.5, 0.5]):
        seen += rewards
        assert running(torch.tensor(rewards)).item() == pytest.approx(sum(seen) / len(seen))
    running.eval()
    assert running(torch.tensor([100.0])).item() == pytest.approx(1.0)
    restored = RunningMean()
    restored.load_state_dict(running.state_dict())
    assert restored(torch.tensor([8.0])).item() == pytest.approx(14.0 / 7)


def test_running_mean_gives_values_that_later_updates_leave_alone() -> None:
    running = RunningMean()
    first = running(torch.tensor([1.0], requires_grad=True))
    running(torch.tensor([3.0]))
    assert first.item() == 1.0
    assert not first.requires_grad


def test_kl_estimate() -> None:
    logps = torch.tensor([-1.0, -4.0], requires_grad=True)
    estimate = kl_estimate(logps, torch.tensor([-2.0, -3.5]))
    assert estimate.item() == pytest.approx(0.25)
    assert not estimate.requires_grad
    assert kl_estimate(logps[:0], logps[:0]).item() == 0.0


# --- what is fused, what is documented ------------------------------------------------------------


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_only_the_plain_sigmoid_is_fused(name: str) -> None:
    assert build(name, *CASES[name][0]).fused_sigmoid == (name == "sigmoid")


def test_what_keeps_sigmoid_from_being_fused() -> None:
    assert build("sigmoid", {}, 0.1).fused_sigmoid
    assert build("sigmoid", {"f_divergence": "reverse_kl", "sft_weight": 0.0}).fused_sigmoid
    assert build("sigmoid", {"ld_alpha": None, "use_weighting": False}).fused_sigmoid
    for options in ({"sft_weight": 0.1}, {"ld_alpha": 0.5}, {"use_weighting": True}):
        assert not build("sigmoid", options).fused_sigmoid
    for objective in (["sigmoid", "hinge"], {"sigmoid": 0.5}):
        resolved = resolve(objective, beta=0.1, has_reference=True, options={})
        assert not resolved.fused_sigmoid
    assert resolve(["sigmoid"], beta=0.1, has_reference=True, options={}).fused_sigmoid
    assert resolve({"sigmoid": 1}, beta=0.1, has_reference=False, options={}).fused_sigmoid


def test_the_table_lists_exactly_the_registry() -> None:
    table = markdown_table()
    own, common = table.split("| option |")
    rows = [line.split("|")[1].strip() for line in own.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(OBJECTIVES)
    rows = [line.split("`")[1] for line in common.splitlines() if line.startswith("| `")]
    assert rows == list(COMMON_OPTIONS)
    for entry in OBJECTIVES.values():
        assert entry.formula in table
        assert entry.paper in table
        assert all(f"`{option.name}`" in table for option in entry.options)
    columns = {line.count("|") - line.count("\\|") for line in own.splitlines() if line[:1] == "|"}
    assert columns == {8}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_entry_says_where_it_comes_from(name: str) -> None:
    entry = OBJECTIVES[name]
    assert entry.fn.__doc__
    assert "arXiv" in entry.paper
    assert "|" not in entry.formula
    for option in entry.options:
        assert option.doc
        assert option.name not in COMMON_OPTIONS
