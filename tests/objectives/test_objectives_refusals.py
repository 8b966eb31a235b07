"""The registry of objectives: what it refuses, and in which words."""

from __future__ import annotations

import math

import pytest
import torch
from test_objectives import batch, build
from test_objectives_reference import CASES

from fastdpo import objectives
from fastdpo.objectives import (
    COMMON_OPTIONS,
    OBJECTIVES,
    SequenceLogps,
    resolve,
)


def refuses(match: str, objective: object = "sigmoid", **arguments: object) -> None:
    settings = {"beta": 0.1, "label_smoothing": 0.0, "has_reference": True, "options": {}}
    with pytest.raises(ValueError, match=match):
        resolve(objective, **{**settings, **arguments})


def test_unknown_objective_lists_the_names() -> None:
    refuses("unknown objective 'dpo'; there are sigmoid, hinge, ipo.*bco", "dpo")
    refuses("unknown objective 'dpo'", ["sigmoid", "dpo"])
    refuses("unknown objective 3", [3])
    for nothing in ("", [], {}, None, 3):
        refuses("objective", nothing)


def test_options_of_others_and_unknown_options() -> None:
    refuses(
        "discopop_tau belongs to discopop; hinge does not", "hinge", options={"discopop_tau": 1.0}
    )
    refuses("delta belongs to bco_pair, bco; sigmoid does", options={"delta": 1.0})
    refuses(
        "unknown option 'gama'; simpo takes gamma, gamma_beta_ratio, f_div",
        "simpo",
        has_reference=False,
        options={"gama": 1.0},
    )


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf, "0.1", None, True])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_beta(name: str, beta: object) -> None:
    entry, (options, eps) = OBJECTIVES[name], CASES[name][0]
    arguments = {"label_smoothing": eps, "options": options}
    reference = entry.reference != "refused"
    if name == "sft" and beta in (0.0, -0.1) and not isinstance(beta, bool):
        resolve(name, beta=beta, has_reference=reference, **arguments)
    else:
        refuses("beta should be a number in", name, beta=beta, has_reference=reference, **arguments)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_label_smoothing(name: str) -> None:
    entry, (options, _) = OBJECTIVES[name], CASES[name][0]
    arguments = {"options": options, "has_reference": entry.reference != "refused"}
    outside = [-0.1, 0.5, math.nan, "a"]
    if entry.label_smoothing is None:
        outside.append(0.1)
    if name == "exo_pair":
        outside.append(0.0)
    for eps in outside:
        refuses("label_smoothing should be", name, label_smoothing=eps, **arguments)


def test_label_smoothing_of_a_sum_goes_to_the_parts_that_have_it() -> None:
    refuses("label_smoothing should be 0 for hinge, ipo", ["hinge", "ipo"], label_smoothing=0.1)
    refuses("label_smoothing should be in .* for exo_pair", ["sigmoid", "exo_pair"])
    resolve(["hinge", "robust"], beta=0.1, label_smoothing=0.1, has_reference=True, options={})


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_reference(name: str) -> None:
    options, eps = CASES[name][0]
    arguments = {"label_smoothing": eps, "options": options}
    if OBJECTIVES[name].reference == "required":
        refuses("ref_logps .* should be given", name, has_reference=False, **arguments)
    else:
        resolve(name, beta=0.1, has_reference=False, **arguments)
    if OBJECTIVES[name].reference == "refused":
        refuses("ref_logps should not be given", name, **arguments)
        resolve([name, "sigmoid"], beta=0.1, has_reference=True, **arguments)
    else:
        resolve(name, beta=0.1, has_reference=True, **arguments)


BAD_OPTIONS = [
    ("ipo", "length_normalized", [1, None, "yes"]),
    ("bco_pair", "delta", [math.nan, "0", torch.zeros(2), torch.tensor(1), None]),
    ("discopop", "discopop_tau", [0.0, -1.0, None, math.inf]),
    ("odpo", "offset", [None, math.inf, torch.zeros(2, 2), torch.tensor([1, 2])]),
    ("odpo", "offset_alpha", [-1.0]),
    ("dpop", "dpop_lambda", [-1.0, True]),
    ("cal_dpo", "calibration_weight", [-1.0]),
    ("simpo", "gamma", [-0.1, None]),
    ("simpo", "gamma_beta_ratio", [-0.1, "a"]),
    ("cpo", "cpo_alpha", [-1.0]),
    ("kto", "desirable", [None, torch.ones(8), torch.ones(2, 4, dtype=torch.bool), [True]]),
    ("kto", "kl", [None, math.nan, torch.zeros(2)]),
    ("kto", "desirable_weight", [-1.0]),
    ("kto", "undesirable_weight", [-1.0]),
    ("bco", "desirable", [None]),
    ("bco", "delta", [None]),
    ("bco", "density_ratio", [1.0, torch.ones(8, dtype=torch.int64), torch.ones(2, 4)]),
    ("plackett_luce", "num_candidates", [1, 2.0, None, True]),
    ("sigmoid", "f_divergence", ["kl", None, 3]),
    ("sigmoid", "f_alpha_divergence_coef", [math.nan, "a"]),
    ("sigmoid", "sft_weight", [-1.0, math.nan, "a"]),
    ("sigmoid", "rpo_alpha", [-1.0]),
    ("sigmoid", "ld_alpha", [-0.1, 1.1, "a"]),
    ("sigmoid", "use_weighting", [1, None]),
    ("sigmoid", "sample_weights", [1.0, -torch.ones(4), torch.ones(4).long(), torch.ones(2, 2)]),
]


def test_every_option_has_bad_values() -> None:
    own = {(name, option.name) for name, entry in OBJECTIVES.items() for option in entry.options}
    common = {("sigmoid", name) for name in COMMON_OPTIONS if name != "loss_weights"}
    assert {(name, option) for name, option, _ in BAD_OPTIONS} == own | common


@pytest.mark.parametrize(("name", "option", "values"), BAD_OPTIONS)
def test_options_out_of_range(name: str, option: str, values: list[object]) -> None:
    options, eps = CASES[name][0]
    reference = OBJECTIVES[name].reference != "refused"
    for value in values:
        refuses(
            f"^{option} should be",
            name,
            label_smoothing=eps,
            has_reference=reference,
            options={**options, option: value},
        )


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option.name)
        for name, entry in OBJECTIVES.items()
        for option in entry.options
        if repr(option.default) == "required"
    ],
)
def test_required_options(name: str, option: str) -> None:
    options = {key: value for key, value in CASES[name][0][0].items() if key != option}
    refuses(f"{name} needs the option {option}", name, options=options)


def test_who_takes_the_common_options() -> None:
    takers = {name: set(option.takers()) for name, option in COMMON_OPTIONS.items()}
    divergent = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
    assert takers["f_divergence"] == takers["f_alpha_divergence_coef"] == divergent
    pairs = set(OBJECTIVES) - {"kto", "bco", "plackett_luce"}
    assert takers["sft_weight"] == takers["rpo_alpha"] == takers["ld_alpha"] == pairs
    assert takers["use_weighting"] == pairs - {"aot", "aot_unpaired"}
    assert takers["loss_weights"] == set(OBJECTIVES)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_common_options_are_refused_where_they_mean_nothing(name: str) -> None:
    options, eps = CASES[name][0]
    reference = OBJECTIVES[name].reference != "refused"
    values = {
        "f_divergence": "forward_kl",
        "sft_weight": 0.1,
        "rpo_alpha": 0.1,
        "ld_alpha": 0.5,
        "use_weighting": True,
    }
    for option, value in values.items():
        arguments = {
            "label_smoothing": eps,
            "has_reference": reference,
            "options": {**options, option: value},
        }
        takers = COMMON_OPTIONS[option].takers()
        if name in takers:
            resolve(name, beta=0.1, **arguments)
        else:
            refuses(
                f"{option} is not defined for {name}; it goes with {takers[0]}", name, **arguments
            )


def test_options_that_exclude_each_other() -> None:
    refuses("sft_weight and rpo_alpha are two names", options={"sft_weight": 1.0, "rpo_alpha": 1.0})
    refuses(
        "gamma and gamma_beta_ratio are two names",
        "simpo",
        has_reference=False,
        options={"gamma": 0.5, "gamma_beta_ratio": 0.5},
    )
    refuses("f_alpha_divergence_coef goes with", options={"f_alpha_divergence_coef": 0.3})
    refuses("needs a reference", has_reference=False, options={"f_divergence": "js_divergence"})
    refuses(
        "f_divergence is not defined for bco_pair; it goes with",
        ["sigmoid", "bco_pair"],
        options={"f_divergence": "js_divergence"},
    )
    refuses(
        "use_weighting is not defined for aot", ["sigmoid", "aot"], options={"use_weighting": True}
    )


def test_loss_weights() -> None:
    refuses(
        "loss_weights should have 2 entries", ["sigmoid", "sft"], options={"loss_weights": [1.0]}
    )
    refuses("loss_weights goes with a list", "sigmoid", options={"loss_weights": [1.0]})
    refuses("loss_weights goes with a list", {"sigmoid": 1.0}, options={"loss_weights": [1.0]})
    refuses("loss_weights should be", ["sigmoid"], options={"loss_weights": [-1.0]})
    refuses("loss_weights should be", ["sigmoid"], options={"loss_weights": 1.0})
    refuses("weight of objective 'sft' should be", {"sigmoid": 1.0, "sft": math.nan})
    refuses("every objective once", ["sigmoid", "sigmoid"])
    refuses("one layout, got sigmoid .pairs., kto .unpaired.", ["sigmoid", "kto"])


def test_a_batch_that_does_not_fit() -> None:
    three, six = torch.zeros(3), torch.zeros(6)
    for name, options, match in [
        ("sigmoid", {}, "even number for sigmoid, got 3"),
        ("plackett_luce", {"num_candidates": 2}, "even number"),
        ("plackett_luce", {"num_candidates": 4}, "multiple of num_candidates = 4"),
        (
            "kto",
            {"desirable": torch.ones(2, dtype=torch.bool), "kl": 0.0},
            "desirable should have 3",
        ),
    ]:
        resolved = build(name, options)
        with pytest.raises(ValueError, match=match):
            resolved(batch(resolved, three))
    odpo = build("odpo", {"offset": torch.zeros(2)})
    with pytest.raises(ValueError, match="offset should have 3 entries"):
        odpo.check(6)
    with pytest.raises(ValueError, match="offset should be on meta"):
        odpo(batch(odpo, torch.zeros(4, device="meta")))
    ratio = build("bco", {"desirable": torch.ones(6).bool(), "delta": 0.0, "density_ratio": three})
    with pytest.raises(ValueError, match="density_ratio should have 6 entries"):
        ratio(batch(ratio, six))


def test_a_call_that_does_not_keep_what_was_resolved() -> None:
    lengths = torch.ones(4, dtype=torch.int64)
    zeros = torch.zeros(4)
    sigmoid, sft, wpo = (
        build("sigmoid", {}),
        build("sft", {}),
        build("sigmoid", {"use_weighting": True}),
    )
    for resolved, sequences, match in [
        (sigmoid, SequenceLogps(zeros, None, lengths), "ref_logps should be a tensor"),
        (build("simpo", {}), SequenceLogps(zeros, zeros, lengths), "ref_logps should be None"),
        (sft, SequenceLogps(zeros, zeros, lengths), "nll should be a tensor: sft"),
        (wpo, SequenceLogps(zeros, zeros, lengths), "weights should be a tensor"),
        (sigmoid, SequenceLogps(zeros, zeros, lengths, weights=zeros), "weights should be None"),
        (sigmoid, SequenceLogps(zeros, zeros, lengths, pairs="mixed"), "pairs should be"),
    ]:
        with pytest.raises(ValueError, match=match):
            resolved(sequences)


def test_registering_a_name_twice() -> None:
    with pytest.raises(ValueError, match="'sigmoid' is registered twice"):
        objectives.objective("sigmoid", formula="", paper="")(lambda pairs: pairs.margin)
