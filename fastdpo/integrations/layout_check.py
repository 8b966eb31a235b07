"""Is a model right about rows that hold several sequences? Found out once per model.

What is known to be wrong is refused by its name: layers that carry a state along the row, which no
mask interrupts (state-space, linear attention, convolutions), and positions that are counted from a
mask (ALiBi). Whatever else is asked: two prompts with two answers each, of a few tokens, once as
the layout has them and once as padded sequences, have the same hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..data.layouts import documents_of, rows_of, varlen
from .forward import listener, takes_positions
from .order import eagerly, ordinary_tokens
from .packing import PackedTokens, attention_of, kinds_of
from .positions import positions
from .reference import without_dropout
from .unwrap import UnsupportedModel, causal_lm, is_prompted

# The largest difference, as a part of a hidden state's norm: fp32, and 16 bits or TF32. There the
# median over an answer is taken: a mixture of experts chooses others where two are nearly equal.
_TOLERANCE = (1e-4, 5e-2)
_PROMPTS, _ANSWERS = (7, 5), ((4, 6), (5, 3))  # tokens
_LONGEST_WINDOW = 512  # that the check reaches beyond

_RECURRENT = re.compile(
    r"Mamba|Mixer2|SSM|S4|Rwkv|RWKV|GatedDelta|LinearAttention|LightningAttention|ShortConv|"
    r"RecurrentBlock|RecurrentGemma|LSTM|Retention|Hyena|DeltaNet"
)

_known: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def check_layout(
    model: nn.Module,
    tokens: PackedTokens,
    position_offset: int,
    forward: Callable[..., Any] | None = None,  # in place of the model's own
) -> None:
    """
    Raises:
        UnsupportedModel: its hidden states would not be those of the sequences by themselves.
    """
    lm: Any = causal_lm(model)
    name = type(lm).__name__
    use = f"use layout='padded' instead of {tokens.layout!r}"
    if is_prompted(model):
        raise UnsupportedModel(
            "model: an adapter puts virtual tokens before each row, not before each sequence: "
            + use
        )
    device_type = tokens.input_ids.device.type
    autocast = torch.is_autocast_enabled(device_type)
    key = (
        attention_of(lm),
        tokens.layout,
        bool(tokens.varlen),
        torch.get_autocast_dtype(device_type) if autocast else lm.dtype,
        tokens.input_ids.device,
    )
    if key in _known.get(lm, ()):
        return
    reason = _refusal(lm, tokens)
    if reason is not None:
        raise UnsupportedModel(f"model: {name} {reason}: {use}")
    trial, padded, mask = _trial(lm, tokens)
    listen = listener(model, forward)
    with torch.no_grad(), without_dropout(lm), eagerly(tokens.input_ids.device):
        expected = listen(
            input_ids=padded,
            attention_mask=mask,
            position_ids=positions(mask, position_offset),
        )
        try:
            found = listen(input_ids=trial.input_ids, **trial.inputs_for(lm, position_offset))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, (torch.OutOfMemoryError, UnsupportedModel)):
                raise
            kind = type(error).__name__
            raise UnsupportedModel(
                f"model: {name} fails on rows of layout={tokens.layout!r} ({kind}: {error}): {use}"
            ) from error
    if expected is None or found is None:
        raise UnsupportedModel(f"model: {name} gives its head no hidden states [S, T, D]: {use}")
    expected = expected[_predicting(trial, mask)].double()  # [N, D]
    found = found.flatten(0, 1)[trial.row_index].double()
    if not expected.isfinite().all():
        return  # weights that are no numbers yet
    away = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    exact = _is_exact(lm, tokens.input_ids.device)
    worst = _worst(away, trial.row_lengths, exact)
    if not worst <= _TOLERANCE[not exact]:
        raise UnsupportedModel(
            f"model: {name} is not right about rows of layout={tokens.layout!r}: its hidden states "
            f"are {worst:.1e} (of their norm) away from those of the same sequences by themselves: "
            f"{use}"
        )
    if _tells(expected, trial.row_lengths):
        _known.setdefault(lm, set()).add(key)


def _is_exact(lm: Any, device: torch.device) -> bool:
    if torch.is_autocast_enabled(device.type) or lm.dtype.itemsize == 2:
        return False
    library = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return library.matmul.fp32_precision not in ("tf32", "bf16")


def _worst(away: Tensor, lengths: Tensor, exact: bool) -> float:  # [N], [S]
    if exact:
        return float(away.max())
    return max(float(part.median()) for part in away.split(lengths.tolist()))


def _tells(expected: Tensor, lengths: Tensor) -> bool:
    """Do the prompts show in the answers? Weights that are still zero tell nothing. The first
    answers of both prompts begin with the same tokens."""
    first = expected.split(lengths.tolist())
    a, b = first[0][1:3], first[1][1:3]
    return bool(((a - b).norm(dim=-1) > 1e-6 * a.norm(dim=-1)).any())


def _trial(lm: Any, like: PackedTokens) -> tuple[PackedTokens, Tensor, Tensor]:
    """Rows of the layout; the same sequences padded on the right, and their mask."""
    config = lm.config.get_text_config()
    windows = [kind.window or kind.chunk or 0 for kind in kinds_of(lm).values()]
    # What layers have beside their kind's mask.
    named = config.to_dict().items()
    windows += [v for k, v in named if "window" in k and type(v) is int]
    beyond = max((w for w in windows if w <= _LONGEST_WINDOW), default=0)
    most = getattr(config, "max_position_embeddings", None) or 1 << 30
    longest = max(max(own) for own in _ANSWERS)
    prompts = [max(1, min(count + beyond, most - longest)) for count in _PROMPTS]
    total = sum(prompts) + sum(sum(own) for own in _ANSWERS)
    tokens = ordinary_tokens(lm.config.to_dict(), config.vocab_size, 97) or [0]
    # Neighbours differ, and prompts do.
    drawn = iter([tokens[(i * 31 + i * i * 7) % len(tokens)] for i in range(total)])
    prompt_ids = [[next(drawn) for _ in range(count)] for count in prompts]
    answer_ids = [[[next(drawn) for _ in range(count)] for count in own] for own in _ANSWERS]
    shortest = min(own[0] for own in _ANSWERS)
    answer_ids[1][0][:shortest] = answer_ids[0][0][:shortest]
    rows = rows_of(documents_of(like.layout, prompt_ids, answer_ids), tokens[0], one_row=True)
    device = like.input_ids.device
    given: dict[str, Any] = {}
    if like.varlen:
        lengths = [
            len(prompt) + len(answer)
            for prompt, own in zip(prompt_ids, answer_ids, strict=True)
            for answer in own
        ]
        ends = varlen(lengths, rows.input_ids.numel())
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in ends.items()}
    trial = PackedTokens(
        rows.input_ids.to(device),
        rows.position_ids.to(device),
        rows.document_ids.to(device),
        None if like.branch_ids is None else rows.branch_ids.to(device),
        rows.row_index.to(device),
        rows.row_labels.to(device),
        rows.row_lengths,
        given,
    )
    sequences = [
        prompt + own[k]
        for k in range(2)
        for prompt, own in zip(prompt_ids, answer_ids, strict=True)
    ]
    length = max(len(sequence) for sequence in sequences)
    padded = torch.full((len(sequences), length), tokens[0], device=device)
    mask = torch.zeros_like(padded)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence, device=device)
        mask[row, : len(sequence)] = 1
    return trial, padded, mask


def _predicting(trial: PackedTokens, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions of the padded sequences predict the answers."""
    ends = mask.sum(-1).tolist()
    lengths = trial.row_lengths.tolist()
    rows = [s for s, count in enumerate(lengths) for _ in range(count)]
    columns = [ends[s] - 1 - count + j for s, count in enumerate(lengths) for j in range(count)]
    device = mask.device
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def _refusal(lm: Any, tokens: PackedTokens) -> str | None:
    """Why a model cannot have several sequences in a row; None where that is to be seen."""
    if not takes_positions(lm):
        return "takes no position_ids, and cannot be told where a sequence begins"
    config = lm.config.get_text_config()
    alibi = getattr(config, "alibi", False) or "alibi" in str(
        getattr(config, "position_embedding_type", "")
    )
    if alibi or config.model_type in ("bloom", "mpt"):
        return "counts distances along the row (ALiBi)"
    shared = tokens.branch_ids is not None
    if shared and "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        return "counts a local layer's window along the row, across answers"
    for module in _text_modules(lm):
        variants = getattr(module, "lora_variant", None)
        if isinstance(variants, dict) and any(map(_begins_in_the_row, variants.values())):
            return "has an adapter that begins at a place in each row (aLoRA)"
        if isinstance(module, (nn.Conv1d, nn.RNNBase)) or _RECURRENT.search(type(module).__name__):
            return (
                "carries a state along the row, which no mask interrupts (a "
                f"{type(module).__name__})"
            )
    return None


def _begins_in_the_row(variant: Any) -> bool:
    return type(variant).__name__.startswith("ALora")


def _text_modules(lm: Any) -> Iterator[nn.Module]:
    several = lm.config.get_text_config() is not lm.config
    decoder = lm.get_decoder() if several and hasattr(lm, "get_decoder") else lm
    yield from decoder.modules()
