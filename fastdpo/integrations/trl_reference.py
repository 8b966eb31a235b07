"""TRL's DPOTrainer on rows whose reference is known (`fastdpo.data.load_reference`).

TRL 1.16 tokenizes every data set from its text, and with `precompute_ref_log_probs=True` computes
the reference's log-probabilities of every one: columns that are there already are an error. Its
collator, its loss and its metrics take them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..data.columns import IDS, REFERENCE

_OURS = "_takes_known_references"


def take_known_references() -> Callable[[], None]:
    """Lets the DPOTrainers that are built from now on take such rows as they are.

    Returns:
        What undoes it.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    names = ("_prepare_dataset", "_precompute_ref_logps")
    before = {name: vars(DPOTrainer)[name] for name in names if name in vars(DPOTrainer)}
    if len(before) < len(names) or hasattr(before[names[0]], _OURS):
        return lambda: None  # a TRL that is made otherwise, or done before
    for name, wrapped in zip(names, (_prepare, _precompute), strict=True):
        setattr(DPOTrainer, name, wrapped(before[name]))

    def undo() -> None:
        for name, function in before.items():
            setattr(DPOTrainer, name, function)

    return undo


def _prepare(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def prepare(self: Any, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        if not _known(dataset) or not _wanted(dataset, args):
            return theirs(self, dataset, processing_class, args, name)
        if args.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha should be None for rows whose reference is known, got {args.ld_alpha}: "
                "the reference's sums would have to be weighted by it as well"
            )
        _refuse_truncation(dataset, args.max_length, name)
        return dataset

    setattr(prepare, _OURS, True)
    return prepare


def _precompute(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def precompute(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset if _known(dataset) else theirs(self, dataset, *args, **kwargs)

    return precompute


def _known(dataset: Any) -> bool:
    columns = getattr(dataset, "column_names", None) or ()
    return all(name in columns for name in (*IDS, *REFERENCE))


def _wanted(dataset: Any, args: Any) -> bool:
    """
    Raises:
        ValueError: the trainer would neither read the columns nor find the text.
    """
    if not args.precompute_ref_log_probs and "chosen" not in dataset.column_names:
        raise ValueError(
            "precompute_ref_log_probs should be True for a data set that has ref_chosen_logps and "
            "ref_rejected_logps, got False"
        )
    return args.precompute_ref_log_probs


def _refuse_truncation(dataset: Any, max_length: int | None, name: str) -> None:
    """
    Raises:
        ValueError: TRL's collator would cut sequences whose log-probabilities are known whole.
    """
    if max_length is None:
        return
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in dataset.select_columns(list(IDS)).with_format(None)
    )
    if longest > max_length:
        raise ValueError(
            f"max_length should be None or at least {longest}, the longest of the {name} rows "
            f"whose reference is known, got {max_length}: compute the reference with this "
            "max_length, or train without"
        )
