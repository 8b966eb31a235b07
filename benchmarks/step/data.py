"""Preference pairs of random tokens whose lengths follow a stated distribution.

Lengths are log-normal and clipped. The two shapes resemble two kinds of data, they are not fitted
to them: instructions with long answers (as UltraFeedback's) and dialogues with short ones (as
Anthropic's HH). Tokens are drawn with Zipf's frequencies over the vocabulary; chosen answers favour
its even tokens and rejected ones its odd, so that there is a preference to learn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

_FIRST_TOKEN = 2  # 0 pads, 1 ends an answer
PAD, EOS = 0, 1
_FAVOURED = 0.75  # share of an answer's tokens of its own parity


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions: log-normal with this median and sigma, then clipped."""

    prompt_median: float
    prompt_sigma: float
    prompt_most: int
    completion_median: float
    completion_sigma: float
    completion_most: int

    def scaled(self, factor: float) -> Lengths:
        """The same shape at another scale."""
        return Lengths(
            self.prompt_median * factor,
            self.prompt_sigma,
            max(1, round(self.prompt_most * factor)),
            self.completion_median * factor,
            self.completion_sigma,
            max(2, round(self.completion_most * factor)),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SHAPES = {
    "ultrafeedback-like": Lengths(120, 0.9, 1024, 280, 0.7, 1024),
    "hh-like": Lengths(140, 0.8, 768, 50, 0.8, 512),
}


def pairs(lengths: Lengths, count: int, vocab: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """`count` examples of prompt_ids, chosen_ids and rejected_ids, answers ending in EOS."""
    generator = torch.Generator().manual_seed(seed)

    def length(median: float, sigma: float, most: int) -> int:
        draw = torch.randn((), generator=generator).mul(sigma).exp().mul(median)
        return int(draw.clamp(1, most))

    def tokens(n: int, parity: int | None) -> list[int]:
        # The rank of a Zipf draw is log-uniform.
        span = (vocab - _FIRST_TOKEN) // 2 - 1
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        rank = torch.pow(float(span), uniform).long() - 1
        own = torch.rand(n, generator=generator) < _FAVOURED
        coin = torch.randint(2, (n,), generator=generator)
        side = coin if parity is None else torch.where(own, torch.tensor(parity), coin)
        return (_FIRST_TOKEN + 2 * rank + side).tolist()

    examples = []
    for _ in range(count):
        prompt = length(lengths.prompt_median, lengths.prompt_sigma, lengths.prompt_most)
        answers = [
            length(lengths.completion_median, lengths.completion_sigma, lengths.completion_most - 1)
            for _ in range(2)
        ]
        examples.append(
            {
                "prompt_ids": tokens(prompt, None),
                "chosen_ids": [*tokens(answers[0], 0), EOS],
                "rejected_ids": [*tokens(answers[1], 1), EOS],
            }
        )
    return examples


def statistics(examples: list[dict[str, list[int]]]) -> dict[str, float]:
    """Mean lengths of what was drawn."""
    count = len(examples)
    return {
        "mean_prompt": sum(len(e["prompt_ids"]) for e in examples) / count,
        "mean_completion": sum(
            len(e[side]) for e in examples for side in ("chosen_ids", "rejected_ids")
        )
        / (2 * count),
    }
