"""What a model does with the order of its tokens, asked once per model, of a few short rows.

    causal          does a token change what stands before it? (encoders, masked language models)
    position_offset how its position_ids count, where it should be given any
    left_padding    is a sequence that is padded on the left worth what it is worth alone?

The models of transformers answer these in many ways (learned positions counted from 0, from the
padding's id, or from the mask; rotations, which a shift leaves alone; recurrent states, which some
keep clean of padding and some do not), and a class that somebody wrote yesterday in another one.
Four rows of six tokens without gradients tell. Where a model cannot run on text alone nothing is
known, and padding on the left is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .reference import without_dropout

# The largest difference of two hidden states that are the same, as a part of their norm: fp32 (TF32
# included) and 16 bits. Causality compares the same products of the same operands; padding changes
# the operands' place, and a mixture of experts may then choose others.
CAUSAL_TOLERANCE = (1e-4, 1e-2)
PADDING_TOLERANCE = (2e-2, 1e-1)
_LENGTH, _PADDING = 6, 2


@dataclass(frozen=True)
class Order:
    causal: bool
    position_offset: int | None  # None: the model finds the positions itself
    left_padding: bool


UNKNOWN = Order(causal=True, position_offset=None, left_padding=False)

# (input_ids [S, T], attention_mask [S, T], position_ids [S, T] or None) -> hidden states [S, T, D],
# or None where they are of another shape
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]

_known: WeakKeyDictionary[nn.Module, dict[object, Order]] = WeakKeyDictionary()


def order_of(
    lm: nn.Module,  # unwrapped
    run: Run,  # one forward of it, up to its head
    *,
    takes_positions: bool,
    typed: bool = False,  # run gives its tokens types
    device: torch.device,
) -> Order:
    subject = _subject(lm), typed
    known = _known.get(lm, {})
    if subject not in known:
        with torch.no_grad(), without_dropout(lm), eagerly(device):
            order, certain = _ask(lm, run, takes_positions, device)
        if not certain:  # weights that are still zero, or not finite, tell nothing
            return order
        _known[lm] = known = {**known, subject: order}
    return known[subject]


def _subject(lm: Any) -> object:
    names = ("_attn_implementation", "is_decoder", "is_causal", "use_bidirectional_attention")
    return type(lm).__qualname__, *(getattr(lm.config, name, None) for name in names)


@contextmanager
def eagerly(device: torch.device) -> Iterator[None]:
    """Without compiling anything for these shapes, and without weights cast for autocast in the
    absence of gradients, which autocast would keep for the forward that needs them."""
    kind = device.type
    autocast = torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
    with torch.compiler.set_stance("force_eager"), autocast:
        yield


def _ask(
    lm: Any, run: Run, takes_positions: bool, device: torch.device
) -> tuple[Order, bool]:  # and whether it is certain
    config = lm.config
    text_config = config.get_text_config()
    ordinary = ordinary_tokens(config.to_dict(), text_config.vocab_size, 2 * _LENGTH)
    if not ordinary:
        return UNKNOWN, True
    tokens = torch.tensor(ordinary, device=device)
    row, others = tokens[:_LENGTH], tokens[_LENGTH:]
    half = _LENGTH // 2
    ids = row.repeat(4, 1)
    ids[1, half:] = others[half:]  # another end
    ids[2, :half] = others[:half]  # another beginning
    ids[3] = torch.cat([others[:_PADDING], row[:-_PADDING]])
    mask = torch.ones_like(ids)
    mask[3, :_PADDING] = 0

    # Without padding first: attention then often runs without a mask.
    plain = _tried(run, ids[:3], mask[:3], None)
    if plain is None:
        return UNKNOWN, True
    if not plain.isfinite().all():
        return UNKNOWN, False
    sixteen_bit = plain.element_size() == 2 or torch.is_autocast_enabled(device.type)
    exact, close = CAUSAL_TOLERANCE[sixteen_bit], PADDING_TOLERANCE[sixteen_bit]
    if not _same(plain[1, :half], plain[0, :half], exact):
        return Order(False, None, False), True
    # Only what shows: the beginning has to be seen at the end.
    certain = not _same(plain[2, -1:], plain[0, -1:], exact)

    pad = getattr(text_config, "pad_token_id", None)
    offsets = [0] if pad is None else [0, pad + 1]  # the latter as RoBERTa counts
    candidates: list[int | None] = [*offsets, None] if takes_positions else [None]
    if text_config is not config and takes_positions:
        # A multimodal model's positions depend on its images: better its own, where they will do.
        candidates = [None, *offsets]
    for offset in candidates:
        places = None if offset is None else positions(mask, offset)
        padded = _tried(run, ids, mask, places)
        if padded is None or not _same(padded[0], plain[0], close):
            continue
        if not _same(padded[1, :half], padded[0, :half], exact):
            return Order(False, None, False), True
        if _same(padded[3, _PADDING:], plain[0, :-_PADDING], close):
            return Order(True, offset, True), certain
    return Order(True, None, False), certain


def positions(
    attention_mask: Tensor,  # [S, T]
    offset: int,
) -> Tensor:  # [S, T] int64
    """Each token's place among the tokens; padding gets one that exists."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + offset


def _tried(run: Run, *arguments: Any) -> Tensor | None:
    try:
        return run(*arguments)
    except Exception:  # it needs images, or other shapes: whatever it says, it tells us nothing
        return None


def _same(
    a: Tensor,  # [T, D]
    b: Tensor,  # [T, D]
    tolerance: float,
) -> bool:
    a, b = a.double(), b.double()
    return bool(((a - b).norm(dim=-1) <= tolerance * b.norm(dim=-1)).all())


def ordinary_tokens(config: dict[str, Any], vocab_size: int, count: int) -> list[int]:
    """Token ids that stand for no image, no padding and no end; some twice in a tiny vocabulary."""
    special = set(_special_tokens(config))
    found = list(islice((i for i in range(vocab_size) if i not in special), count))
    return (found * count)[:count]


def _special_tokens(config: dict[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(key) or str(key).endswith(("_id", "_index")):
            values: Iterable[Any] = value if isinstance(value, (list, tuple)) else (value,)
            yield from (v for v in values if isinstance(v, int))
