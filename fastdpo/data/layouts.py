"""Where the tokens of prompts and their answers lie in the rows of a batch, and which of them
predict what.

    padded           a row per sequence: prompt, answer, padding
    packed           several sequences a row, one behind the other
    shared_prompts   several prompts a row, each with all of its answers behind it

The rows of the last two have documents: a sequence, or a prompt with its answers. No document sees
another, no answer sees another answer, and the first token of an answer stands at the position
behind its prompt, wherever in the row it lies. The last token of a shared prompt predicts the first
token of every answer: it is named once for each.

Pure Python on token ids; everything is known here, on the CPU, before a GPU is asked anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("padded", "packed", "shared_prompts")
PADDING = -1  # the document of padding


@dataclass(frozen=True)
class Document:
    """A prompt, and the answers that share it."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    sequences: Sequence[int]  # of each answer, which of the batch's sequences it is

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(answer) for answer in self.answers)


@dataclass(frozen=True)
class Rows:
    """R rows of T tokens, and the N tokens with loss of S sequences, one sequence after another."""

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, each token's place in its sequence
    document_ids: Tensor  # [R, T] int32, PADDING where nothing is
    branch_ids: Tensor  # [R, T] int32: 0 of a prompt, k of the k-th answer behind it
    row_index: Tensor  # [N] int64 the position among the R·T that predicts the token
    row_labels: Tensor  # [N] int64 the token
    row_lengths: Tensor  # [S] int64 how many of them each sequence has


def documents_of(
    layout: str,
    prompts: Sequence[Sequence[int]],  # B
    answers: Sequence[Sequence[Sequence[int]]],  # of each prompt, K
) -> list[Document]:
    """Sequences are numbered as losses want them: the first answers of all prompts, then the second
    ones, and so on."""
    count, found = len(prompts), []
    for b, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        numbers = [k * count + b for k in range(len(own))]
        if layout == "shared_prompts":
            found.append(Document(prompt, own, numbers))
        else:
            found += [Document(prompt, [a], [s]) for a, s in zip(own, numbers, strict=True)]
    return found


def filled(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which lengths go into which row of at most `capacity`: the longest first, each into the first
    row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return [sorted(row) for row in rows]


def capacity_of(
    lengths: Sequence[int],
    *,
    one_row: bool,  # or rows no longer than the longest document, whose attention is quadratic
    multiple_of: int = 1,
) -> int:
    longest = sum(lengths) if one_row else max(lengths, default=0)
    return -(-longest // multiple_of) * multiple_of


def rows_of(
    documents: Sequence[Document],
    pad_token_id: int,
    *,
    one_row: bool = False,
    multiple_of: int = 1,
) -> Rows:
    lengths = [document.length for document in documents]
    length = capacity_of(lengths, one_row=one_row, multiple_of=multiple_of)
    placed = filled(lengths, length)
    shape = (len(placed), length)
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    document_ids = torch.full(shape, PADDING, dtype=torch.int32)
    branch_ids = torch.zeros(shape, dtype=torch.int32)
    count = sum(len(document.answers) for document in documents)
    index: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * count
    labels = list(index)
    for r, row in enumerate(placed):
        column = 0
        for d in row:
            document = documents[d]
            start, prompt = column, len(document.prompt)
            document_ids[r, start : start + document.length] = d
            parts = [document.prompt, *document.answers]
            for k, part in enumerate(parts):
                stop = column + len(part)
                tokens = torch.tensor(part)
                input_ids[r, column:stop] = tokens
                first = 0 if k == 0 else prompt
                position_ids[r, column:stop] = torch.arange(first, first + len(part))
                branch_ids[r, column:stop] = k
                if k:
                    predicting = torch.arange(column - 1, stop - 1)
                    predicting[0] = start + prompt - 1
                    sequence = document.sequences[k - 1]
                    index[sequence] = predicting + r * length
                    labels[sequence] = tokens
                column = stop
    return Rows(
        input_ids,
        position_ids,
        document_ids,
        branch_ids,
        torch.cat(index) if count else torch.empty(0, dtype=torch.int64),
        torch.cat(labels) if count else torch.empty(0, dtype=torch.int64),
        torch.tensor([len(own) for own in labels], dtype=torch.int64),
    )


def varlen(lengths: Sequence[int], total: int) -> dict[str, Any]:
    """What flash-attn's kernels for various lengths want to know; padding is a sequence."""
    if sum(lengths) < total:
        lengths = [*lengths, total - sum(lengths)]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def tokens_in(
    layout: str,
    lengths: Sequence[tuple[int, Sequence[int]]],  # of each prompt, and of its answers
    *,
    one_row: bool = False,
    multiple_of: int = 1,
) -> int:
    """How many tokens a batch of these lengths has, padding included: R·T."""
    if not lengths:
        return 0
    documents = [
        prompt + answer for prompt, answers in lengths for answer in _documents(layout, answers)
    ]
    if layout == "padded":
        return len(documents) * capacity_of(documents, one_row=False, multiple_of=multiple_of)
    length = capacity_of(documents, one_row=one_row, multiple_of=multiple_of)
    if one_row:
        return length
    return len(filled(documents, length)) * length


def _documents(layout: str, answers: Sequence[int]) -> Sequence[int]:
    return [sum(answers)] if layout == "shared_prompts" else answers
