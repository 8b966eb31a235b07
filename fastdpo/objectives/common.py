"""Options that combine with many objectives, and which objectives those are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from .divergences import F_DIVERGENCES
from .registry import (
    FINITE,
    NON_NEGATIVE,
    OBJECTIVES,
    Objective,
    Option,
    Range,
    flag,
)


@dataclass(frozen=True)
class CommonOption:
    """An option that combines with many objectives instead of belonging to one."""

    option: Option
    taken_by: Callable[[Objective], bool]

    def takers(self) -> list[str]:
        return [name for name, entry in OBJECTIVES.items() if self.taken_by(entry)]


def _number_or_none(name: str, within: Range, doc: str) -> Option:
    """A number that is not given by default, which None says too."""
    valid = f"a number in {within}"
    return Option(name, None, valid, lambda value: value is None or value in within, doc)


def _on_pairs(entry: Objective) -> bool:
    return entry.layout == "pairs"


def _takes_divergence(entry: Objective) -> bool:
    return entry.f_divergence != "refused"


def _is_weights(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, (list, tuple)) and all(weight in NON_NEGATIVE for weight in value)


def _are_sample_weights(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 1:
        return False
    # A GPU is not waited for.
    return not value.is_cpu or bool(((value >= 0) & value.isfinite()).all())


COMMON_OPTIONS: Final[dict[str, CommonOption]] = {
    common.option.name: common
    for common in (
        CommonOption(
            Option(
                "f_divergence",
                "reverse_kl",
                f"one of {', '.join(F_DIVERGENCES)}",
                lambda value: isinstance(value, str) and value in F_DIVERGENCES,
                "f-DPO: the divergence from the reference (arXiv 2309.16240)",
            ),
            _takes_divergence,
        ),
        CommonOption(
            _number_or_none(
                "f_alpha_divergence_coef", FINITE, "α of alpha_divergence; 0.5 if not given"
            ),
            _takes_divergence,
        ),
        CommonOption(
            _number_or_none(
                "sft_weight",
                NON_NEGATIVE,
                "RPO: weight of the chosen answers' NLL, added to the loss (arXiv 2404.19733)",
            ),
            _on_pairs,
        ),
        CommonOption(
            _number_or_none("rpo_alpha", NON_NEGATIVE, "another name of sft_weight"), _on_pairs
        ),
        CommonOption(
            _number_or_none(
                "ld_alpha",
                Range(0.0, 1.0),
                "LD-DPO: weight of tokens beyond the pair's shared length (arXiv 2409.06411)",
            ),
            _on_pairs,
        ),
        CommonOption(
            flag(
                "use_weighting",
                False,
                "WPO: multiply each pair's loss by its two weights (arXiv 2406.11827)",
            ),
            lambda entry: entry.weightable,
        ),
        CommonOption(
            Option(
                "sample_weights",
                None,
                "a floating tensor [B] of numbers in [0, ∞)",
                _are_sample_weights,
                "multiply the loss of each pair, prompt or sequence; what the sum is divided by "
                "stays their number",
            ),
            lambda entry: not entry.whole_batch and not entry.reads_nll,
        ),
        CommonOption(
            Option(
                "loss_weights",
                None,
                "a list of numbers in [0, ∞), one for each objective",
                _is_weights,
                "MPO: weights of a list of objectives, 1 each if not given (arXiv 2411.10442)",
            ),
            lambda entry: True,
        ),
    )
}
