"""Hugging Face causal language models: sequence log-probabilities and preference losses, without
their logits.

    sequence_logps    a model and a batch of sequences to their log-probabilities
    dpo_loss          a model, its reference and a batch (pairs, rankings, single answers) to the
                      loss
    with_row_index    a batch to one whose loss waits for nothing on a GPU, for collators
    read_head         the model's lm_head, as `fastdpo.loss` takes it
    vocab_parallel    how tensor parallelism spreads it over processes

The backbone runs as the model wrote it, through every wrapper around it, up to the input of its
lm_head (`fastdpo.integrations.capture`); from there on it is `fastdpo.loss`. What the model's
family does to its logits is listed in `fastdpo.integrations.families`, and compared with the
model's own logits on the first call. Whether the model is causal, and how it counts padding, is
asked of it as well (`fastdpo.integrations.order`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import loss as core
from .. import objectives
from ..core import rows
from ..core.rows import Rows
from .batches import (
    IGNORE_INDEX,
    PreferenceBatch,
    check_sequences,
    preference_batch,
    reference_keys,
    shift_labels,
    unshift,
    with_row_index,
)
from .capture import Captured, capture, examine
from .families import FAMILIES, HeadRule
from .heads import hidden_scale, read_head, vocab_parallel
from .reference import reference_adapter, with_adapter, without_dropout
from .unwrap import UnsupportedModel, peft_model

__all__ = [
    "FAMILIES",
    "DPOOutput",
    "HeadRule",
    "UnsupportedModel",
    "dpo_loss",
    "hidden_scale",
    "read_head",
    "sequence_logps",
    "vocab_parallel",
    "with_row_index",
]


# What `linear_dpo_loss` takes and no objective does.
_NOT_OBJECTIVES = frozenset(inspect.signature(core.linear_dpo_loss).parameters)


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
    tokens: core.LinearLogps | None  # detached, each [S, T]; None without `stats`


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,  # [S, T]
    labels: Tensor,  # [S, T]
    attention_mask: Tensor | None = None,  # [S, T]
    *,
    per_token: bool = False,
    stats: Sequence[str] = (),
    average_log_prob: bool = False,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    **model_kwargs: Any,
) -> Tensor | core.LinearLogps:
    """log p(labels | input_ids) of each sequence under a causal language model of transformers.

    Args:
        model: the model; inside DistributedDataParallel, torch.compile or PEFT's wrappers is fine,
            and so is transformers' tensor parallelism (all of its processes call).
        input_ids: [S, T] token ids.
        labels: [S, T] Hugging Face labels: the same positions as input_ids (they are shifted here),
            -100 where a token carries no loss.
        attention_mask: [S, T], padding on either side. Models that count positions get
            position_ids made from it, unless given; models that cannot be right about padding on
            the left refuse it.
        per_token: return [S, T] instead of [S]; column t is about the token at position t, and 0
            where it carries no loss (always at position 0, which nothing predicts).
        stats: with per_token, any of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; see
            `fastdpo.loss.linear_logps`. The result is then a `LinearLogps`, every field [S, T].
        average_log_prob: divide by the number of tokens that carry loss.
        temperature, workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.
        **model_kwargs: go to the model's forward (pixel_values, position_ids, ...).

    Returns:
        [S] in fp32 (fp64 for fp64 models), differentiable; see per_token and stats.

    Raises:
        ValueError: naming the argument.
        UnsupportedModel: a ValueError; the model is no decoder-only causal language model, its
            logits are not what fastdpo computes, or its head cannot be read.
    """
    check_sequences(input_ids, labels, attention_mask)
    if stats and not per_token:
        raise ValueError(f"stats should come with per_token=True, got {list(stats)} without it")
    if per_token and average_log_prob:
        raise ValueError(
            "average_log_prob should be False with per_token=True, which averages nothing"
        )
    examine(model, input_ids.device, labels=labels, **model_kwargs)
    captured = capture(model, input_ids, attention_mask, **model_kwargs)
    shifted = shift_labels(labels).to(captured.hidden.device)
    tokens = captured_logps(
        captured,
        shifted,
        stats=stats,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    if isinstance(tokens, core.LinearLogps):
        return _at_tokens(tokens)
    if per_token:
        return unshift(tokens)
    sums = tokens.sum(-1)
    if average_log_prob:
        sums = sums / (shifted != IGNORE_INDEX).sum(-1).clamp(min=1)
    return sums


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
        batch: TRL's names: `input_ids` [S, T]; `labels` [S, T] (same positions, -100 without loss)
            or `completion_mask` [S, T]; optionally `attention_mask` [S, T], and the reference's
            `ref_chosen_logps`, `ref_rejected_logps` [B], for rankings and single answers
            `ref_logps` [S] (sums; averages where `average_log_prob`), and `row_index` as
            `with_row_index` adds it: then nothing waits for a GPU, else the number of rows does,
            once. All other entries go to the models' forward.
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
        stats: what to report about every token, as in `sequence_logps`; comes back in `tokens`.
        temperature, workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.

    Raises:
        ValueError: naming the argument or the key of the batch.
        UnsupportedModel: a ValueError; see `sequence_logps`.
    """
    for name in objective_options:
        if name in _NOT_OBJECTIVES:
            raise ValueError(
                f"{name} should not be given to dpo_loss, whose model and batch determine it"
            )
    resolved = objectives.resolve(
        objective,
        beta=beta,
        label_smoothing=label_smoothing,
        has_reference=not reference_free,
        options=objective_options,
    )
    parts = preference_batch(batch, resolved)
    found: Rows | Tensor | None = parts.row_index
    if ref_adapter is not None and (
        reference_free or ref_model is not None or parts.ref_logps is not None
    ):
        raise ValueError(
            f"ref_adapter should be None where there is another reference or none, got "
            f"{ref_adapter!r}"
        )
    # Before the reference is computed.
    examine(model, parts.input_ids.device, labels=parts.labels, **parts.model_kwargs)
    if reference_free:
        if ref_model is not None or parts.ref_logps is not None:
            raise ValueError("reference_free should be False where a reference is given")
        ref_logps = None
    elif parts.ref_logps is not None:
        if ref_model is not None:
            given = reference_keys(resolved)[0]
            raise ValueError(f"ref_model should be None where the batch has {given}")
        ref_logps = parts.ref_logps
    else:
        ref_logps, found = _reference_logps(
            model, ref_model, ref_adapter, parts, resolved, temperature, backend
        )
    model_kwargs = dict(parts.model_kwargs)
    if router_aux_loss_coef is not None:
        model_kwargs["output_router_logits"] = True
    captured = capture(model, parts.input_ids, parts.attention_mask, **model_kwargs)
    device = captured.hidden.device
    with _autocast_of_head(captured):
        output = core.linear_dpo_loss(
            captured.hidden,
            captured.head.weight,
            shift_labels(parts.labels).to(device),
            ref_logps=None if ref_logps is None else ref_logps.to(device),
            row_index=None if found is None else found.to(device),
            beta=beta,
            objective=objective,
            label_smoothing=label_smoothing,
            average_log_prob=average_log_prob,
            workspace_bytes=workspace_bytes,
            backend=backend,
            stats=stats,
            **_head_options(captured, temperature),
            **objective_options,
        )
    loss = output.loss
    if router_aux_loss_coef is not None:
        if captured.aux_loss is None:
            raise ValueError(
                "router_aux_loss_coef should be None: the model returned no balancing loss "
                "(no mixture of experts?)"
            )
        loss = loss + router_aux_loss_coef * captured.aux_loss.to(loss.device)
    return DPOOutput(
        loss,
        output.chosen_logps,
        output.rejected_logps,
        output.chosen_rewards,
        output.rejected_rewards,
        captured.aux_loss,
        _at_tokens(output.tokens) if isinstance(output, core.LinearDPOStats) else None,
    )


def captured_logps(
    captured: Captured,
    shifted_labels: Tensor,  # [S, T]
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Tensor | core.LinearLogps:
    """`fastdpo.loss.linear_logps` of one forward's hidden states, under the autocast of its head.

    shifted_labels are aligned with the hidden states; options are those of `linear_logps`.
    """
    with _autocast_of_head(captured):
        return core.linear_logps(
            captured.hidden,
            captured.head.weight,
            shifted_labels.to(captured.hidden.device),
            **_head_options(captured, temperature),
            **options,
        )


@torch.no_grad()
def _reference_logps(
    model: nn.Module,
    ref_model: nn.Module | None,
    ref_adapter: str | None,
    parts: PreferenceBatch,
    resolved: objectives.ResolvedObjective,
    temperature: float,
    backend: str | None,
) -> tuple[Tensor, Rows]:
    """Per token [S, T], aligned with the shifted labels, and the rows that carry loss: found once,
    for the policy as well.
    """
    reference = model if ref_model is None else ref_model
    with ExitStack() as stack:
        if ref_model is None:
            peft = peft_model(model)
            name = reference_adapter(peft, ref_adapter)
            if peft is None:
                keys = " and ".join(reference_keys(resolved))
                raise ValueError(
                    "ref_model should be given: the model is no PEFT model whose adapter could be "
                    f"disabled, and the batch has no {keys} (or pass reference_free=True)"
                )
            stack.enter_context(with_adapter(peft, name))
        stack.enter_context(without_dropout(reference))
        captured = capture(reference, parts.input_ids, parts.attention_mask, **parts.model_kwargs)
        labels = shift_labels(parts.labels).to(captured.hidden.device)
        found = find_rows(labels, captured.vocab_size, parts.row_index)
        logps = captured_logps(
            captured, labels, row_index=found, temperature=temperature, backend=backend
        )
    assert isinstance(logps, Tensor)  # no stats were asked for
    return logps, found


def find_rows(
    shifted_labels: Tensor,  # [S, T]
    vocab_size: int,
    row_index: Tensor | None = None,  # [N], as `with_row_index` adds it
) -> Rows:
    """The positions that predict a token with loss: on a GPU, the one wait of a step, for policy
    and reference.

    Raises:
        ValueError: a label lies outside the vocabulary.
    """
    index = None if row_index is None else row_index.to(shifted_labels.device)
    return rows.find(shifted_labels, IGNORE_INDEX, vocab_size, index)


def _at_tokens(tokens: core.LinearLogps) -> core.LinearLogps:
    """From the positions that predict to the positions that are predicted."""
    fields = {name: value for name, value in tokens._asdict().items() if value is not None}
    return core.LinearLogps(**{name: unshift(value) for name, value in fields.items()})


def _head_options(captured: Captured, temperature: float) -> dict[str, Any]:
    head = captured.head
    return {
        "bias": head.bias,
        "logit_scale": head.scale,
        "softcap": head.softcap,
        "temperature": temperature,
        "vocab_parallel": captured.vocab_parallel,
    }


def _autocast_of_head(captured: Captured) -> torch.autocast:
    """The autocast that the model's own head ran under: accelerate's begins and ends inside the
    forward."""
    dtype = captured.autocast_dtype
    return torch.autocast(captured.hidden.device.type, dtype=dtype, enabled=dtype is not None)
