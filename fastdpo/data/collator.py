"""Examples of token ids to batches that `fastdpo.integrations.hf.dpo_loss` takes as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .columns import IDS, REFERENCE, REFERENCE_TOKENS
from .layouts import LAYOUTS, documents_of, rows_of, tokens_in, varlen
from .truncation import check, truncate

Example = Mapping[str, Any]
Batch = dict[str, Any]
Ids = Sequence[int]

# Kernels for sequences of various lengths in one row, which know no branches.
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
# What looks at every pair of tokens in a row, whether one sees the other or not.
_DENSE = ("sdpa", "eager")
ATTENTION = (*_DENSE, "flex_attention", *_FLASH)


@dataclass(frozen=True)
class Collator:
    """Prompts with K answers each, to a batch; options as in `PairCollator`."""

    pad_token_id: int
    layout: str = "padded"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    attention: str = "sdpa"
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        _whole("pad_token_id", self.pad_token_id, at_least=0)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout should be one of {list(LAYOUTS)}, got {self.layout!r}")
        check(self.max_length, self.truncation_mode)
        if self.attention not in ATTENTION:
            raise ValueError(
                f"attention should be one of {list(ATTENTION)}, got {self.attention!r}"
            )
        if self.layout == "shared_prompts" and self.attention in _FLASH:
            raise ValueError(
                "attention should be 'flex_attention', 'sdpa' or 'eager' for layout="
                f"'shared_prompts', got {self.attention!r}, whose kernels know sequences and no "
                "branches (layout='packed' goes with it)"
            )
        _whole("pad_to_multiple_of", self.pad_to_multiple_of, at_least=1)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        cut = [self._cut(i, example) for i, example in enumerate(examples)]
        if not cut:
            raise ValueError("examples should not be empty")
        counts = sorted({len(answers) for _, answers in cut})
        if len(counts) > 1:
            raise ValueError(f"examples should have the same number of answers, got {counts}")
        batch = self._tokens([prompt for prompt, _ in cut], [answers for _, answers in cut])
        for key, values in self._beside(examples).items():
            batch[key] = values
        weights = _column(examples, "sample_weight")
        if weights is not None:
            batch["sample_weights"] = torch.tensor([float(w) for w in weights])
        return batch

    def _parts(self, where: str, example: Example) -> tuple[Ids, list[Ids]]:
        """The prompt and its answers."""
        raise NotImplementedError

    def _beside(self, examples: Sequence[Example]) -> Batch:
        """What a batch has beside its tokens."""
        raise NotImplementedError

    def length_of(self, example: Example) -> tuple[int, tuple[int, ...]]:
        """The tokens of its prompt, and of each answer, as they will be in a batch."""
        prompt, answers = self._cut(None, example)
        return len(prompt), tuple(len(answer) for answer in answers)

    def tokens_in(self, lengths: Sequence[tuple[int, Sequence[int]]]) -> int:
        """Of a batch of examples of these lengths, padding included: how many tokens the model
        runs on."""
        multiple = self.pad_to_multiple_of
        return tokens_in(self.layout, lengths, one_row=self._one_row, multiple_of=multiple)

    @property
    def _one_row(self) -> bool:
        return self.attention not in _DENSE

    def _cut(self, number: int | None, example: Example) -> tuple[Ids, list[Ids]]:
        where = "example" if number is None else f"examples[{number}]"
        prompt, answers = self._parts(where, example)
        try:
            return truncate(prompt, answers, self.max_length, self.truncation_mode)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _tokens(
        self,
        prompts: Sequence[Ids],  # B
        answers: Sequence[Sequence[Ids]],  # of each prompt, K
    ) -> Batch:
        documents = documents_of(self.layout, prompts, answers)
        if self.layout == "padded":
            sequences = sorted(documents, key=lambda document: document.sequences[0])
            pairs = [(document.prompt, document.answers[0]) for document in sequences]
            return padded(pairs, self.pad_token_id, self.pad_to_multiple_of)
        rows = rows_of(
            documents,
            self.pad_token_id,
            one_row=self._one_row,
            multiple_of=self.pad_to_multiple_of,
        )
        batch: Batch = {
            "input_ids": rows.input_ids,
            "position_ids": rows.position_ids,
            "document_ids": rows.document_ids,
            "row_index": rows.row_index,
            "row_labels": rows.row_labels,
            "row_lengths": rows.row_lengths,
        }
        if self.layout == "shared_prompts":
            batch["branch_ids"] = rows.branch_ids
        if self.attention in _FLASH:
            batch |= varlen([document.length for document in documents], rows.input_ids.numel())
        return batch


@dataclass(frozen=True)
class PairCollator(Collator):
    """Preference pairs to a batch.

    An example is a mapping with `prompt_ids`, `chosen_ids` and `rejected_ids` (TRL's names: lists
    of token ids, answers ending as they should be learnt to end), and optionally
    `ref_chosen_logps` and `ref_rejected_logps`, and `sample_weight` (numbers, of all examples or of
    none). Other entries are left out.

    The batch is of B pairs, S = 2B sequences, the chosen ones first. The tokens with loss are the
    answers'. It has

      - padded, TRL's layout: `input_ids`, `attention_mask`, `completion_mask` [S, T], padded on the
        right, and `row_index` [N];
      - packed and shared_prompts: `input_ids`, `position_ids` and `document_ids` [R, T] (and of
        shared prompts `branch_ids` [R, T]), R rows in which sequences, or prompts with both of
        their answers, lie one behind the other; `row_index`, `row_labels` [N] and `row_lengths`
        [S]: the position that predicts each token with loss, the token, and how many of them each
        sequence has. From these `dpo_loss` makes the mask that the model's attention takes. For
        flash-attn also its `cu_seq_lens_q`, `cu_seq_lens_k` [S + 1], `max_length_q` and
        `max_length_k`;
      - `ref_chosen_logps`, `ref_rejected_logps` and `sample_weights` [B] fp32, where the examples
        have them.

    Everything in it is known on the CPU: nothing waits for a GPU.

    Args:
        pad_token_id: what fills the rows up.
        layout: "padded"; "packed", without padding; or "shared_prompts", where each prompt is
            computed once for both answers. Models for which the latter two would be wrong are
            refused by `dpo_loss`.
        max_length: the most tokens of a sequence, prompt and answer; None does not truncate.
        truncation_mode: "keep_start" or "keep_end", see `fastdpo.data.truncate`.
        attention: the model's attention implementation, in transformers' names. For "sdpa" and
            "eager", which look at every pair of tokens of a row, rows are no longer than the
            longest document; for "flex_attention" and "flash_attention_2" everything lies in one
            row.
        pad_to_multiple_of: rows' length is a multiple of it.

    Raises:
        ValueError: naming the argument; flash-attn cannot do shared prompts. Of a call: naming the
            example's number and its key.
    """

    def _parts(self, where: str, example: Example) -> tuple[Ids, list[Ids]]:
        prompt, *answers = (_ids(where, example, key) for key in IDS)
        return prompt, answers

    def _beside(self, examples: Sequence[Example]) -> Batch:
        found = _reference(examples, REFERENCE)
        if found and self.max_length is not None:
            for i, example in enumerate(examples):
                self._check_known(i, example)
        return found

    def _check_known(self, number: int, example: Example) -> None:
        """A kept reference tells by its tokens what its sums are of.

        Raises:
            ValueError: of something else than what is left of the example.
        """
        prompt, answers = self._cut(number, example)
        for key, answer in zip(REFERENCE_TOKENS, answers, strict=True):
            known = example.get(key)
            if known is None:
                continue
            if len(known) != len(answer) or len(prompt) != len(example["prompt_ids"]):
                raise ValueError(
                    f"examples[{number}] should be what its reference is of, {len(known)} tokens "
                    f"in {key!r}, got {len(answer)} behind {len(prompt)} of a prompt: "
                    f"max_length={self.max_length} cuts it, and the reference is to be computed "
                    "with that"
                )


@dataclass(frozen=True)
class RankingCollator(Collator):
    """Rankings, for plackett_luce: as `PairCollator`, but an example is a mapping with `prompt_ids`
    and `answer_ids`, token ids of K answers, the best first, and optionally `ref_logps`, K numbers.
    The batch has S = K·B sequences, the best ones of all prompts first, and `ref_logps` [S].
    """

    def _parts(self, where: str, example: Example) -> tuple[Ids, list[Ids]]:
        prompt = _ids(where, example, "prompt_ids")
        answers = example.get("answer_ids")
        if not isinstance(answers, (list, tuple)) or len(answers) < 2:
            got = type(answers).__name__ if answers is None else f"{len(answers)} answers"
            raise ValueError(f"{where}['answer_ids'] should be two or more answers, got {got}")
        named = {str(k): answer for k, answer in enumerate(answers)}
        return prompt, [_ids(f"{where}['answer_ids']", named, key) for key in named]

    def _beside(self, examples: Sequence[Example]) -> Batch:
        values = _column(examples, "ref_logps")
        if values is None:
            return {}
        for i, (example, own) in enumerate(zip(examples, values, strict=True)):
            count = len(example["answer_ids"])
            if len(own) != count:
                raise ValueError(
                    f"examples[{i}]['ref_logps'] should be {count} numbers, got {len(own)}"
                )
        return {"ref_logps": torch.tensor(values, dtype=torch.float32).t().flatten()}


@dataclass(frozen=True)
class CompletionCollator(Collator):
    """Single answers, for kto and bco: as `PairCollator`, but an example is a mapping with
    `prompt_ids`, `completion_ids` and `label`, whether the answer is desirable (TRL's names), and
    optionally `ref_logps`, a number. The batch has S sequences in their order, `desirable` [S] bool
    and `ref_logps` [S].
    """

    def _parts(self, where: str, example: Example) -> tuple[Ids, list[Ids]]:
        prompt = _ids(where, example, "prompt_ids")
        return prompt, [_ids(where, example, "completion_ids")]

    def _beside(self, examples: Sequence[Example]) -> Batch:
        labels = _column(examples, "label")
        for i, label in enumerate(labels or [None]):
            if label is None or bool(label) != label:
                raise ValueError(f"examples[{i}]['label'] should be True or False, got {label!r}")
        batch: Batch = {"desirable": torch.tensor([bool(label) for label in labels or ()])}
        values = _column(examples, "ref_logps")
        if values is not None:
            batch["ref_logps"] = torch.tensor([float(value) for value in values])
        return batch


def padded(
    sequences: Sequence[tuple[Ids, Ids]],  # prompt and answer
    pad_token_id: int,
    multiple_of: int = 1,
) -> Batch:
    """A row each, padded on the right."""
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    length = -(-longest // multiple_of) * multiple_of
    input_ids = torch.full((len(sequences), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor([*prompt, *answer])
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = 1
    # Every answer has a prompt, so that all of its tokens are predicted.
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "row_index": completion_mask.flatten().nonzero().squeeze(1) - 1,
    }


def _ids(where: str, example: Example, key: str) -> Ids:
    if not isinstance(example, Mapping) or key not in example:
        kind = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(f"{where} should have the key {key!r}, got {kind}")
    ids = example[key]
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, str) or len(ids) == 0:
        got = "none" if isinstance(ids, (list, tuple)) else type(ids).__name__
        raise ValueError(f"{where}[{key!r}] should be token ids, at least one, got {got}")
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"{where}[{key!r}] should be token ids, integers of at least 0")
    return ids


def _column(examples: Sequence[Example], key: str) -> list[Any] | None:
    """What all examples have under a key; None where none has it."""
    values = [example.get(key) for example in examples]
    missing = [i for i, value in enumerate(values) if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise ValueError(
            f"examples[{missing[0]}] should have {key!r}, as other examples of the batch do"
        )
    return values


def _reference(examples: Sequence[Example], keys: Sequence[str]) -> Batch:
    """The reference's log-probabilities, where the examples have them."""
    columns = {key: _column(examples, key) for key in keys}
    found = {
        key: torch.tensor([float(value) for value in values])
        for key, values in columns.items()
        if values is not None
    }
    if len(found) not in (0, len(keys)):
        (missing_key,) = set(keys) - set(found)
        raise ValueError(f"examples should have {missing_key!r}, as they have {sorted(found)[0]!r}")
    return found


def _whole(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} should be an integer of at least {at_least}, got {value!r}")
