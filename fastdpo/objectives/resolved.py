"""A validated objective, or a weighted sum of several, as a function of a batch of sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from .divergences import FDivergence
from .layouts import (
    PAIRS,
    LinearDPOOutput,
    Ranked,
    SequenceLogps,
    Unpaired,
    as_pairs,
    by_rank,
    log_ratios,
    token_counts,
)
from .precision import narrowed, widened
from .registry import Layout, Objective, as_float, describe

# Tensor options with one entry per pair or per sequence.
_PER_ROW: Final = frozenset({"offset", "desirable", "density_ratio", "sample_weights"})


@dataclass(frozen=True)
class Part:
    """One objective of the sum, with its weight and the values of its options."""

    entry: Objective
    weight: float
    options: Mapping[str, object]

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL term beside the objective's own loss."""
        held = self.entry.nll_weight
        return as_float(self.options[held] if isinstance(held, str) else held)

    @property
    def needs_nll(self) -> bool:
        return self.entry.reads_nll or self.nll_weight > 0.0


@dataclass(frozen=True, eq=False)
class ResolvedObjective:
    """A validated objective (or a weighted sum of several), ready to be called on any number of
    batches.

    The call is differentiable in `logps` and `nll`, stays on the device and traces under
    torch.compile; only the split of unpaired sequences into desirable and undesirable ones, for the
    values that are reported, reads a mask on the host.
    """

    parts: tuple[Part, ...]
    beta: float
    label_smoothing: float
    has_reference: bool
    divergence: FDivergence | None = None  # None: the reverse KL
    sft_weight: float = 0.0
    wpo: bool = False  # SequenceLogps.weights has to be given
    ld_alpha: float | None = None  # logps have to be weighted sums, see ld_token_weights
    sample_weights: Tensor | None = None  # [B] of the losses of pairs, prompts or sequences
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", self.parts[0].entry.layout)

    @property
    def needs_nll(self) -> bool:
        """Whether SequenceLogps.nll has to be given."""
        return self.sft_weight > 0.0 or any(part.needs_nll for part in self.parts)

    @property
    def is_sum_over_pairs(self) -> bool:
        """Whether the loss of a batch is a sum over its parts, but for what it is divided by."""
        weighted = self.wpo and any(part.entry.reads_nll for part in self.parts)
        return not weighted and not any(part.entry.whole_batch for part in self.parts)

    @property
    def fused_sigmoid(self) -> bool:
        """Whether it is the DPO sigmoid loss (label smoothing included) and nothing else."""
        (first, *others) = self.parts
        plain = first.entry.name == "sigmoid" and first.weight == 1.0 and not others
        terms = self.sft_weight > 0.0 or self.wpo or self.ld_alpha is not None
        terms = terms or self.sample_weights is not None
        return plain and self.divergence is None and not terms

    @property
    def num_candidates(self) -> int:
        """Sequences per prompt: 2 for pairs, K for rankings, 1 for unpaired ones."""
        if self.layout == "ranked":
            return int(as_float(self.parts[0].options["num_candidates"]))
        return 2 if self.layout == "pairs" else 1

    def check(self, sequences: int, device: torch.device | None = None) -> None:
        """ValueError if a batch of so many sequences (on `device`) does not fit the layout or the
        options.

        Reads shapes only, so it may run before anything is computed; the call itself runs it too.
        """
        group = self.num_candidates
        if sequences % group:
            what = "an even number" if group == 2 else f"a multiple of num_candidates = {group}"
            raise ValueError(
                f"the number of sequences should be {what} for {self._names()}, got {sequences}"
            )
        given = [{"sample_weights": self.sample_weights}, *(part.options for part in self.parts)]
        for options in given:
            for name, value in options.items():
                if name not in _PER_ROW or not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                rows = sequences // group
                if value.shape[0] != rows:
                    raise ValueError(f"{name} should have {rows} entries, got {describe(value)}")
                if device is not None and value.device != device:
                    raise ValueError(
                        f"{name} should be on {device}, the device of logps, got {value.device}"
                    )

    def __call__(self, sequences: SequenceLogps) -> LinearDPOOutput:
        self.check(sequences.logps.shape[0], sequences.logps.device)
        self._check_inputs(sequences)
        return LinearDPOOutput(self._loss(sequences), *self._report(sequences))

    def _check_inputs(self, sequences: SequenceLogps) -> None:
        if self.has_reference != (sequences.ref_logps is not None):
            expected = "a tensor" if self.has_reference else "None"
            raise ValueError(
                f"ref_logps should be {expected}: resolved with has_reference={self.has_reference}"
            )
        if self.wpo != (sequences.weights is not None):
            expected = "a tensor [S]" if self.wpo else "None"
            raise ValueError(
                f"weights should be {expected}: resolved with use_weighting={self.wpo}"
            )
        if self.needs_nll and sequences.nll is None:
            raise ValueError(f"nll should be a tensor: {self._names()} has an NLL term")
        if sequences.pairs not in PAIRS:
            raise ValueError(f"pairs should be one of {list(PAIRS)}, got {sequences.pairs!r}")

    def _loss(self, sequences: SequenceLogps) -> Tensor:  # []
        dtype = sequences.logps.dtype
        sequences = _widened(sequences)
        view = self._view(sequences, dtype)
        weights = None
        if sequences.weights is not None:
            weights = sequences.weights.detach().double()
            weights = by_rank(weights, 2, sequences.pairs).prod(0)  # [B]
        empty = sequences.logps.shape[0] == 0
        total = sequences.logps[:0].sum()  # 0, with a gradient of zeros
        for part in self.parts:
            if part.weight == 0.0:
                continue  # 0 · ∞ is 0 here
            losses = part.entry.fn(view, **part.options)
            for factor in (weights, self.sample_weights):
                if factor is not None:  # 0 · ∞ is 0 here too
                    factor = factor.detach().double()
                    losses = torch.where(factor == 0.0, 0.0, losses * factor)
            if sequences.num_pairs is not None:
                # One number for all pairs, which was divided by its own count already.
                own = view.nll if part.entry.reads_nll else losses.sum() / sequences.num_pairs
                total = total + part.weight * own
                continue
            # The mean of nothing is NaN, its sum is 0 with a gradient of zeros.
            total = total + part.weight * (losses.sum() if empty else losses.mean())
        nll_weight = self.sft_weight + sum(part.weight * part.nll_weight for part in self.parts)
        if nll_weight > 0.0 and not empty:
            assert sequences.nll is not None
            total = total + nll_weight * sequences.nll
        return narrowed(total, dtype)

    def _view(self, sequences: SequenceLogps, dtype: torch.dtype) -> Any:
        if self.layout == "pairs":
            return as_pairs(sequences, self.beta, self.label_smoothing, self.divergence, dtype)
        ratios = log_ratios(sequences)
        if self.layout == "ranked":
            return Ranked(by_rank(ratios, self.num_candidates, sequences.pairs), self.beta)
        return Unpaired(ratios, self.beta)

    def _report(self, sequences: SequenceLogps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rewards = self.beta * log_ratios(sequences).detach()
        if all(part.entry.average_rewards for part in self.parts):
            rewards = rewards / token_counts(sequences)
        if self.layout == "unpaired":
            desirable = self.parts[0].options["desirable"]
            assert isinstance(desirable, Tensor)
            good, bad = desirable.nonzero().squeeze(1), (~desirable).nonzero().squeeze(1)
            return (
                sequences.logps.index_select(0, good),
                sequences.logps.index_select(0, bad),
                rewards.index_select(0, good),
                rewards.index_select(0, bad),
            )
        logps = by_rank(sequences.logps, self.num_candidates, sequences.pairs)
        rewards = by_rank(rewards, self.num_candidates, sequences.pairs)
        return logps[0], logps[1:].flatten(), rewards[0], rewards[1:].flatten()

    def _names(self) -> str:
        return " + ".join(part.entry.name for part in self.parts)


def _widened(sequences: SequenceLogps) -> SequenceLogps:
    """In fp64, see fastdpo.objectives.precision."""
    ref_logps, nll = sequences.ref_logps, sequences.nll
    return replace(
        sequences,
        logps=widened(sequences.logps),
        ref_logps=None if ref_logps is None else ref_logps.detach().double(),
        nll=None if nll is None else widened(nll),
    )
