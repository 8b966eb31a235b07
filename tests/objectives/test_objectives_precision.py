"""Every objective in fp32, wherever the right result is an fp32 number.

Log-probabilities from −0 over the smallest fp32 numbers to −1e4, log-ratios from −1e4 to 1e4:
values and gradients against the transcriptions of `test_objectives_reference`, at as many digits as
e^(1e4) and 1 − e^(−1e-45) need.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import pytest
import torch
from mpmath import mp, mpf
from test_objectives_reference import (
    CASES,
    DIVERGENCES,
    REFERENCES,
    SCORES,
    Sample,
    difference,
)

from fastdpo.objectives import OBJECTIVES, SequenceLogps, resolve

FP32 = torch.finfo(torch.float32)
SUBNORMAL = FP32.smallest_normal * FP32.eps
# What a loss is at most, see fastdpo.objectives.precision.
LARGEST_LOSS = FP32.max * 2.0**-16
LOGPS = (-0.0, -1e-45, -1e-38, -1e-20, -4e-8, -1e-3, -0.6931472, -3.0, -17.0, -60.0, -104.0)
LOGPS = (*LOGPS, -250.0, -1e3, -1e4)
RATIOS = (-1e4, -300.0, -95.0, -82.0, -38.0, -17.5, -1.5, -1e-7, 0.0, 1e-20, 0.7, 20.0, 84.0, 1e4)
# Of a divergence: e^(power · ratio) up to e^270, see fastdpo.objectives.precision.
MOST = 180.0
POINTS = 32
# Gradients of these are differences of terms of order 1, of which fp64 keeps so much.
CANCELS = {"apo_down": 1e-16, "plackett_luce": 1e-12}
BETA = 0.3
CASES_OF_ALL = [
    (name, options, eps, divergence, alpha)
    for name, cases in CASES.items()
    for options, eps in cases
    for divergence, alpha in (*DIVERGENCES, ("alpha_divergence", 1.0 + 1e-7))
    if divergence == "reverse_kl" or OBJECTIVES[name].f_divergence == "composes"
]


def points(count: int, most: float, key: str) -> Iterator[tuple[list[float], list[float]]]:
    """fp32 log-probabilities and references of `count` sequences, small and large in all
    combinations."""
    rng = random.Random(key)
    for index in range(POINTS):
        logps = [rng.choice(LOGPS) for _ in range(count)]
        if index % 2:
            refs = [0.0] * count
        else:
            # As far below 0 as it takes for both to be log-probabilities.
            ratios = [rng.choice(RATIOS) for _ in range(count)]
            logps = [min(logp, ratio) for logp, ratio in zip(logps, ratios, strict=True)]
            refs = [logp - ratio for logp, ratio in zip(logps, ratios, strict=True)]
        logps = [max(logp, ref - most) for logp, ref in zip(logps, refs, strict=True)]
        refs = [max(ref, logp - most) for logp, ref in zip(logps, refs, strict=True)]
        if key.startswith("orpo"):
            logps = [min(logp, -1e-45) for logp in logps]  # 0 is singular, see below
        yield torch.tensor(logps).tolist(), torch.tensor(refs).tolist()


def fits(options: dict[str, object], count: int) -> dict[str, object]:
    """One sequence, one pair or one prompt of the per-row options."""
    rows = {key: options[key] for key in ("offset", "desirable", "density_ratio") if key in options}
    cut = {key: v[:1] for key, v in rows.items() if isinstance(v, torch.Tensor) and v.dim() == 1}
    return {**options, **cut}


@pytest.mark.parametrize(("name", "options", "eps", "divergence", "alpha"), CASES_OF_ALL)
def test_fp32_is_right_wherever_the_result_is_an_fp32_number(name, options, eps, divergence, alpha):
    entry = OBJECTIVES[name]
    count = {"pairs": 2, "unpaired": 1, "ranked": int(options.get("num_candidates", 0))}
    count = count[entry.layout]
    refused = entry.reference == "refused"
    extra = {"f_divergence": divergence, "f_alpha_divergence_coef": alpha}
    desirables = [torch.tensor([True]), torch.tensor([False])] if count == 1 else [None]
    plain = divergence == "reverse_kl"
    batches = points(count, math.inf if plain else MOST, f"{name}{divergence}{alpha}{options}")
    with mp.workdps(150 if plain else 450):
        for index, (logps, refs) in enumerate(batches):
            given = fits(options, count)
            if count == 1:
                given["desirable"] = desirables[index // 2 % 2]
            resolved = resolve(
                name,
                beta=BETA,
                label_smoothing=eps,
                has_reference=not refused,
                options={**given, **extra},
            )
            sample = Sample(
                [mpf(x) for x in logps],
                [mpf(0.0 if refused else x) for x in refs],
                [3, 2] * (count // 2) or [3],
                nll=mpf(1.5),
                beta=BETA,
                eps=eps,
                options=given,
            )
            if divergence != "reverse_kl":
                power = 0.5 if alpha is None else alpha
                sample.score = lambda h: SCORES[divergence](mp.exp(h), power)  # noqa: B023
            check(resolved, sample, name, refused, logps, refs)


def check(resolved, sample, name, refused, logps, refs):
    reference, floor = REFERENCES[name], CANCELS.get(name, 2 * SUBNORMAL)
    leaf = torch.tensor(logps, requires_grad=True)
    out = resolved(
        SequenceLogps(
            leaf,
            None if refused else torch.tensor(refs),
            torch.tensor(sample.lengths),
            nll=torch.tensor(1.5),
        )
    )
    (grad,) = torch.autograd.grad(out.loss, leaf, allow_unused=True, materialize_grads=True)
    where = f"logps {logps}, refs {refs}"
    assert_near(out.loss.item(), [reference(sample)], LARGEST_LOSS, 2 * SUBNORMAL, where)
    for i, got in enumerate(grad.tolist()):
        # At a kink either side's derivative is right.
        sides = ((1, -1), (1, 0), (0, -1))
        slopes = (difference(sample, reference, i, side) for side in sides)
        assert_near(got, slopes, FP32.max, floor, f"gradient of logps[{i}] at {where}")


def assert_near(got: float, expected: Iterable[mpf], most: float, floor: float, where: str) -> None:
    tried = []
    for value in expected:
        right = float(min(max(value, -most), most))
        tried.append(right)
        if abs(got - right) <= 4 * FP32.eps * abs(right) + floor:
            return
    raise AssertionError(f"{got} is none of {tried}: {where}")


@pytest.mark.parametrize("average", [False, True])
def test_orpo_of_a_sure_model(average):
    """One token, the chosen one leads by 1 logit, the rejected one by 17."""
    leads = torch.tensor([1.0, 17.0], requires_grad=True)
    logps = torch.nn.functional.logsigmoid(leads)
    resolved = resolve("orpo", beta=0.1, has_reference=False, options={})
    out = resolved(
        SequenceLogps(logps, None, torch.tensor([1, 1]), nll=-logps[0], averaged=average)
    )
    (grad,) = torch.autograd.grad(out.loss, leads)
    assert out.loss.item() == pytest.approx(1.9132617, rel=1e-6)
    assert grad[1].item() == pytest.approx(0.1 / (1 + math.exp(-16)), rel=1e-6)


def test_orpo_at_a_probability_of_1_is_finite_and_pulls_no_further():
    resolved = resolve("orpo", beta=0.1, has_reference=False, options={})
    for dtype, odds in ((torch.float32, 149 * math.log(2)), (torch.float64, 1022 * math.log(2))):
        for given in ([-1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [-1.0, 1e-9]):
            logps = torch.tensor(given, dtype=dtype, requires_grad=True)
            nll = torch.zeros((), dtype=dtype)
            out = resolved(SequenceLogps(logps, None, torch.tensor([1, 1]), nll=nll))
            (grad,) = torch.autograd.grad(out.loss, logps)
            other = -1.0 - math.log(-math.expm1(-1.0))
            at = [odds if logp >= 0 else other for logp in given]
            right = 0.1 * math.log1p(math.exp(at[1] - at[0])) if at[1] - at[0] < 700 else None
            right = 0.1 * (at[1] - at[0]) if right is None else right
            assert out.loss.item() == pytest.approx(right, rel=1e-6, abs=1e-37)
            assert grad.isfinite().all()
            assert all(g == 0 for g, logp in zip(grad.tolist(), given, strict=True) if logp >= 0)


@pytest.mark.parametrize(("name", "options", "eps", "divergence", "alpha"), CASES_OF_ALL)
def test_an_impossible_answer_gives_no_nan(name, options, eps, divergence, alpha):
    """A log-probability of −∞: the loss is its limit, 0 or a constant or infinite, and so is the
    gradient, of which fp32 has the largest number at most."""
    layout = OBJECTIVES[name].layout
    count = {"pairs": 2, "unpaired": 1, "ranked": int(options.get("num_candidates", 0))}[layout]
    refused = OBJECTIVES[name].reference == "refused"
    resolved = resolve(
        name,
        beta=BETA,
        label_smoothing=eps,
        has_reference=not refused,
        options={
            **fits(options, count),
            "f_divergence": divergence,
            "f_alpha_divergence_coef": alpha,
        },
    )
    lengths = torch.full((count,), 2)
    for impossible in range(count):
        given = torch.full((count,), -3.0)
        given[impossible] = -math.inf
        near = given.clamp(min=-1e4)
        found = []
        for logps in (given, near):
            logps = logps.clone().requires_grad_()
            refs = None if refused else torch.full((count,), -2.0)
            out = resolved(SequenceLogps(logps, refs, lengths, nll=torch.tensor(1.0)))
            (grad,) = torch.autograd.grad(
                out.loss, logps, allow_unused=True, materialize_grads=True
            )
            assert not out.loss.isnan(), (impossible, logps)
            assert grad.isfinite().all(), (impossible, logps, grad)
            found.append((out.loss, grad))
        (loss, grad), (near_loss, near_grad) = found
        # Where the loss has a limit it is that of a very unlikely answer.
        if near_loss.abs() < 100:
            torch.testing.assert_close(loss, near_loss)
            others = torch.arange(count) != impossible
            torch.testing.assert_close(grad[others], near_grad[others])
        else:
            assert loss.abs() > 100
            assert loss.sign() == near_loss.sign()


def test_what_weighs_nothing_adds_nothing_to_a_sum():
    """0 · ∞ of an impossible answer, in a sum of objectives and in WPO."""
    logps = torch.tensor([-1.0, -math.inf, -3.0, -2.0], requires_grad=True)
    refs, lengths = torch.full((4,), -2.0), torch.tensor([2, 2, 2, 2])
    both = resolve({"hinge": 0.0, "apo_zero": 1.0}, beta=BETA, has_reference=True, options={})
    alone = resolve("apo_zero", beta=BETA, has_reference=True, options={})
    batch = SequenceLogps(logps, refs, lengths)
    assert both(batch).loss.equal(alone(batch).loss)
    weighted = resolve("sigmoid", beta=BETA, has_reference=True, options={"use_weighting": True})
    weights = torch.tensor([0.5, 0.0, 1.0, 1.0])
    loss = weighted(SequenceLogps(logps, refs, lengths, weights=weights)).loss
    (grad,) = torch.autograd.grad(loss, logps)
    margin = BETA * ((-1.0 + 2.0) - (-3.0 + 2.0))
    assert loss.item() == pytest.approx(0.25 * math.log1p(math.exp(-margin)), rel=1e-6)
    assert grad[1] == grad[3] == 0
    nothing = resolve({"hinge": 0.0}, beta=BETA, has_reference=True, options={})(batch).loss
    nothing.backward()
    assert nothing == 0
    assert logps.grad.equal(torch.zeros(4))


def test_divergences_keep_their_order_where_no_float_holds_the_scores():
    """exp(9,000) and exp(10,000) are infinite in any float; their difference has a sign, which the
    loss and its gradient follow."""
    for alpha in (-0.5, 0.0, 0.5, 2.0):
        options = {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        resolved = resolve("sigmoid", beta=BETA, has_reference=True, options=options)
        far, further = (-9e3, -1e4) if alpha < 1 else (1e4, 9e3)  # of the higher and lower score
        for chosen, rejected in ((far, further), (further, far)):
            refs = torch.tensor([-2e4, -2e4])
            logps = (refs + torch.tensor([chosen, rejected])).requires_grad_()
            loss = resolved(SequenceLogps(logps, refs, torch.tensor([2, 2]))).loss
            (grad,) = torch.autograd.grad(loss, logps)
            assert loss.isfinite()
            assert grad.isfinite().all()
            if chosen == far:
                assert loss == 0
                assert grad.equal(torch.zeros(2))
            else:
                assert loss > 1e33
                assert grad[0] < 0 < grad[1]
