"""The reference: a small model that has read film reviews of every mood (supervised fine-tuning).

The reviews come from a chain of words: adjectives follow "very" and "not", a mood (half the reviews
praise, half slate) makes its own adjectives four times as likely. The model learns them from
scratch by next-word prediction on the answers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2LMHeadModel

from ...integrations import hf
from .models import encode, new_model
from .settings import Settings
from .world import NOT, STOP, VALUES, VERY, World

REFERENCE_SEED = 7  # one reference for all seeds of a sweep: the exact frontier is then one curve
MOOD = 4.0


def chain(vocab_size: int, mood: float) -> Tensor:  # -> [V, V]
    """P(next word | word) of reviews whose praise is `mood` times as likely as it would be."""
    weights = torch.ones(vocab_size, vocab_size, dtype=torch.float64)
    for word, value in VALUES.items():
        if word < vocab_size:
            weights[:, word] *= mood if value > 0 else 1 / mood
            weights[word, word] *= 0.3  # nobody says it twice
            weights[word, STOP] *= 4.0
            weights[STOP, word] *= 0.5
            if abs(value) > 1:
                weights[:, word] *= 0.5
            for emphasis in (VERY, NOT):
                if emphasis < vocab_size:
                    weights[emphasis, word] *= 3.0
    for word in (NOT, VERY):
        if word < vocab_size:
            weights[:, word] *= 0.7
            weights[word, STOP] *= 0.2
            weights[word, word] *= 0.2
    return weights / weights.sum(-1, keepdim=True)


def reviews(
    world: World, prompts: Tensor, mood: float, praise: float, generator: torch.Generator
) -> Tensor:
    """One review [N, L] for each prompt [N]; `praise` is the share of those that praise."""
    chains = torch.stack([chain(world.vocab_size, mood), chain(world.vocab_size, 1 / mood)])
    word = world.prompt_tokens[prompts][:, -1]
    moods = (torch.rand(word.shape, generator=generator) >= praise).long()
    words = []
    for _ in range(world.length):
        word = torch.multinomial(chains[moods, word], 1, generator=generator)[:, 0]
        words.append(word)
    answers = torch.stack(words, 1)
    return answers.masked_fill(world.stopped_before(answers), STOP)


def train_reference(
    world: World, settings: Settings, mood: float = MOOD, praise: float = 0.5
) -> GPT2LMHeadModel:
    """The supervised fine-tuned model, in eval mode and frozen. The same bits every time."""
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    model = new_model(world, settings.hidden, settings.layers, settings.heads, REFERENCE_SEED)
    optimizer = torch.optim.Adam(model.parameters(), settings.sft_lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, settings.sft_steps)
    for _ in range(settings.sft_steps):
        prompts = torch.randint(
            len(world.prompt_tokens), (settings.sft_batch,), generator=generator
        )
        answers = reviews(world, prompts, mood, praise, generator)
        input_ids, labels = encode(world, prompts, answers)
        logps = hf.sequence_logps(model, input_ids, labels)
        assert isinstance(logps, Tensor)
        (-logps.sum() / (labels >= 0).sum()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.eval().requires_grad_(False)
