"""Pairs to token ids to batches, in TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .options import InputError
from .pairs import Pair
from .prompts import Message

Batch = dict[str, Tensor]


@dataclass
class Example:
    """One pair as token ids, and what the reference thinks of it once it was asked."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    flaw: str = ""
    good: frozenset[str] = frozenset()
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None


def texts(pair: Pair, tokenizer: Any) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as strings, through the chat template where they are messages.

    Raises:
        InputError: the chat template does not continue its own prompt.
    """
    parts = (pair.prompt, pair.chosen, pair.rejected)
    if not pair.conversational:
        prompt, chosen, rejected = (part for part in parts if isinstance(part, str))
        return prompt, chosen, rejected
    messages, good, bad = (part for part in parts if isinstance(part, list))
    if tokenizer.chat_template is None:
        prompt = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "
        return prompt, _contents(good), _contents(bad)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return (
        prompt,
        _continuation(messages, good, prompt, tokenizer),
        _continuation(messages, bad, prompt, tokenizer),
    )


def _contents(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _continuation(
    prompt: list[Message], answer: list[Message], prompt_text: str, tokenizer: Any
) -> str:
    whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if not whole.startswith(prompt_text):
        raise InputError("--data: the model's chat template changes the prompt once it is answered")
    return whole[len(prompt_text) :]


def encode(pair: Pair, tokenizer: Any, max_length: int) -> Example | None:
    """None where truncation to max_length leaves nothing of an answer."""
    prompt, chosen, rejected = texts(pair, tokenizer)
    templated = pair.conversational and tokenizer.chat_template is not None
    prompt_ids = tokenizer(prompt, add_special_tokens=not templated)["input_ids"]
    if not templated and prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]  # the end belongs behind the answer
    room = max_length - len(prompt_ids)
    answers = []
    for text in (chosen, rejected):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None and not templated:
            ids = [*ids, tokenizer.eos_token_id]
        answers.append(ids[: max(0, room)])
    if not prompt_ids or not all(answers):
        return None
    return Example(prompt_ids, answers[0], answers[1], pair.flaw, pair.good)


def encode_all(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> list[Example]:
    encoded = [encode(pair, tokenizer, max_length) for pair in pairs]
    examples = [example for example in encoded if example is not None]
    if len(examples) < 2:
        raise InputError(
            f"--max-length {max_length} leaves {len(examples)} pairs with a prompt and two answers"
        )
    return examples


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device) -> Batch:
    """Chosen sequences first, then rejected ones, padded on the right."""
    answers = [e.chosen_ids for e in examples] + [e.rejected_ids for e in examples]
    prompts = [e.prompt_ids for e in examples] * 2
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(answers), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
    }
    if all(e.ref_chosen_logps is not None for e in examples):
        batch["ref_chosen_logps"] = torch.tensor([e.ref_chosen_logps for e in examples])
        batch["ref_rejected_logps"] = torch.tensor([e.ref_rejected_logps for e in examples])
    return {key: value.to(device) for key, value in batch.items()}


def labels_of(batch: Batch) -> Tensor:  # [2B, T]
    """Hugging Face labels: the answers' tokens, -100 elsewhere."""
    return torch.where(batch["completion_mask"].bool(), batch["input_ids"], -100)
