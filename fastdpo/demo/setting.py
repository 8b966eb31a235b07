"""What every loop of the demo needs to know."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .collate import Batch, Example, collate
from .options import Options


@dataclass(frozen=True)
class Setting:
    """The options, and what they came to."""

    options: Options
    device: torch.device
    pad_token_id: int

    def autocast(self) -> torch.autocast:
        """fp32 weights multiplied in bf16 where that was asked for."""
        enabled = self.options.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def batches(self, examples: Sequence[Example], steps: int, seed: int) -> Iterator[Batch]:
        """Shuffled anew every epoch."""
        rng = random.Random(seed)
        order: list[Example] = []
        for _ in range(steps):
            while len(order) < min(self.options.batch_size, len(examples)):
                order += rng.sample(list(examples), len(examples))
            part, order = order[: self.options.batch_size], order[self.options.batch_size :]
            yield collate(part, self.pad_token_id, self.device)
