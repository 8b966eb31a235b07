"""Hugging Face causal language models: sequence log-probabilities and preference losses, without
their logits.

    sequence_logps    a model and a batch of sequences to their log-probabilities
    dpo_loss          a model, its reference and a batch (pairs, rankings, single answers) to the
                      loss; `preference_loss` is its other name
    with_row_index    a batch to one whose loss waits for nothing on a GPU, for collators
    read_head         the model's lm_head, as `fastdpo.loss` takes it
    vocab_parallel    how tensor parallelism spreads it over processes
    register_head     what an lm_head of a class of one's own computes

The backbone runs as the model wrote it, through every wrapper around it, up to the input of its
lm_head; there `fastdpo.loss` takes over, and what it computes leaves through the model's output
(`fastdpo.integrations.forward`), so that whatever shards or replicates the model sees it. What the
model's family does to its logits is listed in `fastdpo.integrations.families`, and compared with
the model's own logits on the first call. Whether the model is causal, and how it counts padding, is
asked of it as well (`fastdpo.integrations.order`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import objectives
from ..core import checks
from ..core.call import LossCall
from ..core.results import LinearLogps
from ..core.sequences import sequence_sums
from ..core.step import Reference
from ..distributed.data import DataParallel
from ..distributed.sequence import SequenceParallel
from ..loss import linear_dpo_loss
from .batches import (
    Tokens,
    check_sequences,
    preference_batch,
    reference_keys,
    take_options,
    take_tokens,
    with_row_index,
)
from .families import FAMILIES, HeadRule
from .forward import examine
from .heads import hidden_scale, read_head, vocab_parallel
from .packing import PackedTokens
from .reference import as_reference, check_another
from .registered import HeadParts, register_head
from .tokens import TokenOptions, rows_with_loss, token_logps, tokens_loss
from .unwrap import UnsupportedModel

__all__ = [
    "FAMILIES",
    "DPOOutput",
    "HeadParts",
    "HeadRule",
    "UnsupportedModel",
    "dpo_loss",
    "hidden_scale",
    "preference_loss",
    "read_head",
    "register_head",
    "sequence_logps",
    "vocab_parallel",
    "with_row_index",
]


# What `linear_dpo_loss` takes and no objective does.
_NOT_OBJECTIVES = frozenset(inspect.signature(linear_dpo_loss).parameters)


class DPOOutput(NamedTuple):
    """What `dpo_loss` returns.

    `chosen_*` and `rejected_*` are, for pairs, the chosen and the rejected answers [B] each; for
    rankings the best answers [B] and all others [(K − 1)·B], the second-best of every prompt first;
    for single answers the desirable and the undesirable ones.
    """

    loss: Tensor  # [] the mean over pairs, prompts or sequences (+ `router_aux_loss_coef`·aux_loss)
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor  # detached
    rejected_rewards: Tensor  # detached
    aux_loss: Tensor | None  # [] the routers' balancing loss, where the model returned one
    tokens: LinearLogps | None  # detached, each [S, T] (packed: [N]); None without `stats`


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,  # [S, T]
    labels: Tensor | None = None,  # [S, T]
    attention_mask: Tensor | None = None,  # [S, T]
    *,
    shift_labels: Tensor | None = None,  # [S, T]
    per_token: bool = False,
    stats: Sequence[str] = (),
    average_log_prob: bool = False,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    sequence_parallel: SequenceParallel | None = None,
    **model_kwargs: Any,
) -> Tensor | LinearLogps:
    """log p(labels | input_ids) of each sequence under a causal language model of transformers.

    Args:
        model: the model, in whatever it is wrapped for training: PEFT, torch.compile,
            DistributedDataParallel, FSDP (1 and 2), DeepSpeed (to ZeRO-3), transformers' tensor
            parallelism, and several of them. Where it is sharded, all of its processes call.
        input_ids: [S, T] token ids.
        labels: [S, T] Hugging Face labels: the same positions as input_ids (they are shifted here),
            -100 where a token carries no loss.
        attention_mask: [S, T], padding on either side. Models that count positions get
            position_ids made from it, unless given; models that cannot be right about padding on
            the left refuse it.
        shift_labels: [S, T] instead of labels: already shifted, the label of a position is the
            token that it predicts.
        per_token: return [S, T] instead of [S]; column t is about the token at position t (with
            shift_labels: about the one that position t predicts), and 0 where it carries no loss
            (with labels always at position 0, which nothing predicts).
        stats: with per_token, any of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; see
            `fastdpo.loss.linear_logps`. The result is then a `LinearLogps`, every field [S, T].
        average_log_prob: divide by the number of tokens that carry loss.
        temperature, workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.
        sequence_parallel: under sequence or context parallelism, the processes that hold parts of
            the same sequences: input_ids, shift_labels and position_ids (which are to be given) are
            then this process's part, and the model's attention is whatever joins the parts. The
            result is the whole sequences'. Nothing about the order of tokens or about padding is
            asked of the model.
        **model_kwargs: go to the model's forward (pixel_values, position_ids, ...). Or, instead of
            labels, what a batch of `fastdpo.data.PairCollator` has: `sequence_logps(model,
            **batch)`. Of packed rows the result is about the S sequences, with per_token about
            row_labels [N].

    Returns:
        [S] in fp32 (fp64 for fp64 models), differentiable; see per_token and stats.

    Raises:
        ValueError: naming the argument.
        UnsupportedModel: a ValueError; the model is no decoder-only causal language model, its
            logits are not what fastdpo computes, or its head cannot be read.
    """
    given = {"labels": labels, "shift_labels": shift_labels, "attention_mask": attention_mask}
    tokens, model_kwargs = take_tokens({"input_ids": input_ids, **given, **model_kwargs})
    row_index = model_kwargs.pop("row_index", None)
    if stats and not per_token:
        raise ValueError(f"stats should come with per_token=True, got {list(stats)} without it")
    if per_token and average_log_prob:
        raise ValueError(
            "average_log_prob should be False with per_token=True, which averages nothing"
        )
    options = TokenOptions(tuple(stats), temperature, workspace_bytes, backend)
    shared = checks.shares_sequences(sequence_parallel)
    check_sequences(shared, tokens, model_kwargs)
    if shared is None:
        examine(model, input_ids.device, labels=tokens.own_labels, **model_kwargs)
    found = rows_with_loss(model, tokens, row_index)
    logps, _ = token_logps(model, tokens, found, options, in_order=shared is None, **model_kwargs)
    if per_token:
        return _at_tokens(tokens, logps) if options.stats else tokens.at_tokens(logps.logps)
    # As the loss adds them, to the bit.
    found = found.to(logps.logps.device)
    segments = found.segments(tokens.cu_seqlens)
    sums = sequence_sums(found.gather(logps.logps.flatten()), segments.rows)
    if shared is not None:
        sums = shared.total(sums)
        segments = dataclasses.replace(segments, lengths=shared.total(segments.lengths))
    return segments.average(sums) if average_log_prob else sums


def dpo_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    ref_model: nn.Module | None = None,
    beta: float = 0.1,
    *,
    ref_adapter: str | None = None,
    objective: str | Sequence[str] | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    reference_free: bool = False,
    router_aux_loss_coef: float | None = None,
    stats: Sequence[str] = (),
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    sequence_parallel: SequenceParallel | None = None,
    data_parallel: DataParallel | None = None,
    num_pairs: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    **objective_options: Any,
) -> DPOOutput:
    """The preference loss of a batch under a causal language model of transformers.

    The batch is S sequences, as the objective wants them: S = 2B for pairs, the B chosen ones
    first; S = K·B for rankings (plackett_luce), the B best ones first; any S for single answers
    (kto, bco), where `desirable` [S] says which of them are.

    The reference is, in this order: none where `reference_free`; the batch's `ref_chosen_logps` and
    `ref_rejected_logps` (`ref_logps` where there are no pairs); `ref_model`; a PEFT model under
    `ref_adapter`. It gets no gradient and has no dropout; the modes, active adapters and
    requires_grad of both models are afterwards what they were.

    Args:
        model: the policy, as in `sequence_logps`.
        batch: TRL's names: `input_ids` [S, T]; `labels` [S, T] (same positions, -100 without loss),
            `completion_mask` [S, T] or `shift_labels` [S, T] (as in `sequence_logps`); optionally
            `attention_mask` [S, T], and the reference's `ref_chosen_logps`, `ref_rejected_logps`
            [B], for rankings and single answers `ref_logps` [S] (sums; averages where
            `average_log_prob`), and `row_index` as `with_row_index` adds it: then nothing waits for
            a GPU, else the number of rows does, once. All other entries go to the models' forward.
            Or a batch of packed rows or shared prompts, as `fastdpo.data.PairCollator` makes it,
            whose S sequences have the same order; the first time a model gets one, its hidden
            states are compared with those of the sequences by themselves. The objective's options
            `desirable` [S] and `sample_weights` [B] may be in the batch.
        ref_model: the reference.
        ref_adapter: the adapter of a PEFT model that makes it the reference, such as a frozen copy
            of the adapter that training continues from; "__base__" is the model without adapters.
            None is the adapter named "ref", as TRL's DPOTrainer names that copy, where there is
            one; the model without adapters where all that it has are active; and an error where it
            has others.
        beta, objective, label_smoothing, average_log_prob, **objective_options: as in
            `fastdpo.loss.linear_dpo_loss`.
        reference_free: the reference's log-ratio is 0. Objectives that define no reference (simpo,
            cpo, orpo) need it.
        router_aux_loss_coef: for mixtures of experts: ask the model for its routers' balancing
            loss, and add it times this. None leaves the model's own configuration alone, and adds
            nothing.
        stats: what to report about every token, as in `sequence_logps`; comes back in `tokens`
            ([N] of packed rows).
        temperature, workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.
        sequence_parallel: as in `sequence_logps`. Every process gets the same loss, and the
            gradient of its own tokens: what all of them hold takes the sum over them, not the mean.
        data_parallel, num_pairs, num_tokens: as in `fastdpo.loss.linear_dpo_loss`: the loss of the
            whole batch, over processes and micro-batches. (The balancing loss of experts is as it
            was.)

    Raises:
        ValueError: naming the argument or the key of the batch.
        UnsupportedModel: a ValueError; see `sequence_logps`. Or the model, or its attention
            implementation, cannot do the batch's layout.
    """
    for name in objective_options:
        if name in _NOT_OBJECTIVES:
            raise ValueError(
                f"{name} should not be given to dpo_loss, whose model and batch determine it"
            )
    batch, of_the_batch = take_options(batch, objective_options)
    resolved = objectives.resolve(
        objective,
        beta=beta,
        label_smoothing=label_smoothing,
        has_reference=not reference_free,
        options={**objective_options, **of_the_batch},
    )
    parts = preference_batch(batch, resolved)
    tokens, model_kwargs = parts.tokens, parts.model_kwargs
    if reference_free and (ref_model is not None or parts.ref_logps is not None):
        raise ValueError("reference_free should be False where a reference is given")
    if ref_model is not None and parts.ref_logps is not None:
        given = reference_keys(resolved)[0]
        raise ValueError(f"ref_model should be None where the batch has {given}")
    if ref_model is not None:
        check_another(model, ref_model)
    known = reference_free or parts.ref_logps is not None
    if ref_adapter is not None and (known or ref_model is not None):
        raise ValueError(
            f"ref_adapter should be None where there is another reference or none, got "
            f"{ref_adapter!r}"
        )
    if router_aux_loss_coef is not None and isinstance(tokens, PackedTokens):
        raise ValueError(
            "router_aux_loss_coef should be None for packed rows: transformers counts the experts' "
            "tokens by a mask of another shape (layout='padded')"
        )
    options = TokenOptions(tuple(stats), temperature, workspace_bytes, backend, logging=True)
    checks.flag("average_log_prob", average_log_prob)
    shared = checks.sequence_parallel(sequence_parallel, resolved)
    check_sequences(shared, tokens, model_kwargs)
    count = tokens.num_sequences // resolved.num_candidates
    loss = LossCall(
        resolved,
        average_log_prob,
        cu_seqlens=tokens.cu_seqlens,
        sequence_parallel=shared,
        normalization=checks.normalization(num_pairs, num_tokens, data_parallel, resolved, count),
    )
    if shared is None:  # before the reference is computed
        examine(model, tokens.input_ids.device, labels=tokens.own_labels, **model_kwargs)
    found = rows_with_loss(model, tokens, parts.row_index)
    run = functools.partial(token_logps, in_order=shared is None)

    reference = Reference(parts.ref_logps)
    if not known:
        keys = reference_keys(resolved)
        with as_reference(model, ref_model, ref_adapter, keys) as ref:
            logps, _ = run(ref, tokens, found, options.with_stats(), **model_kwargs)
        reference = Reference(logps.logps, per_token=True)
    if router_aux_loss_coef is not None:
        model_kwargs = {**model_kwargs, "output_router_logits": True}
    asked = options.with_stats(*loss.stats(options.stats))
    logps, aux_loss = run(model, tokens, found, asked, **model_kwargs)

    output = tokens_loss(logps, found, reference, loss, backend)
    total = output.loss
    if router_aux_loss_coef is not None:
        if aux_loss is None:
            raise ValueError(
                "router_aux_loss_coef should be None: the model returned no balancing loss "
                "(no mixture of experts?)"
            )
        total = total + router_aux_loss_coef * aux_loss.to(total.device)
    return DPOOutput(
        total,
        output.chosen_logps,
        output.rejected_logps,
        output.chosen_rewards,
        output.rejected_rewards,
        aux_loss,
        _at_tokens(tokens, logps, options.stats) if options.stats else None,
    )


# Of whatever objective: pairs, rankings, single answers.
preference_loss = dpo_loss


def _at_tokens(
    tokens: Tokens | PackedTokens,
    logps: LinearLogps,  # [S, T] each, of packed rows [N]
    stats: tuple[str, ...] | None = None,
) -> LinearLogps:
    """Where the labels were given; with `stats`, of these alone and detached."""
    fields = {name: value for name, value in logps._asdict().items() if value is not None}
    if stats is not None:
        fields = {k: v.detach() for k, v in fields.items() if k == "logps" or k in stats}
    return LinearLogps(**{name: tokens.at_tokens(value) for name, value in fields.items()})
