"""What the model says by itself, and how much of it is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collate import Example
from .setting import Setting

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Answers:
    """Sampled answers to the prompts of held-out examples."""

    prompts: list[str]
    answers: list[str]
    good: list[bool]  # whether the answer is one of the good ones; empty where they are not known

    @property
    def share_good(self) -> float | None:
        return sum(self.good) / len(self.good) if self.good else None


@torch.no_grad()
def sample(model: Any, tokenizer: Any, examples: Sequence[Example], setting: Setting) -> Answers:
    """One answer to each prompt, from the same random numbers every time."""
    model.eval()
    torch.manual_seed(setting.options.seed)
    size = 2 * setting.options.batch_size
    answers: list[str] = []
    for start in range(0, len(examples), size):
        prompts = [example.prompt_ids for example in examples[start : start + size]]
        input_ids, attention_mask = _padded_left(prompts, setting)
        with setting.autocast():
            ids = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                top_k=0,
                top_p=0.9,
                pad_token_id=setting.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        answers += _decode(tokenizer, ids[:, input_ids.shape[1] :].tolist())
    known = all(example.good for example in examples)
    return Answers(
        _decode(tokenizer, [example.prompt_ids for example in examples]),
        answers,
        [a in e.good for a, e in zip(answers, examples, strict=True)] if known else [],
    )


def _padded_left(prompts: Sequence[list[int]], setting: Setting) -> tuple[torch.Tensor, ...]:
    length = max(len(prompt) for prompt in prompts)
    ids = [[setting.pad_token_id] * (length - len(p)) + p for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return tuple(torch.tensor(rows, device=setting.device) for rows in (ids, mask))


def _decode(tokenizer: Any, ids: Sequence[list[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
