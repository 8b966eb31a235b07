"""From the log-probabilities of a batch's tokens to its preference loss.

Between `fastdpo.linear` and `fastdpo.logits`, which know rows, and `fastdpo.objectives`, which know
sequences.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastdpo import linear, logits, objectives, rows, sequences
from fastdpo.autograd import is_traced
from fastdpo.backends.torch import accumulate_dtype
from fastdpo.head import Head
from fastdpo.parallel import SequenceParallel


def segments_of(
    labels: Tensor,  # [S, T] or [M]
    ignore_index: int,
    cu_seqlens: Tensor | None,  # [S + 1]
    row_index: Tensor | None,  # [N]
    every_row: bool = False,
) -> sequences.Segments:
    """Which rows belong to which sequence: of those that carry loss, or of `every_row`."""
    carries = labels != ignore_index
    if row_index is not None:
        carries = torch.zeros_like(carries).flatten().index_fill(0, row_index, True)
        carries = carries.view(labels.shape)
    if cu_seqlens is None:
        lengths = rows.lengths_padded(carries)
        positions = torch.full_like(lengths, labels.shape[1])
    else:
        lengths = rows.lengths_packed(carries, cu_seqlens)
        positions = cu_seqlens.long().diff()
    if every_row or is_traced(labels):
        return sequences.Segments(positions, lengths, carries.flatten())
    return sequences.Segments(lengths, lengths)


def sequence_objective(
    tokens: linear.TokenLogps,
    ref_tokens: Tensor | None,  # [N]
    ref_logps: Tensor | None,  # [S], where ref_tokens is None
    segments: sequences.Segments,
    resolved: objectives.ResolvedObjective,
    average: bool,
    pairs: str,
    backend: str | None,
    sequence_parallel: SequenceParallel | None = None,
) -> objectives.ObjectiveOutput:
    """Per-token log-probabilities of the rows that carry loss to the loss."""
    logps = tokens.logps
    if sequence_parallel is not None:
        lengths = sequence_parallel.total(segments.lengths)
        segments = dataclasses.replace(segments, lengths=lengths)

    def sums_of(values: Tensor) -> Tensor:  # [N] -> [S]
        sums = sequences.sequence_sums(values, segments.rows)
        return sums if sequence_parallel is None else sequence_parallel.total(sums)

    if resolved.ld_alpha is not None:
        sequence, position = segments.positions(logps.shape[0])
        shared = objectives.ld_token_weights(
            segments.lengths, position, sequence, resolved.ld_alpha, pairs=pairs, dtype=logps.dtype
        )
        logps = logps * shared
        ref_tokens = None if ref_tokens is None else ref_tokens * shared
    if ref_tokens is not None:
        ref_logps = sums_of(_carrying(ref_tokens, segments))
        ref_logps = segments.average(ref_logps) if average else ref_logps
    elif ref_logps is not None:
        ref_logps = ref_logps.detach().to(logps.dtype)
    if resolved.fused_sigmoid and segments.carries is None and sequence_parallel is None:
        loss, sums, rewards = sequences.sigmoid_loss(
            logps,
            segments.lengths,
            ref_logps,
            beta=resolved.beta,
            label_smoothing=resolved.label_smoothing,
            average=average,
            pairs=pairs,
            backend=backend,
        )
        return objectives.ObjectiveOutput(loss, *_split(sums, pairs), *_split(rewards, pairs))
    sums = sums_of(logps)
    weights = None
    if resolved.wpo:
        assert tokens.log_sum_sq_probs is not None  # the caller asked for them
        weights = objectives.wpo_weights(
            tokens.logps,
            tokens.log_sum_sq_probs,
            sequences.offsets_of(segments.rows),
            segments.lengths,
        )
    return resolved(
        objectives.SequenceLogps(
            logps=segments.average(sums) if average else sums,
            ref_logps=ref_logps,
            lengths=segments.lengths,
            weights=weights,
            nll=chosen_nll(sums_of(tokens.logps), segments, pairs) if resolved.needs_nll else None,
            pairs=pairs,
            averaged=average,
        )
    )


def logits_objective(
    z: Tensor,  # [..., V] logits
    labels: Tensor,  # [...], negative where a row carries no loss
    head: Head,
    ref_tokens: Tensor | None,  # [M]
    ref_logps: Tensor | None,  # [S], where ref_tokens is None
    segments: sequences.Segments,  # of every row
    resolved: objectives.ResolvedObjective,
    average: bool,
    pairs: str,
    backend: str | None,
    inplace: bool,
) -> objectives.ObjectiveOutput:
    """Materialized logits to the loss: in one launch sequence, where a backend has it."""
    module = logits.fused_loss(z, backend) if resolved.fused_sigmoid else None
    if module is None:
        logps = logits.token_logps(z, labels, head, backend, inplace=inplace)
        tokens = linear.TokenLogps(logps.flatten())
        ref_tokens = None if ref_tokens is None else ref_tokens.to(tokens.logps.dtype)
        return sequence_objective(
            tokens, ref_tokens, ref_logps, segments, resolved, average, pairs, backend
        )
    if ref_tokens is not None:
        ref_tokens = _carrying(ref_tokens.float(), segments)
        ref_logps = sequences.sequence_sums(ref_tokens, segments.rows)
        ref_logps = segments.average(ref_logps) if average else ref_logps
    elif ref_logps is None:
        ref_logps = z.new_zeros(segments.rows.shape, dtype=torch.float32)
    loss, sums, rewards = logits.sigmoid_loss(
        z,
        labels,
        head,
        sequences.offsets_of(segments.rows),
        ref_logps,
        beta=resolved.beta,
        label_smoothing=resolved.label_smoothing,
        average=average,
        pairs=pairs,
        module=module,
        inplace=inplace,
    )
    return objectives.ObjectiveOutput(loss, *_split(sums, pairs), *_split(rewards, pairs))


def _carrying(ref_tokens: Tensor, segments: sequences.Segments) -> Tensor:  # [N] -> [N]
    """0 where every row is there and one carries no loss: what it was given may be anything."""
    if segments.carries is None:
        return ref_tokens
    return torch.where(segments.carries, ref_tokens, 0.0)


def _split(values: Tensor, pairs: str) -> tuple[Tensor, Tensor]:  # [2B] -> [B], [B]
    if pairs == "concatenated":
        half = values.shape[0] // 2
        return values[:half], values[half:]
    return values[::2], values[1::2]


def chosen_nll(
    sums: Tensor,  # [2B]
    segments: sequences.Segments,
    pairs: str,
) -> Tensor:  # []
    """The mean negative log-likelihood of the chosen answers' tokens; 0 where there are none."""
    chosen, _ = _split(sums, pairs)
    tokens, _ = _split(segments.lengths, pairs)
    return -chosen.sum() / tokens.sum().clamp(min=1)


@torch.no_grad()
def mean_logits(hidden: Tensor, head: Head) -> Tensor:  # [B, T, D] -> []
    """The mean logit over positions and vocabulary, from the means of its two factors."""
    dtype = accumulate_dtype(hidden.dtype)
    mean_hidden = hidden.reshape(-1, hidden.shape[-1]).mean(0, dtype=dtype)
    mean = mean_hidden @ head.weight.detach().mean(0, dtype=dtype)
    return mean if head.bias is None else mean + head.bias.detach().mean(dtype=dtype)
