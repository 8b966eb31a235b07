"""What one training step needs at its peak, and what eager PyTorch needs for the same batch.

Both are measured at PyTorch's allocator, as the peak above what was held before the step (the
weights and the batch): on a GPU by its statistics, on a CPU by the allocations and releases that
the profiler records. The step is the policy's forward and backward with the reference's
log-probabilities given. Gradients are part of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collate import Batch, labels_of
from .peak import peak_bytes
from .setting import Setting
from .train import dpo_step


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one step."""

    label: str
    vocab_size: int
    fastdpo: int
    eager: int


def measure(model: Any, batch: Batch, setting: Setting, label: str) -> Memory | None:
    """Both peaks for one batch, or None where the device counts no bytes. Leaves no gradients."""
    if setting.device.type not in ("cpu", "cuda"):
        return None
    model.train()
    ours = _step_peak(lambda: dpo_step(model, batch, setting).loss, model, setting)
    theirs = _step_peak(lambda: eager(model, batch, setting), model, setting)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    return Memory(label, vocab_size, fastdpo=ours, eager=theirs)


def _step_peak(loss: Callable[[], Tensor], model: nn.Module, setting: Setting) -> int:
    for _ in range(2):  # the first call probes the head and fills caches: it does not count
        peak = peak_bytes(lambda: loss().backward(), setting.device)
        model.zero_grad(set_to_none=True)
    return peak


def eager(model: nn.Module, batch: Batch, setting: Setting) -> Tensor:
    """The DPO loss as it is usually written."""
    with setting.autocast():
        sums = eager_logps(model, batch)
    if "ref_chosen_logps" in batch:
        sums = sums - torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    chosen, rejected = sums.chunk(2)
    return -F.logsigmoid(setting.options.beta * (chosen - rejected)).mean()


def eager_logps(model: nn.Module, batch: Batch) -> Tensor:  # [2B]
    """All logits, their log-softmax, and a gather."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    labels = labels_of(batch)[:, 1:]
    logps = logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * (labels != -100)).sum(-1)
