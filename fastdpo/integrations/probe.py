"""Is the head that we read the head that the model has? Asked once per model and situation
(`fastdpo.integrations.subject`), answered by its own logits.

On the first call the model's real head is given a few rows instead of none: true hidden states, and
the same ones enlarged up to 512 times, because a softcap or another curve hides below the small
logits of a fresh model. The model's forward does to them what it does to all logits, and the
outcome has to be ours.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends.torch import logits_of
from ..distributed.vocabulary import VocabParallel
from .heads import HeadReader
from .subject import Subject
from .unwrap import UnsupportedModel

POSITIONS = 4
SCALES = (1.0, 8.0, 64.0, 512.0)
# The largest difference allowed, as a part of the row's largest logit: above what rounding (TF32
# included) does, below what any known transformation does.
TOLERANCE = 5e-3
TOLERANCE_16_BIT = 3e-2
_COLUMNS = 8192
_ORDINARY = 1e3  # a logit that no dtype overflows at, in whatever scale it was multiplied

# Output head -> what was verified about it, the latest last. The head module is the key, since a
# model that gets adapters or a new head gets a new module, and because an entry must not keep a
# model alive.
_verified: WeakKeyDictionary[nn.Module, dict[Subject, None]] = WeakKeyDictionary()
_SUBJECTS = 32  # of one head: modes, adapters and weights that take turns


def is_verified(head_module: nn.Module, subject: Subject) -> bool:
    return subject in _verified.get(head_module, ())


def _remember(head_module: nn.Module, subject: Subject) -> None:
    subjects = _verified.setdefault(head_module, {})
    subjects[subject] = None
    if len(subjects) > _SUBJECTS:
        del subjects[next(iter(subjects))]


def probe_rows(hidden: Tensor) -> Tensor:
    """hidden [..., D] -> [1, POSITIONS · len(SCALES), D], the rows that the real head is asked
    about."""
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    count = flat.shape[0]
    rows = torch.stack([flat[i * (count - 1) // (POSITIONS - 1)] for i in range(POSITIONS)])
    return torch.cat([rows * scale for scale in SCALES]).unsqueeze(0)


class Probed(NamedTuple):
    """What our reading of the head makes of the probe's rows: computed while the head is called."""

    logits: Tensor  # [K, V] this process's part of the vocabulary
    finite: Tensor  # [K] bool: rows that did not overflow
    sixteen_bit: bool
    spread: VocabParallel | None

    @classmethod
    @torch.no_grad()
    def of(cls, reader: HeadReader, rows: Tensor, spread: VocabParallel | None) -> Probed:
        bound, head = reader.bind(rows[0], with_dropout=False)
        logits = torch.empty(bound.shape[0], head.vocab_size, device=bound.device)
        for start in range(0, head.vocab_size, _COLUMNS):
            columns = head.columns(start, min(start + _COLUMNS, head.vocab_size))
            part = logits_of(bound.to(columns.weight.dtype), columns)
            logits[:, start : start + _COLUMNS] = part
        sixteen_bit = torch.is_autocast_enabled(rows.device.type) or rows.element_size() == 2
        return cls(logits, bound.isfinite().all(-1), sixteen_bit, spread)


@torch.no_grad()
def verify(
    head_module: nn.Module,
    lm: nn.Module,
    probed: Probed,
    logits: Tensor,  # [1, K, V] the model's own
    subject: Subject,
) -> None:
    """Compares and remembers.

    Raises:
        UnsupportedModel: the logits differ.
    """
    ours, spread = probed.logits, probed.spread
    if spread is not None:  # every process has all logits, and answers for its own
        logits = logits[..., spread.start :][..., : spread.sizes[spread.rank]]
    logits = logits[0].to(ours.device)
    name = type(lm).__name__
    if logits.shape != ours.shape:
        raise UnsupportedModel(
            f"model: {name} returns logits of shape {tuple(logits.shape)} where its head has "
            f"{ours.shape[1]} entries; {_advice(name)}"
        )
    # True hidden states overflow nowhere: what is infinite there was made so.
    made = ~logits[:POSITIONS].isfinite() & (ours[:POSITIONS].abs() <= _ORDINARY)
    if (made.any(-1) & probed.finite[:POSITIONS]).any():
        raise UnsupportedModel(
            f"model: {name} makes some of its logits infinite where lm_head's are not (entries "
            f"that it never predicts?); {_advice(name)}"
        )
    limit = (TOLERANCE_16_BIT if probed.sixteen_bit else TOLERANCE) * logits.abs().amax(-1)  # [K]
    # Overflow in 16 bits says nothing about the family.
    comparable = limit.isfinite() & probed.finite
    worst = (ours - logits).abs().amax(-1)
    wrong = comparable & ~(worst <= limit)
    if wrong.any():
        row = int(torch.where(wrong, worst, -1.0).argmax())
        raise UnsupportedModel(
            f"model: {name} does something to its logits that fastdpo does not know: they reach "
            f"{logits[row].abs().amax():.4g} and differ from lm_head's by up to {worst[row]:.4g}; "
            f"{_advice(name)}"
        )
    if (comparable & (limit > 0)).any():  # logits of 0 agree with anything
        _remember(head_module, subject)


def _advice(name: str) -> str:
    table = "fastdpo.integrations.families.FAMILIES"
    return f"describe the family in {table}[{name!r}]. Nothing was computed"
