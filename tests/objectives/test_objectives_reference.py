"""Every registered objective against an independent transcription of its formula.

The transcriptions are plain Python, written from the papers, one sequence or pair at a time, on
numbers of 60 digits or more: no form of a formula is less accurate than another there, and
differences over steps of a third of the digits are gradients. They share nothing with the package
but the names.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from mpmath import mp, mpf

from fastdpo.objectives import OBJECTIVES, SequenceLogps, resolve

mp.dps = 60

# --- the formulae ---------------------------------------------------------------------------------


# e^(-2000) is less than the last of 450 digits of 1.
_SATURATED = 2000


def log_sigmoid(x: mpf) -> mpf:
    return min(x, 0) if abs(x) > _SATURATED else -mp.log(1 + mp.exp(-x))


def sigmoid(x: mpf) -> mpf:
    return mpf(x > 0) if abs(x) > _SATURATED else 1 / (1 + mp.exp(-x))


@dataclass
class Sample:
    """One batch in the concatenated layout."""

    logps: list[mpf]
    refs: list[mpf]
    lengths: list[int]
    nll: mpf
    beta: float
    eps: float = 0.0
    score: Callable[[float], float] = lambda log_ratio: log_ratio
    options: dict[str, object] = field(default_factory=dict)

    def ratio(self, i: int) -> mpf:
        return self.logps[i] - self.refs[i]

    def pairs(self) -> list[tuple[int, int]]:
        half = len(self.logps) // 2
        return [(i, half + i) for i in range(half)]

    def mean_over_pairs(self, loss: Callable[[int, int], float]) -> mpf:
        return sum(loss(w, lo) for w, lo in self.pairs()) / len(self.pairs())

    def margin(self, w: int, lo: int) -> mpf:
        return self.score(self.ratio(w)) - self.score(self.ratio(lo))

    def mean_margin(self, w: int, lo: int) -> mpf:
        chosen = self.score(self.ratio(w)) / max(1, self.lengths[w])
        return chosen - self.score(self.ratio(lo)) / max(1, self.lengths[lo])

    def average(self, i: int) -> mpf:
        return self.logps[i] / max(1, self.lengths[i])


def conservative(z: float, eps: mpf) -> mpf:
    return -(1 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z)


def ref_sigmoid(s: Sample) -> mpf:
    return s.mean_over_pairs(lambda w, lo: conservative(s.beta * s.margin(w, lo), s.eps))


def ref_hinge(s: Sample) -> mpf:
    return s.mean_over_pairs(lambda w, lo: max(0.0, 1 - s.beta * s.margin(w, lo)))


def ref_ipo(s: Sample) -> mpf:
    margin = s.mean_margin if s.options.get("length_normalized") else s.margin
    return s.mean_over_pairs(lambda w, lo: (margin(w, lo) - 1 / (2 * s.beta)) ** 2)


def ref_exo_pair(s: Sample) -> mpf:
    def loss(w: int, lo: int) -> mpf:
        z = s.beta * s.margin(w, lo)
        chosen = sigmoid(z) * (log_sigmoid(z) - mp.log(1 - mpf(s.eps)))
        return chosen + sigmoid(-z) * (log_sigmoid(-z) - mp.log(s.eps))

    return s.mean_over_pairs(loss)


def ref_nca_pair(s: Sample) -> mpf:
    def loss(w: int, lo: int) -> mpf:
        chosen, rejected = s.beta * s.ratio(w), s.beta * s.ratio(lo)
        pull = -log_sigmoid(chosen)
        return pull - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2

    return s.mean_over_pairs(loss)


def ref_robust(s: Sample) -> mpf:
    def loss(w: int, lo: int) -> mpf:
        z = s.beta * s.margin(w, lo)
        return ((1 - s.eps) * -log_sigmoid(z) - s.eps * -log_sigmoid(-z)) / (1 - 2 * s.eps)

    return s.mean_over_pairs(loss)


def ref_bco_pair(s: Sample) -> mpf:
    delta = float(s.options.get("delta", 0.0))

    def loss(w: int, lo: int) -> mpf:
        return -log_sigmoid(s.beta * s.ratio(w) - delta) - log_sigmoid(delta - s.beta * s.ratio(lo))

    return s.mean_over_pairs(loss)


def ref_sppo_hard(s: Sample) -> mpf:
    target = 1 / (2 * s.beta)
    return s.mean_over_pairs(lambda w, lo: (s.ratio(w) - target) ** 2 + (s.ratio(lo) + target) ** 2)


def ref_aot(s: Sample) -> mpf:
    policy = sorted(s.logps[w] - s.logps[lo] for w, lo in s.pairs())
    reference = sorted(s.refs[w] - s.refs[lo] for w, lo in s.pairs())
    losses = [conservative(s.beta * (p - r), s.eps) for p, r in zip(policy, reference, strict=True)]
    return sum(losses) / len(losses)


def ref_aot_unpaired(s: Sample) -> mpf:
    chosen = sorted(s.ratio(w) for w, _ in s.pairs())
    rejected = sorted(s.ratio(lo) for _, lo in s.pairs())
    losses = [conservative(s.beta * (c - r), s.eps) for c, r in zip(chosen, rejected, strict=True)]
    return sum(losses) / len(losses)


def ref_apo_zero(s: Sample) -> mpf:
    return s.mean_over_pairs(
        lambda w, lo: 1 - sigmoid(s.beta * s.ratio(w)) + sigmoid(s.beta * s.ratio(lo))
    )


def ref_apo_down(s: Sample) -> mpf:
    return s.mean_over_pairs(
        lambda w, lo: (
            sigmoid(s.beta * s.ratio(w)) + 1 - sigmoid(s.beta * (s.ratio(w) - s.ratio(lo)))
        )
    )


def ref_discopop(s: Sample) -> mpf:
    tau = float(s.options.get("discopop_tau", 0.05))

    def loss(w: int, lo: int) -> mpf:
        z = s.beta * s.margin(w, lo)
        return mp.exp(log_sigmoid(z / tau) - z) - sigmoid(-z / tau) * log_sigmoid(z)

    return s.mean_over_pairs(loss)


def ref_sft(s: Sample) -> mpf:
    return s.nll


def ref_sigmoid_norm(s: Sample) -> mpf:
    return s.mean_over_pairs(lambda w, lo: -log_sigmoid(s.beta * s.mean_margin(w, lo)))


def ref_odpo(s: Sample) -> mpf:
    offset, alpha = s.options["offset"], float(s.options.get("offset_alpha", 1.0))

    def loss(w: int, lo: int) -> mpf:
        shift = float(offset[w]) if isinstance(offset, torch.Tensor) else float(offset)
        return -log_sigmoid(s.beta * s.ratio(w) - s.beta * s.ratio(lo) - alpha * shift)

    return s.mean_over_pairs(loss)


def ref_dpop(s: Sample) -> mpf:
    lam = float(s.options.get("dpop_lambda", 50.0))

    def loss(w: int, lo: int) -> mpf:
        penalty = max(0.0, s.refs[w] - s.logps[w])
        return -log_sigmoid(s.beta * (s.ratio(w) - s.ratio(lo) - lam * penalty))

    return s.mean_over_pairs(loss)


def ref_cal_dpo(s: Sample) -> mpf:
    weight, target = float(s.options.get("calibration_weight", 1.0)), 1 / (2 * s.beta)

    def loss(w: int, lo: int) -> mpf:
        calibration = (s.ratio(w) - target) ** 2 + (s.ratio(lo) + target) ** 2
        return -log_sigmoid(s.ratio(w) - s.ratio(lo)) + weight * calibration

    return s.mean_over_pairs(loss)


def ref_simpo(s: Sample) -> mpf:
    ratio = s.options.get("gamma_beta_ratio")
    gamma = float(s.options.get("gamma", 0.5)) if ratio is None else float(ratio) * s.beta
    return s.mean_over_pairs(
        lambda w, lo: conservative(s.beta * s.average(w) - s.beta * s.average(lo) - gamma, s.eps)
    )


def ref_cpo(s: Sample) -> mpf:
    alpha = float(s.options.get("cpo_alpha", 1.0))
    preference = s.mean_over_pairs(
        lambda w, lo: conservative(s.beta * (s.logps[w] - s.logps[lo]), s.eps)
    )
    return preference + alpha * s.nll


def ref_orpo(s: Sample) -> mpf:
    def odds(i: int) -> mpf:
        p = mp.exp(s.average(i))
        return p / (1 - p)

    preference = s.mean_over_pairs(lambda w, lo: -log_sigmoid(mp.log(odds(w) / odds(lo))))
    return s.nll + s.beta * preference


def ref_kto(s: Sample) -> mpf:
    z0 = max(0.0, float(s.options["kl"]))
    total = 0.0
    for i, good in enumerate(s.options["desirable"].tolist()):
        h = s.logps[i] - s.refs[i]
        if good:
            total += float(s.options.get("desirable_weight", 1.0)) * (
                1 - sigmoid(s.beta * (h - z0))
            )
        else:
            total += float(s.options.get("undesirable_weight", 1.0)) * (
                1 - sigmoid(s.beta * (z0 - h))
            )
    return total / len(s.logps)


def ref_bco(s: Sample) -> mpf:
    delta, density = float(s.options["delta"]), s.options.get("density_ratio")
    total = 0.0
    for i, good in enumerate(s.options["desirable"].tolist()):
        reward = s.beta * (s.logps[i] - s.refs[i])
        if good:
            total -= log_sigmoid(reward - delta)
        else:
            weight = 1.0 if density is None else float(density[i])
            total -= weight * log_sigmoid(delta - reward)
    return total / len(s.logps)


def ref_plackett_luce(s: Sample) -> mpf:
    ranks = int(s.options["num_candidates"])
    prompts = len(s.logps) // ranks
    total = 0.0
    for prompt in range(prompts):
        rewards = [s.beta * s.ratio(rank * prompts + prompt) for rank in range(ranks)]
        probability = 1.0
        for rank in range(ranks):
            probability *= mp.exp(rewards[rank]) / sum(mp.exp(r) for r in rewards[rank:])
        total -= mp.log(probability)
    return total / prompts


REFERENCES: dict[str, Callable[[Sample], float]] = {
    name.removeprefix("ref_"): fn for name, fn in list(globals().items()) if name.startswith("ref_")
}

# f' of each divergence, with f'(1) = 0.
SCORES: dict[str, Callable[[float, float], float]] = {
    "reverse_kl": lambda t, alpha: mp.log(t),
    "forward_kl": lambda t, alpha: 1 - 1 / t,
    "js_divergence": lambda t, alpha: mp.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t, alpha: (t ** (alpha - 1) - 1) / (alpha - 1),
}

# --- the cases ------------------------------------------------------------------------------------

_DESIRABLE = torch.tensor([True, False, False, True, True, False, True, False])
_DENSITY = torch.tensor([9.0, 0.5, 2.0, 9.0, 9.0, 1.5, 9.0, 3.0], dtype=torch.float64)
_OFFSET = torch.tensor([0.2, -0.4, 1.5, 0.0], dtype=torch.float64)

# Options and label smoothing of each objective; every option of every objective is used at least
# once.
CASES: dict[str, list[tuple[dict[str, object], float]]] = {
    "sigmoid": [({}, 0.0), ({}, 0.1), ({}, 0.49)],
    "hinge": [({}, 0.0)],
    "ipo": [({}, 0.0), ({"length_normalized": True}, 0.0)],
    "exo_pair": [({}, 1e-3), ({}, 0.3)],
    "nca_pair": [({}, 0.0)],
    "robust": [({}, 0.0), ({}, 0.2)],
    "bco_pair": [
        ({}, 0.0),
        ({"delta": 0.3}, 0.0),
        ({"delta": torch.tensor([-0.2], dtype=torch.float64)}, 0.0),
    ],
    "sppo_hard": [({}, 0.0)],
    "aot": [({}, 0.0), ({}, 0.1)],
    "aot_unpaired": [({}, 0.0), ({}, 0.1)],
    "apo_zero": [({}, 0.0)],
    "apo_down": [({}, 0.0)],
    "discopop": [({}, 0.0), ({"discopop_tau": 0.7}, 0.0), ({"discopop_tau": 3.0}, 0.0)],
    "sft": [({}, 0.0)],
    "sigmoid_norm": [({}, 0.0)],
    "odpo": [({"offset": 0.4}, 0.0), ({"offset": _OFFSET, "offset_alpha": 0.5}, 0.0)],
    "dpop": [({"dpop_lambda": 5.0}, 0.0), ({}, 0.0)],
    "cal_dpo": [({}, 0.0), ({"calibration_weight": 0.5}, 0.0)],
    "simpo": [({}, 0.0), ({"gamma": 1.2}, 0.1), ({"gamma_beta_ratio": 0.5}, 0.0)],
    "cpo": [({}, 0.0), ({"cpo_alpha": 0.0}, 0.1), ({"cpo_alpha": 0.3}, 0.0)],
    "orpo": [({}, 0.0)],
    "kto": [
        ({"desirable": _DESIRABLE, "kl": 0.4}, 0.0),
        ({"desirable": _DESIRABLE, "kl": torch.tensor(-0.4), "desirable_weight": 1.3}, 0.0),
        ({"desirable": _DESIRABLE, "kl": torch.tensor([0.5]), "undesirable_weight": 0.6}, 0.0),
    ],
    "bco": [
        ({"desirable": _DESIRABLE, "delta": 0.1}, 0.0),
        ({"desirable": _DESIRABLE, "delta": torch.tensor(0.25), "density_ratio": _DENSITY}, 0.0),
    ],
    "plackett_luce": [({"num_candidates": k}, 0.0) for k in (2, 4, 8)],
}
DIVERGENCES: list[tuple[str, float | None]] = [
    ("reverse_kl", None),
    ("forward_kl", None),
    ("js_divergence", None),
    ("alpha_divergence", None),
    ("alpha_divergence", -0.5),
    ("alpha_divergence", 0.9),
]


def make_sample(name: str, options: dict[str, object], eps: float, seed: int = 0) -> Sample:
    """Eight sequences; the log-ratios are of order 1, of both signs, and one sequence is empty."""
    rng = random.Random(f"{name}{seed}")
    lengths = [rng.randint(2, 7) for _ in range(8)]
    logps = [-length * rng.uniform(0.3, 2.0) for length in lengths]
    lengths[5] = 0
    refs = [logp + rng.gauss(0.0, 1.5) for logp in logps]
    if OBJECTIVES[name].reference == "refused":
        refs = [0.0] * 8
    logps, refs = [mpf(x) for x in logps], [mpf(x) for x in refs]
    return Sample(logps, refs, lengths, nll=mpf(1.7), beta=0.4, eps=eps, options=dict(options))


def compare(name: str, sample: Sample, options: dict[str, object]) -> None:
    refused = OBJECTIVES[name].reference == "refused"
    resolved = resolve(
        name,
        beta=sample.beta,
        label_smoothing=sample.eps,
        has_reference=not refused,
        options=options,
    )
    logps = torch.tensor([float(x) for x in sample.logps], dtype=torch.float64, requires_grad=True)
    refs = torch.tensor([float(x) for x in sample.refs], dtype=torch.float64)
    nll = torch.tensor(float(sample.nll), dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor(sample.lengths)
    out = resolved(SequenceLogps(logps, None if refused else refs, lengths, nll=nll))
    reference = REFERENCES[name]
    assert out.loss.item() == pytest.approx(float(reference(sample)), rel=1e-9, abs=1e-10)

    grad_logps, grad_nll = torch.autograd.grad(
        out.loss, (logps, nll), allow_unused=True, materialize_grads=True
    )
    for i, got in enumerate(grad_logps.tolist()):
        expected = float(difference(sample, reference, i))
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12), f"gradient of logps[{i}]"
    step = smallest_step()
    values = [reference(replace(sample, nll=sample.nll + sign * step)) for sign in (1, -1)]
    slope = float((values[0] - values[1]) / (2 * step))
    assert grad_nll.item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


def smallest_step() -> mpf:
    return mpf(10) ** -(mp.dps // 3)


def difference(
    sample: Sample, reference: Callable[[Sample], mpf], i: int, sides: tuple[int, int] = (1, -1)
) -> mpf:
    """∂/∂logps[i] from values on two sides of it; from one side with (1, 0) or (0, −1)."""
    step = max(abs(sample.logps[i]), mpf(10) ** -45) * smallest_step()
    values = []
    for side in sides:
        logps = list(sample.logps)
        logps[i] += side * step
        values.append(reference(replace(sample, logps=logps)))
    return (values[0] - values[1]) / ((sides[0] - sides[1]) * step)


# --- the tests ------------------------------------------------------------------------------------


def test_every_objective_and_every_option_has_a_transcription() -> None:
    assert set(REFERENCES) == set(OBJECTIVES)
    assert set(CASES) == set(OBJECTIVES)
    for name, entry in OBJECTIVES.items():
        used = {option for options, _ in CASES[name] for option in options}
        assert used == {option.name for option in entry.options}, name
        assert any(eps > 0 for _, eps in CASES[name]) == (entry.label_smoothing is not None), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "options", "eps"),
    [(name, options, eps) for name, cases in CASES.items() for options, eps in cases],
)
def test_value_and_gradient(name: str, options: dict[str, object], eps: float, seed: int) -> None:
    compare(name, make_sample(name, options, eps, seed), options)


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
@pytest.mark.parametrize(
    ("name", "options", "eps"),
    [
        (name, *case)
        for name, cases in CASES.items()
        if OBJECTIVES[name].f_divergence != "refused"
        for case in cases
    ],
)
def test_value_and_gradient_with_f_divergence(
    name: str, options: dict[str, object], eps: float, divergence: str, alpha: float | None
) -> None:
    sample = make_sample(name, options, eps)
    sample.score = lambda h: SCORES[divergence](mp.exp(h), 0.5 if alpha is None else alpha)
    extra = {"f_divergence": divergence, "f_alpha_divergence_coef": alpha}
    compare(name, sample, {**options, **extra})
