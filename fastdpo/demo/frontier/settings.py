"""The sizes of a sweep: everything that a result depends on, beside what a run says itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .world import World


@dataclass(frozen=True)
class Settings:
    """Sizes, the same for every method; a results folder is of one of these.

    Raises:
        ValueError: naming the field, before anything is computed.
    """

    vocab_size: int = 8
    length: int = 6
    prompts: int = 2

    hidden: int = 32
    layers: int = 1
    heads: int = 2

    sft_steps: int = 400
    sft_batch: int = 64  # reviews a step
    sft_lr: float = 3e-3

    draws: int = 2048  # prompts drawn, with repetition
    completions: int = 4  # answers to each draw, from the reference: 6 pairs
    steps: int = 240  # optimizer steps of every method
    batch: int = 32  # pairs a step; 2 · batch answers where a method takes answers
    lr: float = 1e-3
    evaluations: int = 4  # exact evaluations along training, evenly spread, the last at its end

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                if not 0 < value < 1:
                    raise ValueError(f"{field.name} should be between 0 and 1, got {value}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} should be an integer of at least 1, got {value}")
        if self.completions < 2:
            raise ValueError(f"completions should be at least 2, got {self.completions}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden should be a multiple of heads, got {self.hidden}")
        if self.batch > self.num_pairs:
            raise ValueError(f"batch should be at most {self.num_pairs} pairs, got {self.batch}")
        if self.evaluations > self.steps:
            raise ValueError(f"evaluations should be at most steps, got {self.evaluations}")
        self.world("plain")

    @property
    def num_samples(self) -> int:
        """Answers that a method may draw."""
        return self.draws * self.completions

    @property
    def num_pairs(self) -> int:
        return self.draws * self.completions * (self.completions - 1) // 2

    def world(self, kind: str) -> World:
        """plain; stops: an answer ends at its first full stop; controls: every prompt twice, after
        either control token."""
        return World(
            self.vocab_size,
            self.length,
            self.prompts,
            stops=kind == "stops",
            controls=kind == "controls",
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
