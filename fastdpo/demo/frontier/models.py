"""Small Hugging Face language models of the world: made, enumerated, sampled, scored."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from .world import STOP, World

IGNORED = -100


def new_model(world: World, hidden: int, layers: int, heads: int, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of the world's vocabulary, from scratch, without dropout."""
    config = GPT2Config(
        vocab_size=world.vocab_size,
        n_positions=world.prompt_tokens.shape[1] + world.length,
        n_embd=hidden,
        n_inner=2 * hidden,
        n_layer=layers,
        n_head=heads,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).train()


@dataclass(frozen=True)
class Tree:
    """A model's log-probabilities of every next word after every prefix.

    levels[d] is [P, V^d, V]: the words at place d, in fp64, after each of the V^d prefixes.
    """

    world: World
    levels: tuple[Tensor, ...]

    def logps(self, temperature: float = 1.0) -> Tensor:  # -> [P, S]
        """Log-probabilities of all answers, sampled word by word at this temperature (0: the
        likeliest word, of equally likely ones the first)."""
        total = torch.zeros(len(self.world.prompt_tokens), 1, dtype=torch.float64)
        for place, level in enumerate(self.levels):
            if temperature == 0:
                first = torch.zeros_like(level, dtype=torch.bool)
                first.scatter_(-1, level.argmax(-1, keepdim=True), True)
                step = torch.where(first, 0.0, -torch.inf)
            elif temperature == 1:
                step = level
            else:
                step = (level / temperature).log_softmax(-1)
            if self.world.stops:
                step = torch.where(
                    _stopped(self.world, place)[:, None],
                    torch.where(torch.arange(self.world.vocab_size) == STOP, 0.0, -torch.inf),
                    step,
                )
            total = (total[:, :, None] + step).flatten(1)
        return total


def _stopped(world: World, place: int) -> Tensor:  # -> [V^place] bool
    """Which prefixes of that many words hold a full stop, in the order of the tree."""
    powers = world.vocab_size ** torch.arange(place - 1, -1, -1)
    prefixes = torch.arange(world.vocab_size**place)[:, None] // powers % world.vocab_size
    return (prefixes == STOP).any(-1)


@torch.no_grad()
def enumerate_tree(model: nn.Module, world: World) -> Tree:
    """One pass over the tree of prefixes: V⁰ + … + V^(L−1) of them for each prompt.

    Level by level, a prefix and what it has been attended to are copied for each of its V
    continuations; but for the last level, by far the largest: there the V continuations of a prefix
    stand side by side as one sequence, each seeing the prefix and itself.
    """
    size, prompts = world.vocab_size, world.prompt_tokens
    cache, words, levels = DynamicCache(), prompts, []
    following = torch.arange(size)
    for place in range(world.length):
        if place:
            count = len(prompts) * size ** (place - 1)
            if place + 1 == world.length:
                logits = _side_by_side(model, following.expand(count, size), cache)
                levels.append(logits.flatten(0, 1))
                break
            cache.batch_repeat_interleave(size)
            words = following.repeat(count)[:, None]
        levels.append(next_logits(model, words, cache)[:, -1])
    return Tree(
        world,
        tuple(level.double().log_softmax(-1).unflatten(0, (len(prompts), -1)) for level in levels),
    )


def _side_by_side(model: nn.Module, words: Tensor, cache: DynamicCache) -> Tensor:  # [N, V] ->
    """Logits [N, V, V] after each of V next words of N prefixes, none of which sees another."""
    count, size = words.shape
    seen = cache.get_seq_length()
    mask = torch.cat([torch.ones(size, seen), torch.eye(size)], 1).log()  # 0, or −∞ where unseen
    return next_logits(
        model,
        words,
        cache,
        attention_mask=mask.expand(count, 1, size, seen + size),
        position_ids=torch.full((1, size), seen).expand(count, size),
    )


def next_logits(model: nn.Module, words: Tensor, cache: DynamicCache, **more: Tensor) -> Tensor:
    """Logits [N, T, V] of words [N, T] that come after what the cache has seen."""
    # transformers renames the argument on its way through version 5.
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    return model(input_ids=words, use_cache=True, **{name: cache}, **more).logits


@torch.no_grad()
def sample(
    model: nn.Module,
    world: World,
    prompts: Tensor,  # [N] int64, rows of world.prompt_tokens
    generator: torch.Generator,
) -> Tensor:  # [N, L] int64
    """One answer to each prompt, word by word at temperature 1."""
    words, cache, answers = world.prompt_tokens[prompts], DynamicCache(), []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(world.length):
        logits = next_logits(model, words, cache)[:, -1]
        words = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        if world.stops:
            words = words.masked_fill(ended[:, None], STOP)
            ended |= words[:, 0] == STOP
        answers.append(words[:, 0])
    return torch.stack(answers, 1)


def encode(world: World, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [N] and answers [N, L] to input_ids and labels, both [N, T + L]: no loss on the
    prompt, none after an answer's end."""
    questions = world.prompt_tokens[prompts]
    labels = answers.masked_fill(world.stopped_before(answers), IGNORED)
    return (
        torch.cat([questions, answers], 1),
        torch.cat([torch.full_like(questions, IGNORED), labels], 1),
    )
