"""Preference objectives: pure functions of sequence log-probabilities, under their names.

A loss that depends on the model through sequence log-probabilities alone needs nothing of the model
but two vectors, so it is plain PyTorch on S numbers, and every objective works with every backend.
What it is for:

    resolved = resolve("sigmoid", beta=0.1, label_smoothing=0.0, has_reference=True, options={})
    loss, *_ = resolved(SequenceLogps(logps, ref_logps, lengths))

`OBJECTIVES` is the one list of them: `resolve` validates against it, `markdown_table` prints it. To
add one, write a function of `Pairs`, `Ranked` or `Unpaired` beside its like and register it with
the decorator `objective`; the tests then ask for an independent transcription of its formula.
"""

from . import paired, ranked, reference_free, unpaired
from .common import COMMON_OPTIONS
from .divergences import F_DIVERGENCES, FDivergence
from .layouts import (
    PAIRS,
    LinearDPOOutput,
    ObjectiveOutput,
    Pairs,
    Ranked,
    SequenceLogps,
    Unpaired,
)
from .registry import OBJECTIVES, Objective, Option, Range, objective
from .resolved import ResolvedObjective
from .table import markdown_table
from .unpaired import RunningMean, kl_estimate
from .validation import resolve
from .weights import ld_token_weights, wpo_weights

__all__ = [
    "COMMON_OPTIONS",
    "F_DIVERGENCES",
    "OBJECTIVES",
    "PAIRS",
    "FDivergence",
    "LinearDPOOutput",
    "Objective",
    "ObjectiveOutput",
    "Option",
    "Pairs",
    "Range",
    "Ranked",
    "ResolvedObjective",
    "RunningMean",
    "SequenceLogps",
    "Unpaired",
    "kl_estimate",
    "ld_token_weights",
    "markdown_table",
    "objective",
    "paired",
    "ranked",
    "reference_free",
    "resolve",
    "unpaired",
    "wpo_weights",
]
