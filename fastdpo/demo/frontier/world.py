"""A language so small that every answer can be counted: its words, its prompts and its rewards.

An answer is a short film review of L words. Its reward is the sentiment, read from left to right:

    good +1   great +2   bad −1   awful −2         reward = sum / 3, about −4 to 4 for L = 6
    not       turns the next of these words round
    very      doubles the next of these words
    .         ends the scope of both
    the same of these words as the last one before it counts nothing

The prompt is read first, so that "not" at its end turns the answer's first word round.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

WORDS = (".", "good", "bad", "not", "very", "great", "awful", "film")
STOP, GOOD, BAD, NOT, VERY, GREAT, AWFUL, FILM = range(8)
VALUES = {GOOD: 1.0, BAD: -1.0, GREAT: 2.0, AWFUL: -2.0}
REWARD_SCALE = 1 / 3

# With fewer words, those prompts whose words exist.
PROMPTS = ((STOP, NOT), (GOOD, STOP), (STOP, VERY), (FILM, STOP))
# What the control token asks for, before the prompt: praise, or a slating.
CONTROLS = (GOOD, BAD)

# 8⁶ is 262,144; a forward pass over every prefix of 10⁶ answers still takes seconds.
MAX_SEQUENCES = 2**20


@dataclass(frozen=True)
class World:
    """All answers to a few prompts.

    vocab_size  V, the first V of WORDS; beyond them words without a sentiment
    length      L, words in an answer
    prompts     how many of PROMPTS
    stops       an answer ends at its first "."; what follows does not exist
    controls    each prompt twice, after either of CONTROLS

    Raises:
        ValueError: naming the argument; also where V^L answers are too many to enumerate.
    """

    vocab_size: int = 8
    length: int = 6
    prompts: int = 4
    stops: bool = False
    controls: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size should be at least 4, got {self.vocab_size}")
        if self.length < 1:
            raise ValueError(f"length should be at least 1, got {self.length}")
        count = self.vocab_size**self.length
        if count > MAX_SEQUENCES:
            raise ValueError(
                f"vocab_size ** length should be at most {MAX_SEQUENCES:,} to be enumerated, got "
                f"{self.vocab_size} ** {self.length} = {count:,} sequences for each prompt"
            )
        known = sum(max(prompt) < self.vocab_size for prompt in PROMPTS)
        if not 1 <= self.prompts <= known:
            raise ValueError(
                f"prompts should be 1 to {known} for vocab_size {self.vocab_size}, "
                f"got {self.prompts}"
            )

    @property
    def num_sequences(self) -> int:
        return self.vocab_size**self.length

    @functools.cached_property
    def prompt_tokens(self) -> Tensor:  # [P, T] int64
        known = [prompt for prompt in PROMPTS if max(prompt) < self.vocab_size][: self.prompts]
        if self.controls:
            return torch.tensor([(control, *p) for control in CONTROLS for p in known])
        return torch.tensor(known)

    @functools.cached_property
    def sequences(self) -> Tensor:  # [S, L] int64
        """Every row of L words, in the order of their `index`."""
        powers = self.vocab_size ** torch.arange(self.length - 1, -1, -1)
        return torch.arange(self.num_sequences)[:, None] // powers % self.vocab_size

    def index(self, answers: Tensor) -> Tensor:  # [..., L] -> [...] int64
        """Where an answer stands in `sequences` (an answer that stopped is filled up with ".")."""
        powers = self.vocab_size ** torch.arange(self.length - 1, -1, -1)
        return (answers * powers).sum(-1)

    def stopped_before(self, answers: Tensor) -> Tensor:  # [N, L] -> [N, L] bool
        """Which places come after the answer's end."""
        if not self.stops:
            return torch.zeros_like(answers, dtype=torch.bool)
        ends = (answers == STOP).long().cumsum(-1)
        return ends - (answers == STOP).long() > 0

    @functools.cached_property
    def lengths(self) -> Tensor:  # [S] fp64
        """Words of each answer, the "." that ends it included."""
        return (~self.stopped_before(self.sequences)).sum(-1).double()

    @functools.cached_property
    def rewards(self) -> Tensor:  # [P, S] fp64
        """The sentiment; under the second of CONTROLS with the sign turned round."""
        rows = []
        for prompt in self.prompt_tokens.tolist():
            wanted = 1.0
            if self.controls:
                wanted = 1.0 if prompt[0] == CONTROLS[0] else -1.0
                prompt = prompt[1:]
            rows.append(wanted * sentiment(prompt, self.sequences, self.stops))
        return torch.stack(rows)

    @functools.cached_property
    def variety(self) -> Tensor:  # [P, S] fp64
        """A second reward, at odds with the first: different words in the answer, 2/3 each."""
        words = torch.nn.functional.one_hot(self.sequences, self.vocab_size).amax(1)
        return (2 / 3 * words.sum(-1).double()).expand(len(self.prompt_tokens), -1)

    @functools.cached_property
    def camps(self) -> Tensor:  # [S] int64 in {0, 1, 2}
        """A class of each answer by its last word, for preferences that go round in a circle: a
        full stop, a word with a value, any other."""
        last = self.sequences[:, -1]
        valued = torch.isin(last, torch.tensor(list(VALUES)))
        return torch.where(last == STOP, 0, torch.where(valued, 1, 2))


def sentiment(prompt: list[int], sequences: Tensor, stops: bool = False) -> Tensor:  # [S, L] -> [S]
    """The reward of each answer after `prompt`, as the module's header defines it, in fp64."""
    count = sequences.shape[0]
    vocab = max(int(sequences.max()), *prompt, GREAT, AWFUL) + 1
    values = torch.zeros(vocab, dtype=torch.float64)
    for valued, worth in VALUES.items():
        values[valued] = worth
    total = torch.zeros(count, dtype=torch.float64)
    one = torch.ones_like(total)
    sign, weight = one, one  # of the next word with a value
    last = torch.full((count,), -1)  # the last word with a value
    alive = torch.ones(count, dtype=torch.bool)
    for place in range(-len(prompt), sequences.shape[1]):
        if place < 0:
            word = torch.full((count,), prompt[place + len(prompt)])
        else:
            word = sequences[:, place]
        value = values[word]
        counts = value != 0
        if place >= 0:
            total += torch.where(counts & (word != last) & alive, sign * weight * value, 0 * one)
        last = torch.where(counts, word, last)
        closed = counts | (word == STOP)
        sign = torch.where(closed, one, torch.where(word == NOT, -sign, sign))
        weight = torch.where(closed, one, torch.where(word == VERY, 2 * one, weight))
        if stops and place >= 0:
            alive = alive & (word != STOP)
    return total * REWARD_SCALE


def text(answer: list[int]) -> str:
    """An answer in words."""
    return " ".join(WORDS[word] if word < len(WORDS) else f"word{word}" for word in answer)
