"""A model and a batch to the log-probabilities of its tokens: what `fastdpo.integrations.hf` and
`fastdpo.integrations.trl` have in common.

They are computed where the model calls its head, and leave through its output
(`fastdpo.integrations.forward`); sequences and losses are made of them outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import Head
from ..core import checks, rows, step
from ..core.autograd import is_traced
from ..core.call import Call, LossCall
from ..core.picked import picked
from ..core.results import LinearDPOOutput, LinearLogps
from ..core.rows import Rows
from ..core.step import Reference
from .batches import IGNORE_INDEX, Tokens
from .forward import AUX_LOSS, answered, examine
from .heads import HeadReader
from .layout_check import check_layout
from .packing import PackedTokens, check_attention
from .tap import Answer, Answers, AtHead
from .unwrap import causal_lm

_FIELDS = LinearLogps._fields


@dataclass(frozen=True)
class TokenOptions:
    """How to compute them: as in `fastdpo.loss.linear_logps`, and checked like there."""

    stats: tuple[str, ...] = ()
    temperature: float = 1.0
    workspace_bytes: int | None = None
    backend: str | None = None
    fp32_head: bool = False  # multiply in fp32, whatever the model and autocast say
    logging: bool = False  # the statistics are for logging: without their gradient

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", checks.stats(self.stats))
        checks.is_number("temperature", self.temperature, positive=True)
        checks.workspace_bytes(self.workspace_bytes)
        checks.backend(self.backend)

    def with_stats(self, *stats: str) -> TokenOptions:
        return dataclasses.replace(self, stats=stats)

    def operands(self, at: AtHead) -> tuple[Tensor, Head]:
        """Hidden states and head, checked."""
        head = at.head
        tensors: Any = (at.hidden, head.weight, head.bias, head.extra)
        if self.fp32_head:
            tensors = [None if t is None else t.float() for t in tensors]
        hidden, weight, bias, extra = tensors
        head = checks.lm_head(
            hidden,
            weight,
            bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            temperature=self.temperature,
            extra=extra,
        )
        return hidden, head


def find_rows(
    model: nn.Module,
    shifted_labels: Tensor,  # [S, T]
    row_index: Tensor | None = None,  # [N], as `with_row_index` adds it
) -> Rows:
    """The positions that predict a token with loss: on a GPU, the one wait of a step, for policy
    and reference, and before either runs.

    Raises:
        ValueError: a label lies outside the model's vocabulary, or row_index leaves some out.
    """
    index = None if row_index is None else row_index.to(shifted_labels.device)
    found = rows.find(shifted_labels, IGNORE_INDEX, _vocab_size(model), index)
    if index is not None:
        _check_all_named(index, shifted_labels)
    return found


def _check_all_named(
    row_index: Tensor,  # [N]
    shifted_labels: Tensor,  # [S, T]
) -> None:
    """A batch may have been cut, or its labels changed, since `with_row_index`. Nothing waits for a
    GPU.

    Raises:
        ValueError: tokens with loss would be left out.
    """
    if is_traced(shifted_labels):
        return
    message = (
        "row_index should name every position that predicts a token with loss: take a batch whole, "
        "or let with_row_index find them again"
    )
    same = (shifted_labels != IGNORE_INDEX).sum() == row_index.numel()
    if same.is_cuda:
        torch._assert_async(same, message)
    elif same.is_cpu and not bool(same):
        raise ValueError(message)


def rows_with_loss(
    model: nn.Module,
    tokens: Tokens | PackedTokens,
    row_index: Tensor | None = None,  # [N]
) -> Rows:
    """`find_rows`, of a batch of either kind: those of packed rows are known."""
    if isinstance(tokens, PackedTokens):
        return tokens.found(_vocab_size(model))
    return find_rows(model, tokens.shifted, row_index)


def _vocab_size(model: nn.Module) -> int:
    return HeadReader.of(causal_lm(model)).vocab_size


def token_logps(
    model: nn.Module,
    tokens: Tokens | PackedTokens,
    found: Rows,
    options: TokenOptions,
    **model_kwargs: Any,  # and `in_order` of `answered`
) -> tuple[LinearLogps, Tensor | None]:
    """Per position [S, T], 0 where it predicts nothing with loss (of packed rows: per token with
    loss [N]); and the balancing loss of a mixture of experts, where the model returned one.

    A process without sequences takes part all the same, where others wait for it: the model runs
    on one that carries no loss.

    Raises:
        ValueError: see `fastdpo.integrations.forward.answered`.
    """
    if isinstance(tokens, PackedTokens):
        return _packed_logps(model, tokens, found, options, **model_kwargs)
    count, length = tokens.input_ids.shape
    if count == 0:
        tokens = _stand_in(tokens)
        found = rows.find(tokens.shifted, IGNORE_INDEX, found.vocab_size)
        model_kwargs = {k: v for k, v in model_kwargs.items() if not isinstance(v, Tensor)}
    answer = token_answer(tokens.shifted, found, options)
    answers = answered(
        model, tokens.input_ids, tokens.attention_mask, answer=answer, **model_kwargs
    )
    aux_loss = answers.get(AUX_LOSS)
    if count:
        return logps_of(answers), aux_loss
    logps = logps_of({k: v[:0, :length] for k, v in answers.items() if k != AUX_LOSS})
    return logps, None if aux_loss is None else 0.0 * aux_loss


def _packed_logps(
    model: nn.Module,
    tokens: PackedTokens,
    found: Rows,
    options: TokenOptions,
    **model_kwargs: Any,
) -> tuple[LinearLogps, Tensor | None]:
    answers = answered(
        model,
        tokens.input_ids,
        answer=packed_answer(tokens, found, options),
        **{**model_kwargs, **packed_inputs(model, tokens), "in_order": False},
    )
    return logps_of(answers), answers.get(AUX_LOSS)


def packed_inputs(
    model: nn.Module,
    tokens: PackedTokens,
    forward: Callable[..., Any] | None = None,  # in place of the model's own
) -> dict[str, Any]:
    """Keyword arguments of a forward on packed rows, beside input_ids.

    Raises:
        UnsupportedModel: the model, or its attention, cannot do their layout.
    """
    lm = causal_lm(model)
    check_attention(lm, tokens)
    order = examine(model, tokens.input_ids.device, forward=forward)
    offset = 0 if order is None else order.position_offset or 0
    if order is not None:  # it can be asked
        check_layout(model, tokens, offset, forward)
    return tokens.inputs_for(lm, offset)


def packed_answer(tokens: PackedTokens, found: Rows, options: TokenOptions) -> Answer:
    """`token_answer` of [N]."""
    return token_answer(tokens.row_labels, found, options, row_index=tokens.row_index)


def _stand_in(tokens: Tokens) -> Tokens:
    length = max(1, tokens.input_ids.shape[1])
    input_ids = tokens.input_ids.new_zeros(1, length)
    return Tokens.of(input_ids, None, torch.full_like(input_ids, IGNORE_INDEX), None)


def tokens_loss(
    logps: LinearLogps,  # [S, T] each
    found: Rows,
    reference: Reference,  # per token [S, T], per sequence [S], or none
    loss: LossCall,
    backend: str | None,
) -> LinearDPOOutput:
    device, dtype = logps.logps.device, logps.logps.dtype
    found = found.to(device)
    at_rows = (None if v is None else found.gather(v.flatten()) for v in logps)
    if reference.logps is not None:
        reference = dataclasses.replace(reference, logps=reference.logps.to(device))
    return step.tokens_loss(
        LinearLogps(*at_rows),  # type: ignore[arg-type]
        found,
        reference.known_tokens(found, dtype),
        reference.logps,
        loss,
        backend,
    )


def token_answer(
    shifted_labels: Tensor,  # [S, T], or with row_index [N]
    found: Rows,
    options: TokenOptions,
    columns: int | None = None,
    row_index: Tensor | None = None,  # [N]
) -> Answer:
    """What a head is to compute, and `logps_of` reads: of the first `columns` positions, or of
    those of row_index, which may name one several times."""
    whole, padded = found, found.padded()

    def answer(at: AtHead) -> Answers:
        # A compiled graph takes rows whose number is no shape.
        known = padded if torch.compiler.is_compiling() else whole
        device = at.hidden.device
        # Whoever casts to fp32 has chosen the dtype of the product.
        chosen = options.fp32_head or at.chooses_dtype
        with torch.autocast(device.type, enabled=False) if chosen else nullcontext():
            hidden, head = options.operands(at)
            if row_index is not None:
                hidden = picked(hidden.flatten(0, -2), row_index.to(device))
            labels = checks.labels(shifted_labels.to(device), hidden.shape[:-1], hidden)
            call = Call(
                options.stats,
                options.workspace_bytes,
                options.backend,
                checks.compute_dtype(hidden),
                checks.vocab_parallel(at.vocab_parallel, head),
            )
            here = rows.find(labels, IGNORE_INDEX, call.vocab_size(head), known.to(device))
            tokens = step.at_labels(step.token_logps(hidden, head, here, call), here)
        values = {k: v[..., :columns] for k, v in tokens._asdict().items() if v is not None}
        if options.logging and "entropy" in values:
            values["entropy"] = values["entropy"].detach()
        return values

    return answer


def logps_of(answers: Answers) -> LinearLogps:
    return LinearLogps(**{name: answers[name] for name in _FIELDS if name in answers})
