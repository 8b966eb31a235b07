"""Megatron-LM: what its `GPTModel.forward` takes as `output_processor`.

    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask,
                   output_processor=dpo_loss, output_processor_context={"ref_logps": ref_logps})

The processor is called on the last pipeline stage with the decoder's hidden states [S, B, H] and
the output layer, and what it returns is the model's output. It is here in Megatron-Core since May
2026 (0.20; NVIDIA/Megatron-LM#4686).

The output layer is called, as a module, with what is to be computed as its forward: its hooks then
run, among them the one that waits for its weight where the distributed optimizer overlaps the
gathering of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import checks
from ..core.results import LinearLogps
from ..distributed.head import called
from ..distributed.vocabulary import VocabParallel
from ..loss import linear_dpo_loss, linear_logps

__all__ = ["dpo_loss", "token_logps"]

_IGNORED = -100
_Result = TypeVar("_Result")


class _Head(NamedTuple):
    """What `linear_logps` takes of the output layer, in the layout of the labels."""

    hidden: Tensor  # [B, S, H]
    weight: Tensor  # [V_r, H] this process's rows
    options: dict[str, Any]  # bias, logit_scale, vocab_parallel


def token_logps(  # many parameters: those that Megatron-LM calls it with
    *,
    hidden_states: Tensor,  # [S, B, H], S/tp of them under sequence parallelism
    output_layer: nn.Module,
    output_weight: Tensor | None,  # [V_r, H]
    labels: Tensor,  # [B, S]
    loss_mask: Tensor | None = None,  # [B, S]
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    context: Mapping[str, Any] | None = None,
    config: Any = None,
    inference_context: Any = None,
    **others: Any,
) -> Tensor | dict[str, Tensor]:
    """Per-token log-probabilities as the model's output: an `output_processor`.

    Args:
        hidden_states: [S, B, H] the decoder's, of this process's part of the sequence under
            sequence parallelism (they are gathered here) and context parallelism.
        output_layer: a ColumnParallelLinear; its rows of the vocabulary may be one process's
            part of them.
        output_weight: [V_r, H] the embedding's, where it is shared; None: the layer's own.
        labels: [B, S] as Megatron-LM has them: the label of a position is the token to predict
            there.
        loss_mask: [B, S]; positions where it is 0 carry no loss, all others do, alike. None: all.
        scale_logits: MuP's, a multiplication.
        context: the caller's `output_processor_context`: any of temperature, stats,
            workspace_bytes and backend, as in `fastdpo.loss.linear_logps`.
        config, inference_context: the model's.
        **others: what else a model hands over. There are no logits here to gather, and nothing
            reads the rest.

    Returns:
        [B, S] in fp32, 0 where there is no loss; with stats a dict of "logps" and of each of them.

    Raises:
        ValueError: naming the argument: without labels, in inference, with an output layer that is
            sharded in another way than by rows, and for what `linear_logps` refuses.
    """
    given = _given(context, ("temperature", "stats", "workspace_bytes", "backend"))
    targets = _targets(labels, loss_mask)

    def compute(head: _Head) -> Tensor | dict[str, Tensor]:
        return _tokens(linear_logps(head.hidden, head.weight, targets, **head.options, **given))

    _check(output_layer, config, inference_context)
    return _in_layer(output_layer, hidden_states, output_weight, scale_logits, compute)


def dpo_loss(  # many parameters: those that Megatron-LM calls it with
    *,
    hidden_states: Tensor,  # [S, 2B, H], S/tp of them under sequence parallelism
    output_layer: nn.Module,
    output_weight: Tensor | None,  # [V_r, H]
    labels: Tensor,  # [2B, S]
    loss_mask: Tensor | None = None,  # [2B, S]
    packed_seq_params: Any = None,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    context: Mapping[str, Any] | None = None,
    config: Any = None,
    inference_context: Any = None,
    **others: Any,
) -> dict[str, Tensor]:
    """The preference loss of a micro-batch of whole pairs as the model's output: an
    `output_processor`. The chosen sequences come first, then the rejected ones.

    Args:
        hidden_states, output_layer, output_weight, labels, loss_mask, scale_logits, config: as in
            `token_logps`.
        inference_context: as in `token_logps`.
        packed_seq_params: of sequences one after the other, hidden_states [N, 1, H] and labels
            [1, N]: their boundaries, with padding between them where they have it (`loss_mask` is
            then 0 there).
        context: the caller's `output_processor_context`: options of `fastdpo.loss.linear_dpo_loss`.
            ref_logps is what `token_logps` found with the reference, [2B, S], or sums [2B]. Under
            context parallelism sequence_parallel is to be given.
        **others: as in `token_logps`.

    Returns:
        loss [], chosen_logps, rejected_logps, chosen_rewards and rejected_rewards [B], by name: a
        dict passes through Megatron-LM's wrappers as it is.

    Raises:
        ValueError: as `token_logps`; where context parallelism cuts sequences and context has no
            sequence_parallel, or they are packed; and for what `linear_dpo_loss` refuses.
    """
    given = dict(context or {})
    _refuse_taken(given)
    targets = _targets(labels, loss_mask)
    cuts = (getattr(config, "context_parallel_size", 1) or 1) > 1
    packed = packed_seq_params is not None
    if cuts and given.get("sequence_parallel") is None:
        should = "with sequence_parallel=SequenceParallel.over(group) of context parallelism"
        checks.fail("output_processor_context", should, sorted(given))
    if cuts and packed:
        checks.fail("packed_seq_params", "None under context parallelism", "packed sequences")
    if packed:
        padded = packed_seq_params.cu_seqlens_q_padded
        given["cu_seqlens"] = packed_seq_params.cu_seqlens_q if padded is None else padded
        targets = targets[0]
        if given.get("ref_logps") is not None and given["ref_logps"].dim() == 2:
            given["ref_logps"] = given["ref_logps"][0]

    def compute(head: _Head) -> dict[str, Tensor]:
        hidden = head.hidden[0] if packed else head.hidden
        out = linear_dpo_loss(hidden, head.weight, targets, **head.options, **given)
        return {name: value for name, value in out._asdict().items() if name != "tokens"}

    _check(output_layer, config, inference_context)
    return _in_layer(output_layer, hidden_states, output_weight, scale_logits, compute)


def _given(context: Mapping[str, Any] | None, allowed: tuple[str, ...]) -> dict[str, Any]:
    given = dict(context or {})
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        checks.fail("output_processor_context", f"options among {list(allowed)}", unknown)
    return given


def _refuse_taken(given: Mapping[str, Any]) -> None:
    taken = ("bias", "logit_scale", "vocab_parallel", "cu_seqlens", "ref_hidden", "stats")
    found = sorted(set(given) & set(taken))
    if found:
        should = "without what the model determines, and with ref_logps for a reference"
        checks.fail("output_processor_context", should, found)


def _targets(labels: Tensor | None, loss_mask: Tensor | None) -> Tensor:  # [B, S]
    if labels is None:
        checks.fail("labels", "given to the model with this output_processor", "None")
    if loss_mask is None:
        return labels
    if loss_mask.shape != labels.shape:
        checks.fail(
            "loss_mask", f"of labels' shape {checks.shape(labels)}", checks.shape(loss_mask)
        )
    return labels.masked_fill(loss_mask == 0, _IGNORED)


def _check(layer: Any, config: Any, inference_context: Any) -> None:
    if inference_context is not None:
        checks.fail("inference_context", "None: this output_processor is for training", "one")
    if getattr(config, "defer_embedding_wgrad_compute", False):
        should = "False: the gradient of the output layer is not put off here"
        checks.fail("config.defer_embedding_wgrad_compute", should, "True")
    if not hasattr(layer, "tp_group"):
        checks.fail("output_layer", "Megatron-Core's ColumnParallelLinear", type(layer).__name__)


def _in_layer(
    layer: Any,
    hidden_states: Tensor,  # [S, B, H]
    output_weight: Tensor | None,  # [V_r, H]
    scale_logits: Callable[[Tensor], Tensor] | None,
    compute: Callable[[_Head], _Result],
) -> _Result:
    """`layer(hidden_states)`, with `compute` as its forward."""
    return called(
        layer,
        lambda hidden: compute(_head(layer, hidden, output_weight, scale_logits)),
        hidden_states,
    )


def _head(
    layer: Any,
    hidden: Tensor,  # [S, B, H]
    output_weight: Tensor | None,  # [V_r, H]
    scale_logits: Callable[[Tensor], Tensor] | None,
) -> _Head:
    weight = layer.weight if output_weight is None else output_weight
    rows = getattr(layer, "output_size_per_partition", weight.shape[0])
    if weight.shape[0] != rows:
        should = f"with {rows} rows in each process, not sharded any further"
        checks.fail("output_layer", should, f"a weight of {checks.shape(weight)}")
    if layer.sequence_parallel:
        hidden = _gathered(hidden, layer.tp_group)
    size = 1 if layer.tp_group is None else dist.get_world_size(layer.tp_group)
    shared = None
    if size > 1:
        # The gradient of what was gathered is added up where it is scattered again.
        own_part = layer.sequence_parallel or getattr(layer, "disable_grad_reduce", False)
        shared = VocabParallel.of(
            [weight.shape[0]] * size, layer.tp_group, reduce_hidden_grad=not own_part
        )
    bias = None if layer.skip_bias_add else layer.bias
    options = {"bias": bias, "logit_scale": _scale(scale_logits), "vocab_parallel": shared}
    return _Head(hidden.transpose(0, 1), weight, options)


def _scale(scale_logits: Callable[[Tensor], Tensor] | None) -> float:
    """The factor that it is, on logits of which one knows what becomes of them."""
    if scale_logits is None:
        return 1.0
    given = torch.tensor([1.0, -3.0, 1e3], dtype=torch.float64)
    found = scale_logits(given)
    if not torch.equal(found, given * found[0]):
        checks.fail("scale_logits", "a multiplication", found.tolist())
    return float(found[0])


def _gathered(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    whole = gather_from_sequence_parallel_region(
        hidden, tensor_parallel_output_grad=True, group=group
    )
    return cast(Tensor, whole)


def _tokens(found: Tensor | LinearLogps) -> Tensor | dict[str, Tensor]:
    if isinstance(found, Tensor):
        return found
    return {name: value for name, value in found._asdict().items() if value is not None}
