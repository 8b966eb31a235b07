"""From what a caller asks for to a ResolvedObjective, or to a ValueError that says what is
wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .common import COMMON_OPTIONS
from .divergences import FDivergence
from .registry import (
    FINITE,
    NON_NEGATIVE,
    OBJECTIVES,
    POSITIVE,
    REQUIRED,
    Objective,
    as_float,
    describe,
    names,
)
from .resolved import Part, ResolvedObjective


def resolve(
    objective: str | Sequence[str] | Mapping[str, float],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    has_reference: bool,
    options: Mapping[str, object],
) -> ResolvedObjective:
    """Validate an objective and all that comes with it, before anything is computed.

    Args:
        objective: a name of OBJECTIVES; a list of them for a weighted sum (MPO), with the option
            `loss_weights` or 1 each; or a dict of names and weights.
        beta: β of the formulae, positive (any finite number where the objective does not use it).
        label_smoothing: ε of the formulae, 0 where none of the objectives defines it.
        has_reference: whether `ref_logps` will be given.
        options: the objectives' own options and the common ones, COMMON_OPTIONS. None is as good as
            not given for an option whose default is None. In a sum an option, like label_smoothing,
            goes to every objective that has it.

    Raises:
        ValueError: naming the argument or the option, and what it should be.
    """
    weights = _weights(objective, options.get("loss_weights"))
    entries = [OBJECTIVES[name] for name in weights]
    if len({entry.layout for entry in entries}) > 1:
        layouts = ", ".join(f"{entry.name} ({entry.layout})" for entry in entries)
        raise ValueError(f"objective sums only objectives of one layout, got {layouts}")
    _check_options(entries, options)
    _check_beta(entries, beta)
    _check_label_smoothing(entries, label_smoothing)
    _check_reference(entries, has_reference)
    ld_alpha, sample_weights = options.get("ld_alpha"), options.get("sample_weights")
    assert sample_weights is None or isinstance(sample_weights, Tensor)
    resolved = ResolvedObjective(
        parts=tuple(
            Part(entry, weight, _own_options(entry, options))
            for entry, weight in zip(entries, weights.values(), strict=True)
        ),
        beta=float(beta),
        label_smoothing=float(label_smoothing),
        has_reference=has_reference,
        divergence=_divergence(entries, options, has_reference),
        sft_weight=_sft_weight(options),
        wpo=bool(options.get("use_weighting", False)),
        ld_alpha=None if ld_alpha is None else as_float(ld_alpha),
        sample_weights=sample_weights,
    )
    if sample_weights is not None and resolved.needs_nll:
        raise ValueError(
            "sample_weights should be None with an NLL term, which is a mean over tokens and not "
            "over pairs"
        )
    return resolved


def _weights(
    objective: str | Sequence[str] | Mapping[str, float], loss_weights: object
) -> dict[str, float]:
    several = not isinstance(objective, (str, Mapping))
    if not isinstance(objective, (str, Mapping, list, tuple)) or len(objective) == 0:
        raise ValueError(
            f"objective should be a name, a list of names or a dict of weights, got {objective!r}"
        )
    if loss_weights is not None and not several:
        raise ValueError(
            "loss_weights goes with a list of objectives; a dict has its weights already"
        )
    chosen = [objective] if isinstance(objective, str) else list(objective)
    for name in chosen:
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}; there are {names(OBJECTIVES)}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"objective names every objective once, got {chosen!r}")
    if isinstance(objective, Mapping):
        values = list(objective.values())
    else:
        COMMON_OPTIONS["loss_weights"].option.validate(loss_weights)
        values = (
            list(loss_weights) if isinstance(loss_weights, (list, tuple)) else [1.0] * len(chosen)
        )
    if len(values) != len(chosen):
        raise ValueError(
            f"loss_weights should have {len(chosen)} entries, one per objective, got {len(values)}"
        )
    for name, value in zip(chosen, values, strict=True):
        if value not in NON_NEGATIVE:
            raise ValueError(
                f"the weight of objective {name!r} should be in {NON_NEGATIVE}, got {value!r}"
            )
    return {name: float(value) for name, value in zip(chosen, values, strict=True)}


def _check_options(entries: list[Objective], options: Mapping[str, object]) -> None:
    label = " + ".join(entry.name for entry in entries)
    for name, value in options.items():
        common = COMMON_OPTIONS.get(name)
        if common is not None:
            common.option.validate(value)
            refusing = [entry.name for entry in entries if not common.taken_by(entry)]
            # A value that changes nothing is welcome everywhere.
            if refusing and value != common.option.default:
                takers = names(common.takers())
                raise ValueError(
                    f"{name} is not defined for {names(refusing)}; it goes with {takers}"
                )
            continue
        owned = [
            option for option in (entry.option(name) for entry in entries) if option is not None
        ]
        for option in owned:
            option.validate(value)
        if not owned:
            owners = [other.name for other in OBJECTIVES.values() if other.option(name) is not None]
            if owners:
                raise ValueError(
                    f"option {name} belongs to {names(owners)}; {label} does not take it"
                )
            own = [option.name for entry in entries for option in entry.options]
            raise ValueError(
                f"unknown option {name!r}; {label} takes {names([*own, *COMMON_OPTIONS])}"
            )
    for entry in entries:
        for option in entry.options:
            if option.default is REQUIRED and option.name not in options:
                raise ValueError(f"{entry.name} needs the option {option.name}: {option.doc}")
    if "gamma" in options and options.get("gamma_beta_ratio") is not None:
        raise ValueError(
            "gamma and gamma_beta_ratio are two names of one margin: give only one of them"
        )


def _own_options(entry: Objective, options: Mapping[str, object]) -> dict[str, object]:
    return {option.name: options.get(option.name, option.default) for option in entry.options}


def _check_beta(entries: list[Objective], beta: float) -> None:
    within = POSITIVE if any(entry.uses_beta for entry in entries) else FINITE
    if beta not in within:
        raise ValueError(f"beta should be a number in {within}, got {describe(beta)}")


def _check_label_smoothing(entries: list[Objective], label_smoothing: float) -> None:
    defined = [entry for entry in entries if entry.label_smoothing is not None]
    if not defined and label_smoothing != 0.0:
        having = [name for name, entry in OBJECTIVES.items() if entry.label_smoothing is not None]
        raise ValueError(
            f"label_smoothing should be 0 for {names([entry.name for entry in entries])}, got "
            f"{describe(label_smoothing)}; it is defined for {names(having)}"
        )
    for entry in defined:
        assert entry.label_smoothing is not None
        if label_smoothing not in entry.label_smoothing:
            raise ValueError(
                f"label_smoothing should be in {entry.label_smoothing} for {entry.name}, "
                f"got {describe(label_smoothing)}"
            )


def _check_reference(entries: list[Objective], has_reference: bool) -> None:
    needing = [entry.name for entry in entries if entry.reference == "required"]
    if needing and not has_reference:
        raise ValueError(
            "ref_logps (or a reference's hidden states and head) should be given for "
            f"{names(needing)}"
        )
    if has_reference and all(entry.reference == "refused" for entry in entries):
        refusing = names([entry.name for entry in entries])
        raise ValueError(f"ref_logps should not be given: {refusing} is reference-free")


def _divergence(
    entries: list[Objective], options: Mapping[str, object], has_reference: bool
) -> FDivergence | None:
    name = options.get("f_divergence", "reverse_kl")
    alpha = options.get("f_alpha_divergence_coef")
    if alpha is not None and name != "alpha_divergence":
        raise ValueError("f_alpha_divergence_coef goes with f_divergence='alpha_divergence' only")
    assert isinstance(name, str)
    divergence = FDivergence(name) if alpha is None else FDivergence(name, as_float(alpha))
    if divergence.is_reverse_kl:
        return None
    if not has_reference and any(entry.f_divergence == "composes" for entry in entries):
        raise ValueError(f"f_divergence={name!r} needs a reference to diverge from: give ref_logps")
    return divergence


def _sft_weight(options: Mapping[str, object]) -> float:
    given = [options[key] for key in ("sft_weight", "rpo_alpha") if options.get(key) is not None]
    if len(given) > 1:
        raise ValueError(
            "sft_weight and rpo_alpha are two names of one weight: give only one of them"
        )
    return as_float(given[0]) if given else 0.0
