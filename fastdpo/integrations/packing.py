"""Batches whose rows hold several sequences (`fastdpo.data`): what they consist of, and what a
model's attention has to be told about them.

A token sees the tokens before it in its row that are of its document, and there of the prompt or of
its own answer. Models are told so in the way that their attention implementation takes it: a mask
[R, 1, T, T] for SDPA and eager attention, a block mask for FlexAttention, the sequences' ends for
flash-attn. Where layers of several kinds alternate there is a mask for each kind; distances, for
sliding windows and chunks, are between positions in the sequence and not in the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import rows
from ..core.rows import Rows
from .unwrap import UnsupportedModel

_NEEDED = ("position_ids", "document_ids", "row_index", "row_labels", "row_lengths")
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_OWN = ("document_ids", "branch_ids", "row_labels", "row_lengths")  # no other batch has them
_OTHERS = ("labels", "completion_mask", "shift_labels", "attention_mask", "token_type_ids")
PACKED_IDS = "packed_input_ids"
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """In the place of `fastdpo.integrations.batches.Tokens`."""

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T] each token's place in its sequence
    document_ids: Tensor  # [R, T], negative for padding
    branch_ids: Tensor | None  # [R, T] 0 of a prompt, k of the k-th answer behind it; None: all 0
    row_index: Tensor  # [N] position among the R·T that predicts each token with loss
    row_labels: Tensor  # [N] the token
    row_lengths: Tensor  # [S] how many of them each sequence has
    varlen: dict[str, Any]  # flash-attn's arguments, or nothing

    # As `Tokens` has them.
    labels = None
    own_labels = None
    attention_mask = None

    @classmethod
    def take(cls, rest: dict[str, Any]) -> PackedTokens | None:
        """Taken out of a batch; None where it is of another kind.

        Raises:
            ValueError: naming the key that is missing, superfluous or of the wrong shape.
        """
        if not any(rest.get(key) is not None for key in _OWN):
            return None
        for key in ("input_ids", *_NEEDED):
            if not isinstance(rest.get(key), Tensor):
                raise ValueError(
                    f"batch of packed rows should have the tensor {key!r}, as "
                    f"fastdpo.data.PairCollator makes it, got {sorted(rest)}"
                )
        for key in _OTHERS:
            if rest.get(key) is not None:
                raise ValueError(
                    f"batch of packed rows should not have {key!r}: its labels are row_labels, and "
                    "its mask is made from document_ids"
                )
        input_ids = rest.pop("input_ids")
        branch_ids = rest.pop("branch_ids", None)
        found = {key: rest.pop(key) for key in _NEEDED}
        for key in ("attention_mask", *_OTHERS):
            rest.pop(key, None)
        varlen = {key: rest.pop(key) for key in _VARLEN if rest.get(key) is not None}
        tokens = cls(input_ids=input_ids, branch_ids=branch_ids, varlen=varlen, **found)
        tokens._check()
        return tokens

    @classmethod
    def beside(cls, rest: dict[str, Any]) -> PackedTokens | None:
        """Taken out of a trainer's batch, whose `input_ids` are the answers by themselves, padded:
        the rows are then under `packed_input_ids`. None where there are none."""
        input_ids = rest.pop(PACKED_IDS, None)
        if input_ids is None:
            return None
        keys = (*_NEEDED, "branch_ids", *_VARLEN)
        own = {key: rest.pop(key) for key in keys if rest.get(key) is not None}
        return cls.take({"input_ids": input_ids, **own})

    def _check(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2:
            raise ValueError(f"input_ids should have the shape [R, T], got {tuple(shape)}")
        for key in ("position_ids", "document_ids", "branch_ids"):
            value = getattr(self, key)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{key} should have the shape of input_ids, {tuple(shape)}, got "
                    f"{tuple(value.shape)}"
                )
        index, labels, lengths = self.row_index, self.row_labels, self.row_lengths
        if index.ndim != 1 or index.shape != labels.shape or lengths.ndim != 1:
            raise ValueError(
                "row_index and row_labels should have one shape [N], and row_lengths [S], got "
                f"{tuple(index.shape)}, {tuple(labels.shape)} and {tuple(lengths.shape)}"
            )
        if index.is_cpu and bool(((index < 0) | (index >= shape.numel())).any()):
            raise ValueError(f"row_index should be positions in [0, {shape.numel()})")
        should = f"row_lengths should add up to the {index.shape[0]} rows of row_labels"
        if lengths.is_cpu and int(lengths.sum()) != index.shape[0]:
            raise ValueError(f"{should}, got {int(lengths.sum())}")
        if lengths.is_cuda:  # nothing waits
            torch._assert_async(lengths.sum() == index.shape[0], should)

    @property
    def num_sequences(self) -> int:
        return self.row_lengths.shape[0]

    @property
    def layout(self) -> str:
        return "packed" if self.branch_ids is None else "shared_prompts"

    @property
    def cu_seqlens(self) -> Tensor:  # [S + 1]
        return F.pad(self.row_lengths.cumsum(0), (1, 0))

    def found(self, vocab_size: int) -> Rows:
        return rows.every_label(self.row_labels, vocab_size)

    def at_tokens(self, values: Tensor) -> Tensor:  # [N] -> [N]
        return values

    def inputs_for(self, lm: Any, position_offset: int) -> dict[str, Any]:
        """Keyword arguments of the model's forward, beside input_ids; `check_attention` comes
        before."""
        mask = _attention_mask(lm, self)
        inputs = {"position_ids": self.position_ids + position_offset, **self.varlen}
        if getattr(lm.config.get_text_config(), "output_router_logits", False):
            # For the experts' balancing loss, which nobody can ask for here, and whose mask is 2-D.
            inputs["output_router_logits"] = False
        return inputs if mask is None else {**inputs, "attention_mask": mask}


@dataclass(frozen=True)
class _Kind:
    """Of a layer: which of a document's tokens it looks at."""

    window: int | None = None
    chunk: int | None = None


def _attention_mask(lm: Any, tokens: PackedTokens) -> Any:
    kinds, implementation = kinds_of(lm), attention_of(lm)
    if _is_flash(implementation):
        return None
    if implementation == "flex_attention":
        masks = {name: _block_mask(tokens, kind) for name, kind in kinds.items()}
    elif implementation == "sdpa":
        masks = {name: visible(tokens, kind)[:, None] for name, kind in kinds.items()}
    else:
        masks = {name: _additive(visible(tokens, kind), lm.dtype) for name, kind in kinds.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def check_attention(lm: nn.Module, tokens: PackedTokens) -> None:
    """
    Raises:
        UnsupportedModel: the model's attention implementation cannot do the layout, or not as the
            batch has it.
    """
    _check_temperatures(lm, tokens)
    implementation = attention_of(lm)
    if _is_flash(implementation):
        _check_varlen(implementation, tokens)
    elif implementation not in ("sdpa", "eager", "flex_attention"):
        raise UnsupportedModel(
            f"model: its attention implementation {implementation!r} cannot do layout="
            f"{tokens.layout!r}: load it with attn_implementation='sdpa', 'eager', "
            "'flex_attention' or, for packed rows, 'flash_attention_2'; or use layout='padded'"
        )
    elif tokens.varlen:
        raise UnsupportedModel(
            f"model: its attention implementation is {implementation!r}, and the batch was made "
            f"for flash-attn: give PairCollator attention={implementation!r}"
        )
    elif implementation == "flex_attention" and tokens.input_ids.is_cpu and torch.is_grad_enabled():
        raise UnsupportedModel(
            "model: FlexAttention has no backward on a CPU: load the model with "
            "attn_implementation='sdpa'"
        )


def _check_temperatures(lm: Any, tokens: PackedTokens) -> None:
    """Llama 4's layers without rotations scale attention by the place in the row, which shows from
    `floor_scale` tokens on."""
    config, length = lm.config.get_text_config(), tokens.input_ids.shape[1]
    scale = getattr(config, "floor_scale", None)
    if getattr(config, "attn_temperature_tuning", False) and scale is not None and length >= scale:
        raise UnsupportedModel(
            f"model: {type(lm).__name__} scales its attention by a token's place in the row, where "
            f"rows have {scale} tokens or more, got {length}: make rows shorter (fewer examples, "
            f"or attention='sdpa' in PairCollator), or use layout='padded' instead of "
            f"{tokens.layout!r}"
        )


def _is_flash(implementation: str) -> bool:
    """transformers' own, or a kernel of the Hub."""
    return "flash" in implementation


def attention_of(lm: Any) -> str:
    """The attention implementation of a model's layers."""
    return getattr(lm.config.get_text_config(), "_attn_implementation", None) or "eager"


def kinds_of(lm: Any) -> dict[str, _Kind]:
    """The kinds of a model's layers, by transformers' names.

    Raises:
        UnsupportedModel: it has some that look at a row in another way.
    """
    config = lm.config.get_text_config()
    window, chunk = (getattr(config, k, None) for k in ("sliding_window", "attention_chunk_size"))
    names = getattr(config, "layer_types", None)
    if names is None:
        names = ("full_attention",) if window is None else ("sliding_attention",)
    found = {}
    for name in sorted(set(names)):
        if name not in _KINDS:
            raise UnsupportedModel(
                f"model: {type(lm).__name__} has layers of kind {name!r}, which know no documents "
                "in a row: use layout='padded'"
            )
        found[name] = _Kind(
            window if name == "sliding_attention" else None,
            chunk if name == "chunked_attention" else None,
        )
    return found


def _check_varlen(implementation: str, tokens: PackedTokens) -> None:
    if tokens.branch_ids is not None:
        raise UnsupportedModel(
            f"model: its attention implementation {implementation!r} cannot do layout="
            "'shared_prompts': load the model with attn_implementation='flex_attention' or "
            "'sdpa', or use layout='packed'"
        )
    if len(tokens.varlen) != len(_VARLEN) or tokens.input_ids.shape[0] != 1:
        raise UnsupportedModel(
            f"model: its attention implementation {implementation!r} takes packed rows as one row "
            f"with the ends of its sequences: give PairCollator attention={implementation!r}"
        )


def visible(tokens: PackedTokens, kind: _Kind) -> Tensor:  # [R, T, T] bool
    """Which token (row of the mask) sees which (column)."""
    columns = torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)
    query, key = columns[:, None], columns[None, :]
    document = tokens.document_ids
    seen = (document[:, :, None] == document[:, None, :]) & (key <= query)
    if tokens.branch_ids is not None:
        of_query, of_key = tokens.branch_ids[:, :, None], tokens.branch_ids[:, None, :]
        seen &= (of_key == 0) | (of_key == of_query)
    if kind.window is not None:
        place = tokens.position_ids
        seen &= place[:, :, None] - place[:, None, :] < kind.window
    if kind.chunk is not None:
        chunk = tokens.position_ids // kind.chunk
        seen &= chunk[:, :, None] == chunk[:, None, :]
    return seen


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:  # [R, T, T] -> [R, 1, T, T]
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _block_mask(tokens: PackedTokens, kind: _Kind) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    document, branch, place = tokens.document_ids, tokens.branch_ids, tokens.position_ids

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (document[b, query] == document[b, key]) & (key <= query)
        if branch is not None:
            seen = seen & ((branch[b, key] == 0) | (branch[b, key] == branch[b, query]))
        if kind.window is not None:
            seen = seen & (place[b, query] - place[b, key] < kind.window)
        if kind.chunk is not None:
            seen = seen & (place[b, query] // kind.chunk == place[b, key] // kind.chunk)
        return seen

    count, length = tokens.input_ids.shape
    device = tokens.input_ids.device
    compiled = device.type == "cuda"  # else the mask exists in full while it is made
    return create_block_mask(
        mask_mod, count, None, length, length, device=str(device), _compile=compiled
    )


def refuse_restarts(
    position_ids: Any,  # [S, T] where it is that
    attention_mask: Tensor | None,  # [S, T]
    model_kwargs: Mapping[str, Any],
) -> None:
    """Several sequences in a row of a batch that says nothing of it: their tokens would see those
    of the sequences before them, and their log-probabilities be added to one sum.

    Raises:
        ValueError: positions start again in the middle of a row. On a GPU nothing waits: there it
            is a device-side assertion.
    """
    should = (
        "position_ids should not start again within a row: sequences that are packed into rows "
        "are told apart by what fastdpo.data.PairCollator(layout='packed') adds to a batch"
    )
    if any(model_kwargs.get(key) is not None for key in _VARLEN):
        raise ValueError(
            "batch should come from fastdpo.data.PairCollator(layout='packed', "
            "attention='flash_attention_2') where it has cu_seq_lens_q"
        )
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return
    if position_ids.shape[1] < 2:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        real = attention_mask.bool().to(position_ids.device)
        falls = falls & real[:, 1:] & real[:, :-1]
    if position_ids.device.type != "cpu":
        torch._assert_async(~falls.any(), should)
    elif bool(falls.any()):
        raise ValueError(should)
