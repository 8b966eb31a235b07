"""A reference computed once: its log-probabilities of a data set, kept in a folder.

    reference_logps     computes them, or what is missing of them
    load_reference      the rows, once the folder is found to be about what it should be about
    reference_batches   the batches in which they were computed

What they depend on is written down with them (`reference_key.py`); how they are written is
`reference_folder.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.sequences import sequence_sums
from ..integrations import hf
from ..integrations.heads import HeadReader
from ..integrations.reference import BASE, check_base, with_adapter, without_dropout
from ..integrations.tokens import TokenOptions
from ..integrations.unwrap import causal_lm, peft_model
from . import reference_key as keys
from .collator import Batch, Example, PairCollator
from .columns import IDS
from .reference_folder import FORMAT, Answers, Folder, versions
from .sampler import Length, check_budget, longest_first, to_budget

# What a kill loses at most, beside the batch that is being computed.
SAVE_SECONDS = 30.0
SAVE_EXAMPLES = 4096

Progress = Callable[[int, int], object]  # of how many examples it is known, of how many in all


def reference_logps(
    model: nn.Module,
    examples: Sequence[Example],
    collator: PairCollator,
    out: str | os.PathLike[str],
    *,
    max_tokens_per_batch: int = 16_384,
    batches: Iterable[Sequence[int]] | None = None,
    tokenizer: Any = None,
    ref_adapter: str | None = None,
    autocast: torch.dtype | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    progress: bool | Progress = True,
) -> Any:
    """Log-probabilities of every answer, and of every token of it, under a reference, written into
    a folder as Parquet.

    A run that was killed is continued by the same call: what is whole in the folder stays, no
    example is lost or computed into it twice, and the numbers are those of a run that was not
    killed, to the bit. A finished folder is read and nothing is computed. The folder says what it
    is about (the model's weights, configuration, dtype and attention, the adapter, the tokenizer,
    the ids, the collator, the temperature, the batches, fastdpo's version): where one of these is
    another, the call is refused.

    A number depends in its last bits on the batch in which it is computed, as matrix products of
    other shapes add in another order. Where a training batch has the same examples in the same
    order, is made by an equal collator, and the policy is still the reference, the margin is 0 to
    the bit, in 16 bits too. `batches` takes those of a sampler; `reference_batches` gives training
    those that were computed here. See docs/tasks/reference.md.

    Args:
        model: the reference: a causal language model of transformers, on its device. A PEFT model's
            reference is named by ref_adapter.
        examples: mappings with `prompt_ids`, `chosen_ids` and `rejected_ids`, as
            `fastdpo.data.prepare` makes them, by index: a list or a `datasets.Dataset`. Other
            entries are left out.
        collator: what makes batches of them: give that of the training. Its `attention` is to be
            the model's.
        out: the folder; made here.
        max_tokens_per_batch: the most tokens of a batch as the collator lays it out, padding
            included. The examples are sorted by length for it, the longest first: where memory does
            not suffice, that shows at once.
        batches: lists of indices, in the place of those made by max_tokens_per_batch: what a
            `TokenBudgetSampler.batches()` returns, say. Of an example that several have, the first
            counts; examples that none has follow in batches by max_tokens_per_batch.
        tokenizer: what the ids are of; only to be compared later.
        ref_adapter: of a PEFT model the adapter that makes it the reference, trained later or not,
            or "__base__" for the model without adapters.
        autocast: run under `torch.autocast` with this dtype, as the training will.
        temperature, workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.
        progress: True shows a bar; a function gets the number of examples that are done, and that
            of all, after every batch.

    Returns:
        What `load_reference(out)` returns: a `datasets.Dataset`.

    Raises:
        ValueError: naming the argument, or every part in which the folder differs, before anything
            is computed; a model's rotations would make the numbers depend on the batches, and not
            in the last bits alone (longrope, dynamic), and there are none; another process writes
            into the folder; or a log-probability is no finite number, naming
            the example (what was computed until then stays).
        UnsupportedModel: a ValueError; see `fastdpo.integrations.hf.sequence_logps`.
    """
    _needs_datasets()
    _alone()
    folder = Folder(out)
    folder.check("out")
    run = Run.checked(
        model,
        collator,
        ref_adapter,
        autocast,
        TokenOptions((), temperature, workspace_bytes, backend),
    )
    _whole("max_tokens_per_batch", max_tokens_per_batch)
    if not (callable(progress) or isinstance(progress, bool)):
        raise ValueError(f"progress should be True, False or a function, got {progress!r}")
    lengths, data = _read(examples, run)
    if batches is None:
        found = [prompt + answer for prompt, answers in lengths for answer in answers]
        refuse_rotations(model, found)
    planned = _planned(lengths, collator, max_tokens_per_batch, batches)
    key = {
        **keys.version_part(),
        **data.part(),
        **keys.collator_parts(collator),
        **keys.tokenizer_part(tokenizer),
        "temperature": float(temperature),
        **keys.model_parts(model, ref_adapter, autocast),
        "max_tokens_per_batch": max_tokens_per_batch,
        **keys.batches_part(planned),
        "workspace_bytes": workspace_bytes,
        "backend": backend,
    }
    _refuse_difference(folder, key)
    manifest = folder.manifest()
    if manifest is None or not manifest["finished"]:
        shortest = min(range(len(lengths)), key=lambda i: collator.tokens_in([lengths[i]]))
        next(run.answers(examples, [[shortest]]))  # whatever the model refuses, it refuses now
    with folder.locked("out"):
        _refuse_difference(folder, key)
        if not _begun(folder):
            count = {"examples": len(lengths), "batches": len(planned)}
            made = {"device": run.device_name, **versions()}
            folder.begin({"format": FORMAT, **count, "key": key, "made": made}, planned)
        folder.tidy()
        manifest = folder.manifest()
        assert manifest is not None
        if not manifest["finished"]:
            with _shown(progress) as shown:
                _fill(folder, run, examples, planned, shown)
            folder.finish(lambda i: run.ids(examples, i))
    return load_reference(out)


def load_reference(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    ref_adapter: str | None = None,
    autocast: torch.dtype | None = None,
    examples: Sequence[Example] | None = None,
    tokenizer: Any = None,
    collator: PairCollator | None = None,
    temperature: float | None = None,
) -> Any:
    """The rows of a finished folder, in the order of the data set.

    Whatever is given is compared with what the folder is about; what is not given is taken on
    trust. `load_reference(folder, model=policy, collator=collator)` before training finds out
    whether the policy starts at its reference.

    Args:
        folder: that `reference_logps` or `fastdpo ref-logps` has written.
        model, ref_adapter, autocast: the reference, as in `reference_logps`, or the policy that is
            to start there.
        examples: the data set, before truncation or after.
        tokenizer, collator, temperature: as in `reference_logps`.

    Returns:
        A `datasets.Dataset`, which lies on the disk. Its columns: the ids that the numbers are of,
        truncated, `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints); the sums that
        `PairCollator` and TRL read, `ref_chosen_logps`, `ref_rejected_logps` (nats, fp32; fp64 of
        fp64 models), as `hf.sequence_logps` gives them; and by token `ref_chosen_token_logps`,
        `ref_rejected_token_logps` (lists, as long as the answers).

    Raises:
        ValueError: the folder holds no reference, or an unfinished one, or differs, naming every
            part that does.
    """
    _needs_datasets()
    manifest = _finished(folder)
    here: keys.Key = {}
    if collator is not None:
        here |= keys.collator_parts(_collator(collator))
    if model is not None:
        _check_adapter(model, ref_adapter)
        here |= keys.model_parts(model, ref_adapter, autocast)
    elif ref_adapter is not None or autocast is not None:
        given = "autocast" if ref_adapter is None else "ref_adapter"
        raise ValueError(f"{given} should come with model, which is None")
    if examples is not None:
        there = manifest["key"]
        cut = PairCollator(0, "padded", there["max_length"], there["truncation_mode"])
        here |= keys.data_part(_sequence(examples), cut)
    if tokenizer is not None:
        here |= keys.tokenizer_part(tokenizer)
    if temperature is not None:
        here["temperature"] = float(temperature)
    if here:
        found = keys.differences(manifest["key"], {**keys.version_part(), **here})
        if found:
            raise ValueError(
                f"folder {os.fspath(folder)!r} holds the reference of something else: "
                f"{'; '.join(found)}. Compute it for what is here (reference_logps, or fastdpo "
                "ref-logps) in another folder; what is not given is not compared"
            )
    from datasets import Dataset

    return Dataset.from_parquet(Folder(folder).files())


def reference_batches(folder: str | os.PathLike[str]) -> list[list[int]]:
    """The batches in which a finished reference was computed, lists of indices of its rows.

    For a DataLoader's `batch_sampler`, in any order: with the collator that it was computed with,
    every batch is the one that the reference saw, and the margin exactly 0 until the policy moves.
    Every example is in one of them, the longest come first.

    Raises:
        ValueError: as of `load_reference`.
    """
    _finished(folder)
    return Folder(folder).batches()


# ---- Checks


def _needs_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        message = "a reference is kept by datasets: pip install 'fastdpo[data]'"
        raise ImportError(message) from error


def _alone() -> None:
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise ValueError(
            "reference_logps should be called where torch.distributed has one process, got "
            f"{group.get_world_size()}: compute the reference before the training (fastdpo "
            "ref-logps), and load it in every process (load_reference)"
        )


def _finished(folder: str | os.PathLike[str]) -> dict[str, Any]:
    found = Folder(folder)
    manifest = found.manifest()
    if manifest is None:
        raise ValueError(
            f"folder should be one that reference_logps has written, got {os.fspath(folder)!r}"
        )
    if not manifest["finished"]:
        raise ValueError(
            f"folder {os.fspath(folder)!r} should be finished, got {found.done()} of "
            f"{manifest['batches']} batches: run reference_logps (fastdpo ref-logps) again, which "
            "continues"
        )
    return manifest


def _begun(folder: Folder) -> bool:
    """Is there anything to lose?"""
    manifest = folder.manifest()
    return manifest is not None and bool(manifest["finished"] or folder.done())


def _refuse_difference(folder: Folder, key: keys.Key) -> None:
    """
    Raises:
        ValueError: what has been computed there is of something else.
    """
    manifest = folder.manifest()
    if manifest is None or not _begun(folder):
        return
    found = keys.differences(manifest["key"], key)
    if found:
        raise ValueError(
            f"out {str(folder.path)!r} holds the reference of something else: {'; '.join(found)}. "
            "Give another folder, or delete this one"
        )


def _check_adapter(model: nn.Module, ref_adapter: str | None) -> None:
    causal_lm(model)
    peft = peft_model(model)
    if peft is None:
        if ref_adapter is not None:
            raise ValueError(
                f"ref_adapter should be None for a model that is no PEFT model, got {ref_adapter!r}"
            )
        return
    names = list(peft.peft_config)
    if ref_adapter != BASE and ref_adapter not in names:
        raise ValueError(
            f"ref_adapter should be the adapter that is the reference, one of {names}, or {BASE!r} "
            f"for the model without adapters, got {ref_adapter!r}"
        )
    if ref_adapter == BASE:
        check_base(peft)
    if any(getattr(module, "merged", False) is True for module in peft.modules()):
        raise ValueError("model should have its adapters unmerged (unmerge_adapter)")


def _collator(collator: object) -> PairCollator:
    if not isinstance(collator, PairCollator):
        raise ValueError(
            f"collator should be a fastdpo.data.PairCollator, got {type(collator).__name__}"
        )
    return collator


def _sequence(examples: Any) -> Sequence[Example]:
    if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")) or isinstance(
        examples, (str, Mapping)
    ):
        raise ValueError(
            "examples should be a list or a datasets.Dataset, which have a length and are read by "
            f"index, got {type(examples).__name__}"
        )
    if len(examples) == 0:
        raise ValueError("examples should not be empty")
    return examples


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} should be an integer of at least 1, got {value!r}")


# ---- Batches


def _read(examples: Any, run: Run) -> tuple[list[Length], keys.DataHash]:
    lengths, data = [], keys.DataHash()
    embedded, head = run.vocab_sizes
    for i in range(len(_sequence(examples))):
        prompt, answers = run.collator._cut(i, examples[i])
        for ids, size in zip((prompt, *answers), (embedded, head, head), strict=True):
            if max(ids) >= size:
                raise ValueError(
                    f"examples[{i}] should have token ids in [0, {size}), the model's vocabulary, "
                    f"got {max(ids)}"
                )
        data.add(prompt, answers)
        lengths.append((len(prompt), tuple(map(len, answers))))
    return lengths, data


def refuse_rotations(model: nn.Module, lengths: Sequence[int]) -> None:  # of sequences
    """
    Raises:
        ValueError: the longest sequence of a batch decides on the rotations of all of them.
    """
    config = causal_lm(model).config.get_text_config()
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    for kind, limit in _limits(config):
        mixed = shortest < longest if kind == "dynamic" else shortest <= limit
        if longest > limit and mixed:
            raise ValueError(
                f"examples should have at most {limit} tokens, prompt and answer, or batches be "
                f"those of the training, got {longest} tokens: the model's rotations ({kind}) "
                "depend on a batch's longest sequence, and with them the numbers of the others"
            )


def _limits(config: Any) -> Iterator[tuple[str, int]]:
    """Of rotations that are others for long sequences: up to which length they are the same."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (given, *given.values()):  # of the model, or of each kind of its layers
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind == "dynamic":
            yield kind, config.max_position_embeddings
        elif kind == "longrope":
            own = getattr(config, "original_max_position_embeddings", None)
            limit = rope.get("original_max_position_embeddings") or own
            yield kind, limit or config.max_position_embeddings


def _planned(
    lengths: Sequence[Length],
    collator: PairCollator,
    max_tokens: int,
    given: Iterable[Sequence[int]] | None,
) -> list[list[int]]:
    planned: list[list[int]] = []
    seen: set[int] = set()
    for number, batch in enumerate([] if given is None else given):
        if isinstance(batch, (str, Mapping)) or not isinstance(batch, (Sequence, Tensor)):
            raise ValueError(
                f"batches should be lists of indices, got {type(batch).__name__} as batch {number}"
            )
        own = [int(i) for i in batch]
        wrong = [i for i in own if not 0 <= i < len(lengths)]
        if wrong or len(set(own)) < len(own) or not own:
            got = f"{wrong[0]} in" if wrong else "an example twice in" if own else "none in"
            raise ValueError(
                f"batches should be of different indices in [0, {len(lengths)}), got {got} batch "
                f"{number}"
            )
        if not seen.issuperset(own):
            planned.append(own)
            seen.update(own)
    rest = [i for i in range(len(lengths)) if i not in seen]
    check_budget(lengths, collator, max_tokens)
    order = longest_first(rest, lengths, collator)
    return planned + list(to_budget(order, lengths, collator, max_tokens))


# ---- The reference


@dataclass(frozen=True)
class Run:
    """A model that is the reference, and how it is asked."""

    model: nn.Module
    collator: PairCollator
    ref_adapter: str | None
    autocast: torch.dtype | None
    options: TokenOptions
    device: torch.device
    vocab_sizes: tuple[int, int]  # of the embeddings, and of the head

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        collator: PairCollator,
        ref_adapter: str | None,
        autocast: torch.dtype | None,
        options: TokenOptions,
    ) -> Run:
        """
        Raises:
            ValueError: naming the argument.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model should be a model of transformers, got {type(model).__name__}")
        _check_adapter(model, ref_adapter)
        _collator(collator)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"autocast should be None, torch.bfloat16 or torch.float16, got {autocast!r}"
            )
        lm = causal_lm(model)
        embedded = lm.get_input_embeddings().weight
        vocab_sizes = (embedded.shape[0], HeadReader.of(lm).vocab_size)
        return cls(model, collator, ref_adapter, autocast, options, embedded.device, vocab_sizes)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def ids(self, examples: Sequence[Example], index: int) -> dict[str, list[int]]:
        """What the log-probabilities are of."""
        prompt, answers = self.collator._cut(index, examples[index])
        return {name: list(ids) for name, ids in zip(IDS, (prompt, *answers), strict=True)}

    def answers(
        self, examples: Sequence[Example], batches: Iterable[Sequence[int]]
    ) -> Iterator[Answers]:
        """Of each batch, in its order.

        Raises:
            ValueError: a log-probability is no finite number.
        """
        with self._state():
            for batch in batches:
                read = [examples[i] for i in batch]
                rows = [{name: example[name] for name in IDS} for example in read]
                sums, found = self._logps(self.collator(rows))
                for i, a, b in zip(batch, *sums.view(2, -1).tolist(), strict=True):
                    if not abs(a) < float("inf") or not abs(b) < float("inf"):
                        raise ValueError(
                            f"model should give finite log-probabilities, got {a} and {b} of the "
                            f"answers of examples[{i}]"
                        )
                numbers, tokens = list(sums.numpy()), [part.numpy() for part in found]
                half = len(batch)
                yield Answers(
                    list(batch), numbers[:half], numbers[half:], tokens[:half], tokens[half:]
                )

    @contextmanager
    def _state(self) -> Iterator[None]:
        """No gradient, no dropout, the adapter, autocast; afterwards as it was."""
        peft = peft_model(self.model)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if peft is not None:
                name = None if self.ref_adapter == BASE else self.ref_adapter
                stack.enter_context(with_adapter(peft, name))
            stack.enter_context(without_dropout(self.model))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            yield

    def _logps(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:  # [2B], each [its length]
        """As `hf.sequence_logps` gives them, and of every token of the answers, on the CPU."""
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        options = self.options
        values = hf.sequence_logps(
            self.model,
            **batch,
            per_token=True,
            temperature=options.temperature,
            workspace_bytes=options.workspace_bytes,
            backend=options.backend,
        )
        assert isinstance(values, Tensor)
        if "row_lengths" in batch:
            lengths = batch["row_lengths"]
        else:
            carries = batch["completion_mask"].bool()
            values, lengths = values[carries], carries.sum(-1)
        sums = sequence_sums(values, lengths)  # as the loss adds them, to the bit
        return sums.cpu(), list(values.cpu().split(lengths.tolist()))


def _fill(
    folder: Folder,
    run: Run,
    examples: Sequence[Example],
    batches: Sequence[Sequence[int]],
    shown: Progress,
) -> None:
    """Computes what is missing, and writes it bit by bit."""
    first = folder.done()
    seen = {i for batch in batches[:first] for i in batch}
    shown(len(seen), len(examples))
    answers, end, saved = Answers(), first, time.monotonic()
    try:
        for found in run.answers(examples, batches[first:]):
            for row, i in enumerate(found.example):
                if i not in seen:  # else an earlier batch had it
                    seen.add(i)
                    for name, column in vars(found).items():
                        vars(answers)[name].append(column[row])
            end += 1
            shown(len(seen), len(examples))
            late = time.monotonic() - saved > SAVE_SECONDS
            if late or len(answers.example) >= SAVE_EXAMPLES:
                folder.write_part(first, end, answers)
                answers, first, saved = Answers(), end, time.monotonic()
    finally:  # an interrupt loses nothing
        if end > first:
            folder.write_part(first, end, answers)


@contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(desc="Reference", unit=" pairs") if progress else nullcontext() as bar:

        def show(done: int, total: int) -> None:
            if bar is not None:
                bar.total = total
                bar.update(done - bar.n)

        yield show
