"""Batches of examples that fill a budget of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

from .collator import Collator, Example

# Lengths are alike within such a part of the data, which is shuffled before and behind: more of
# them pad less and shuffle less.
_BATCHES_IN_A_BUCKET = 32


class TokenBudgetSampler(Sampler[list[int]]):
    """Lists of indices, for a DataLoader's `batch_sampler`: as many examples as fit into a budget.

    A batch's tokens are counted as the collator will lay them out, padding included. Examples are
    shuffled; within buckets of about 32 batches they are sorted by length, so that little is
    padded, and the batches are shuffled again. Every example is in exactly one batch of an epoch
    (but see `drop_last`). The order follows from the seed and the epoch alone, and is the same on
    every process: of each `num_replicas` batches, which are of like lengths, each takes one.

    Batches differ in their number of pairs, and a loss is the mean over its batch. `num_pairs` of
    `dpo_loss` makes it one over several of them.

    Args:
        examples: the data set, by index; read once, for the lengths.
        collator: what will make batches of them.
        max_tokens_per_batch: the most tokens of one process's batch, as the collator lays it out.
        shuffle: False takes the examples in their order.
        seed: of the order.
        num_replicas, rank: of the processes that take the batches in turns.
        drop_last: where the number of batches is no multiple of num_replicas, leave the last ones
            out; else processes repeat as many from the epoch's beginning.

    Raises:
        ValueError: naming the argument; an example that alone exceeds the budget.

    `set_epoch(epoch)` gives another order. `state_dict()` and `load_state_dict(state)` continue
    within an epoch, as torchdata's StatefulDataLoader does; a DataLoader that prefetches asks for
    batches ahead of the step.
    """

    def __init__(  # many parameters: each is one of a DistributedSampler's
        self,
        examples: Sequence[Example],
        collator: Collator,
        max_tokens_per_batch: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ):
        _whole("max_tokens_per_batch", max_tokens_per_batch, 1)
        _whole("num_replicas", num_replicas, 1)
        _whole("seed", seed, 0)
        _whole("rank", rank, 0)
        if rank >= num_replicas:
            raise ValueError(f"rank should be less than num_replicas={num_replicas}, got {rank}")
        self.collator, self.budget = collator, max_tokens_per_batch
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.num_replicas, self.rank = num_replicas, rank
        self.lengths = _lengths(examples, collator, max_tokens_per_batch)
        self.epoch = self._done = 0
        self._first = 0  # where the next iteration begins: what a state that was loaded says
        self._batches: tuple[int, list[list[int]]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        mine, first = self._mine(), self._first
        self._first = 0  # the next time from the beginning
        for i in range(first, len(mine)):
            self._done = i + 1
            yield mine[i]
        self._done = 0

    def __len__(self) -> int:
        """This epoch's batches of this process, the ones that are done included."""
        return len(self._mine())

    def set_epoch(self, epoch: int) -> None:
        _whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._done, self._first = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is: after how many batches of which epoch."""
        return {**self._subject(), "epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: it is the state of a sampler with other data or options.
        """
        differing = [key for key, value in self._subject().items() if state.get(key) != value]
        if differing:
            found = {key: state.get(key) for key in differing}
            own = {key: self._subject()[key] for key in differing}
            raise ValueError(f"state should be of this sampler, which has {own}, got {found}")
        self.epoch, self._done = state["epoch"], state["done"]
        self._first = self._done

    def _subject(self) -> dict[str, Any]:
        return {
            "examples": len(self.lengths),
            "tokens": sum(prompt + sum(answers) for prompt, answers in self.lengths),
            "layout": self.collator.layout,
            "one_row": self.collator._one_row,  # by its attention
            "pad_to_multiple_of": self.collator.pad_to_multiple_of,
            "max_tokens_per_batch": self.budget,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
            "rank": self.rank,
            "drop_last": self.drop_last,
        }

    def _mine(self) -> list[list[int]]:
        return self.batches()[self.rank :: self.num_replicas]

    def batches(self) -> list[list[int]]:
        """Of all processes, in this epoch."""
        if self._batches is None or self._batches[0] != self.epoch:
            self._batches = (self.epoch, self._planned())
        return self._batches[1]

    def _planned(self, draw: int = 0) -> list[list[int]]:
        """`draw` is another order of the same epoch."""
        order = list(range(len(self.lengths)))
        if not self.shuffle:
            batches = list(self._filled(order))
        else:
            name = f"{self.seed} {self.epoch}"
            generator = random.Random(f"{name} {draw}" if draw else name)
            generator.shuffle(order)
            per_batch = max(1, self.budget // max(1, self._mean()))
            bucket = per_batch * _BATCHES_IN_A_BUCKET * self.num_replicas
            batches = []
            for start in range(0, len(order), bucket):
                part = sorted(order[start : start + bucket], key=self._length)
                batches += self._filled(part)
            # Together go batches of like lengths, which processes wait for one another in.
            steps = [
                batches[i : i + self.num_replicas]
                for i in range(0, len(batches), self.num_replicas)
            ]
            whole = [step for step in steps if len(step) == self.num_replicas]
            rest = [batch for step in steps if len(step) < self.num_replicas for batch in step]
            generator.shuffle(whole)
            batches = [batch for step in whole for batch in step] + rest
        over = len(batches) % self.num_replicas
        if over and self.drop_last:
            return batches[:-over]
        missing = (self.num_replicas - over) % self.num_replicas if batches else 0
        return batches + [batches[i % len(batches)] for i in range(missing)]

    def _filled(self, order: Sequence[int]) -> Iterator[list[int]]:
        return to_budget(order, self.lengths, self.collator, self.budget)

    def _length(self, i: int) -> int:
        return self.collator.tokens_in([self.lengths[i]])

    def _mean(self) -> int:
        return sum(map(self._length, range(len(self.lengths)))) // max(1, len(self.lengths))


def micro_batches(
    examples: Sequence[Example],
    collator: Collator,
    max_tokens_per_batch: int,
) -> list[list[Example]]:
    """The examples of one optimizer's step in parts of like lengths, the longest first, each of at
    most so many tokens, padding included.

        for part in micro_batches(examples, collate, 4096):
            dpo_loss(model, collate(part), num_pairs=len(examples)).loss.backward()

    has the gradient of the whole batch, and the memory and the padding of a part.

    Raises:
        ValueError: naming the argument; an example that alone exceeds the budget.
    """
    _whole("max_tokens_per_batch", max_tokens_per_batch, 1)
    lengths = _lengths(examples, collator, max_tokens_per_batch)
    order = longest_first(range(len(lengths)), lengths, collator)
    parts = to_budget(order, lengths, collator, max_tokens_per_batch)
    return [[examples[i] for i in part] for part in parts]


Length = tuple[int, tuple[int, ...]]  # of a prompt, and of its answers


def _lengths(examples: Sequence[Example], collator: Collator, budget: int) -> list[Length]:
    lengths = [collator.length_of(examples[i]) for i in range(len(examples))]
    check_budget(lengths, collator, budget)
    return lengths


def check_budget(lengths: Sequence[Length], collator: Collator, budget: int) -> None:
    """
    Raises:
        ValueError: an example by itself exceeds the budget.
    """
    for i, length in enumerate(lengths):
        tokens = collator.tokens_in([length])
        if tokens > budget:
            raise ValueError(
                f"max_tokens_per_batch should be at least {tokens}, which examples[{i}] has by "
                f"itself, got {budget} (or give the collator a max_length)"
            )


def longest_first(
    indices: Iterable[int], lengths: Sequence[Length], collator: Collator
) -> list[int]:
    return sorted(indices, key=lambda i: (-collator.tokens_in([lengths[i]]), i))


def to_budget(
    order: Sequence[int], lengths: Sequence[Length], collator: Collator, budget: int
) -> Iterator[list[int]]:
    """In this order, as many as fit: found by doubling, then by halves."""

    def fit(count: int) -> bool:
        part = order[start : start + count]
        return collator.tokens_in([lengths[i] for i in part]) <= budget

    start = 0
    while start < len(order):
        fits, over = 1, 2
        while start + over <= len(order) and fit(over):
            fits, over = over, 2 * over
        over = min(over, len(order) - start + 1)
        while over - fits > 1:
            middle = (fits + over) // 2
            if fit(middle):
                fits = middle
            else:
                over = middle
        yield list(order[start : start + fits])
        start += fits


def _whole(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} should be an integer of at least {at_least}, got {value!r}")
