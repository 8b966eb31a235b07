"""Rows: which positions carry loss, found once and handed on."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.core import rows

LABELS = torch.tensor([[-100, 3, 1, -100], [2, -100, 0, 4]])
IGNORED = -100


@pytest.mark.parametrize("index", [None, [1, 2, 7]])
def test_found_rows_are_taken_as_they_are(index):
    index = None if index is None else torch.tensor(index)
    found = rows.find(LABELS, IGNORED, 5, index)
    assert rows.find(LABELS, IGNORED, 5, found) is found
    assert found.labels.tolist() == ([3, 1, 2, 0, 4] if index is None else [3, 1, 4])


@pytest.mark.parametrize("index", [None, [1, 2, 7]])
def test_another_vocabulary_checks_the_same_rows_again(index):
    """A reference's padded vocabulary is larger than the policy's: the positions stay what the
    caller said, and the labels are held to the smaller one.
    """
    index = None if index is None else torch.tensor(index)
    found = rows.find(LABELS, IGNORED, 8, index)
    again = rows.find(LABELS, IGNORED, 5, found)
    assert again.vocab_size == 5
    for a, b in ((again.labels, found.labels), (again.index, found.index)):
        assert torch.equal(a, b)
    assert torch.equal(again.carries, found.carries)
    with pytest.raises(ValueError, match=r"labels should be in \[0, 4\)"):
        rows.find(LABELS, IGNORED, 4, found)


def test_another_vocabulary_where_everything_carries_loss():
    labels = LABELS.clamp(min=0)
    found = rows.find(labels, IGNORED, 8)
    assert found.index is None
    assert rows.find(labels, IGNORED, 5, found).index is None


def test_another_vocabulary_without_data():
    with FakeTensorMode() as mode:
        labels = mode.from_tensor(LABELS)
        index = mode.from_tensor(torch.tensor([1, 2, 7]))
        again = rows.find(labels, IGNORED, 5, rows.find(labels, IGNORED, 8, index))
    assert again.deferred
    assert again.vocab_size == 5
