"""One training step, from top to bottom: hidden states or logits to a preference loss.

    rows                  which positions carry loss, and whose sequence they are       core.rows
    policy's tokens       log p(label) of each row                          core.operator, linear
    reference's tokens    the same operations, without a gradient
    sequences             sums (or averages) over each sequence's rows             core.sequences
    objective             sequences' log-probabilities to the loss                     objectives

The sigmoid loss is fused with the sums; with logits that exist already the CUDA C++ backend fuses
the whole of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import objectives
from ..backends.contract import Head, LogitMap, accumulate_dtype
from ..objectives import LinearDPOOutput
from ..objectives.layouts import by_rank
from . import checks, logits, operator, rows, sequences, sharded
from .call import Call, LossCall
from .results import LinearLogps
from .rows import Rows
from .sequences import Segments


@dataclass(frozen=True)
class Reference:
    """What the policy is compared with: log-probabilities that are known, or hidden states and a
    head, or nothing.
    """

    logps: Tensor | None = None  # [S], or with per_token shaped like the labels
    per_token: bool = False
    hidden: Tensor | None = None  # [..., D']
    head: Head | None = None

    @property
    def given(self) -> bool:
        return self.logps is not None or self.head is not None

    def tokens(self, found: Rows, call: Call, dtype: torch.dtype) -> Tensor | None:  # [N]
        """Per row that carries loss, detached; None where it is known per sequence, or not at
        all.
        """
        if self.hidden is not None and self.head is not None:
            own = checks.compute_dtype(self.hidden)
            call = dataclasses.replace(call, stats=(), compute_dtype=own)
            with torch.no_grad():
                return token_logps(self.hidden, self.head, found, call).logps
        return self.known_tokens(found, dtype)

    def known_tokens(self, found: Rows, dtype: torch.dtype) -> Tensor | None:  # [N]
        if self.logps is None or not self.per_token:
            return None
        return found.gather(self.logps.detach().flatten()).to(dtype)


class Step(NamedTuple):
    output: LinearDPOOutput
    tokens: LinearLogps  # [N] each, differentiable


def token_logps(hidden: Tensor, head: Head, found: Rows, call: Call) -> LinearLogps:
    """[..., D] hidden states to [N] each, of the rows that carry loss."""
    compute = operator.token_logps if call.sharded_head is None else sharded.token_logps
    return compute(hidden.reshape(-1, hidden.shape[-1]), head, found, call)


def at_labels(tokens: LinearLogps, found: Rows, *, detach: bool = False) -> LinearLogps:
    """Rows [N] back to where their labels are."""

    def back(t: Tensor | None) -> Tensor | None:
        return None if t is None else found.at_labels(t.detach() if detach else t)

    return LinearLogps(*(back(t) for t in tokens))  # type: ignore[arg-type]


def linear_loss(
    hidden: Tensor,  # [..., D]
    head: Head,
    found: Rows,
    reference: Reference,
    call: Call,
    loss: LossCall,
) -> Step:
    """Hidden states and a head to the loss."""
    asked = loss.stats(call.stats)
    tokens = token_logps(hidden, head, found, dataclasses.replace(call, stats=asked))
    ref_tokens = reference.tokens(found, call, tokens.logps.dtype)
    output = tokens_loss(tokens, found, ref_tokens, reference.logps, loss, call.backend)
    if asked != call.stats:
        tokens = tokens._replace(log_sum_sq_probs=None)
    return Step(output, tokens)


def tokens_loss(
    tokens: LinearLogps,  # [N] each, with `loss.stats`
    found: Rows,
    ref_tokens: Tensor | None,  # [N]
    ref_logps: Tensor | None,  # [S], where ref_tokens is None
    loss: LossCall,
    backend: str | None,
) -> LinearDPOOutput:
    """Log-probabilities of the rows that carry loss to the loss."""
    segments = found.segments(loss.cu_seqlens)
    return _sequence_loss(tokens, ref_tokens, ref_logps, segments, loss, backend)


def logits_loss(
    z: Tensor,  # [..., V] logits
    labels: Tensor,  # [...], negative where a row carries no loss
    logit_map: LogitMap,
    reference: Reference,
    loss: LossCall,
    backend: str | None,
    inplace: bool,
) -> LinearDPOOutput:
    """Materialized logits to the loss: in one launch sequence, where a backend has it."""
    segments = rows.every_row(labels, loss.cu_seqlens)
    ref_tokens = None
    if reference.logps is not None and reference.per_token:
        ref_tokens = reference.logps.detach().flatten().to(accumulate_dtype(z.dtype))
    module = logits.fused_loss(z, backend) if loss.objective.fused_sigmoid else None
    if module is None:
        logps = logits.logits_logps(z, labels, logit_map, backend, inplace=inplace)
        tokens = LinearLogps(logps.flatten())
        return _sequence_loss(tokens, ref_tokens, reference.logps, segments, loss, backend)
    ref_logps = reference.logps
    if ref_tokens is not None:
        ref_logps = sequences.sequence_sums(segments.masked(ref_tokens), segments.rows)
        ref_logps = segments.average(ref_logps) if loss.average else ref_logps
    elif ref_logps is None:
        ref_logps = z.new_zeros(segments.rows.shape, dtype=torch.float32)
    total, sums, rewards = logits.sigmoid_loss(
        z,
        labels,
        logit_map,
        sequences.offsets_of(segments.rows),
        ref_logps,
        loss,
        module,
        inplace,
    )
    return LinearDPOOutput(total, *_split(sums, loss.pairs), *_split(rewards, loss.pairs))


def _sequence_loss(
    tokens: LinearLogps,  # [N] each
    ref_tokens: Tensor | None,  # [N]
    ref_logps: Tensor | None,  # [S], where ref_tokens is None
    segments: Segments,
    loss: LossCall,
    backend: str | None,
) -> LinearDPOOutput:
    """Token log-probabilities of policy and reference to the loss."""
    logps, objective, shared = tokens.logps, loss.objective, loss.sequence_parallel
    if shared is not None:
        segments = dataclasses.replace(segments, lengths=shared.total(segments.lengths))
    count = segments.lengths.shape[0] // objective.num_candidates
    num_pairs = num_tokens = None
    if loss.normalization is not None:
        chosen = _split(segments.lengths, loss.pairs)[0].sum() if objective.needs_nll else None
        num_pairs, num_tokens = loss.normalization.counted(count, chosen, segments.lengths)

    def sums_of(values: Tensor) -> Tensor:  # [N] -> [S]
        sums = sequences.sequence_sums(values, segments.rows)
        return sums if shared is None else shared.total(sums)

    if objective.ld_alpha is not None:
        sequence, position = segments.positions(logps.shape[0])
        weight = objectives.ld_token_weights(
            segments.lengths,
            position,
            sequence,
            objective.ld_alpha,
            pairs=loss.pairs,
            dtype=logps.dtype,
        )
        # A weight of 0 takes an impossible token (−∞) out as well.
        logps = torch.where(weight == 0.0, 0.0, logps * weight)
        if ref_tokens is not None:
            ref_tokens = torch.where(weight == 0.0, 0.0, ref_tokens * weight)
    if ref_tokens is not None:
        ref_logps = sums_of(segments.masked(ref_tokens))
        ref_logps = segments.average(ref_logps) if loss.average else ref_logps
    elif ref_logps is not None:
        ref_logps = ref_logps.detach().to(logps.dtype)
    if objective.fused_sigmoid and segments.carries is None and shared is None:
        total, sums, rewards = sequences.sigmoid_loss(
            logps,
            segments.lengths,
            ref_logps,
            beta=objective.beta,
            label_smoothing=objective.label_smoothing,
            average=loss.average,
            pairs=loss.pairs,
            backend=backend,
        )
        if num_pairs is not None:
            total = total * (count / num_pairs)
        total = _times_processes(total, loss)
        return LinearDPOOutput(total, *_split(sums, loss.pairs), *_split(rewards, loss.pairs))
    sums = sums_of(logps)
    weights = None
    if objective.wpo:
        assert tokens.log_sum_sq_probs is not None  # `linear_loss` asked for them
        weights = objectives.wpo_weights(
            tokens.logps,
            tokens.log_sum_sq_probs,
            sequences.offsets_of(segments.rows),
            segments.lengths,
        )
    nll = None
    if objective.needs_nll:
        nll = chosen_nll(sums_of(tokens.logps), segments, loss.pairs, num_tokens)
    output = objective(
        objectives.SequenceLogps(
            logps=segments.average(sums) if loss.average else sums,
            ref_logps=ref_logps,
            lengths=segments.lengths,
            weights=weights,
            nll=nll,
            pairs=loss.pairs,
            averaged=loss.average,
            num_pairs=num_pairs,
        )
    )
    return output._replace(loss=_times_processes(output.loss, loss))


def _times_processes(total: Tensor, loss: LossCall) -> Tensor:
    """The mean over the processes takes it out again."""
    return total if loss.normalization is None else total * loss.normalization.factor


def chosen_nll(
    sums: Tensor,  # [2B]
    segments: Segments,
    pairs: str,
    num_tokens: float | Tensor | None = None,
) -> Tensor:  # []
    """The mean negative log-likelihood of the chosen answers' tokens; 0 where there are none. Of
    `num_tokens`, where they are but a part of them.
    """
    chosen, _ = _split(sums, pairs)
    if num_tokens is None:
        tokens, _ = _split(segments.lengths, pairs)
        num_tokens = tokens.sum().clamp(min=1)
    return -chosen.sum() / num_tokens


def _split(values: Tensor, pairs: str) -> tuple[Tensor, Tensor]:  # [2B] -> [B], [B]
    ranks = by_rank(values, 2, pairs)
    return ranks[0], ranks[1]
