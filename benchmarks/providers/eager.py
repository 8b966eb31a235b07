"""Eager PyTorch: every logit of every position is written, masked or not."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import IGNORE_INDEX, capped
from benchmarks.providers.base import LogpsProvider, missing, no_compiler

_WRITES = "writes all logits, those of rows without loss too"


def _masked(tokens: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels != IGNORE_INDEX, tokens, tokens.new_zeros(()))


def _safe(labels: Tensor) -> Tensor:
    return labels.masked_fill(labels == IGNORE_INDEX, 0)


def eager_token_logps(
    hidden: Tensor,  # [2B, T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [2B, T]
    softcap: float | None,
) -> Tensor:  # [2B, T]
    """As the original DPO repository: logits to fp32, log_softmax, gather, mask."""
    logits = capped(hidden @ weight.t(), softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = logits.log_softmax(-1).gather(-1, _safe(labels).unsqueeze(-1)).squeeze(-1)
    return _masked(tokens, labels)


class Eager(LogpsProvider):
    name = "eager"
    summary = "PyTorch as in the original DPO repository: fp32 log_softmax of all logits"
    cannot = _WRITES

    def token_logps(self, hidden, weight, labels, softcap):
        return eager_token_logps(hidden, weight, labels, softcap)


class EagerReference(Eager):
    """The baseline of providers that must compute the reference themselves; not in the tables."""

    computes_reference = True


class Compiled(LogpsProvider):
    name = "compiled"
    summary = "torch.compile of eager"
    cannot = _WRITES
    compiles = True

    def absent(self, device: torch.device) -> str | None:
        return no_compiler(device)

    def __init__(self) -> None:
        self._compiled = torch.compile(eager_token_logps, dynamic=False)

    def token_logps(self, hidden, weight, labels, softcap):
        return self._compiled(hidden, weight, labels, softcap)


class SelectiveLogSoftmax(LogpsProvider):
    name = "trl-selective"
    summary = "TRL before its chunked path: selective_log_softmax of all logits, in their dtype"
    cannot = _WRITES + "; in 16 bits what it returns is rounded to 16 bits"

    def absent(self, device: torch.device) -> str | None:
        return missing("trl.trainer.utils")

    def token_logps(self, hidden, weight, labels, softcap):
        from trl.trainer.utils import selective_log_softmax

        logits = capped(hidden @ weight.t(), softcap)
        return _masked(selective_log_softmax(logits, _safe(labels)), labels)
