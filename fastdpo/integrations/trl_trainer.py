"""TRL's DPOTrainer, on rows without padding or with shared prompts, with a budget of tokens, and
with a reference that is computed once.

Losses, metrics and options stay TRL's own. What they are computed from, the log-probabilities of
the answers' tokens [2B, A], comes out of the model's forward as it does in TRL; only that the
forward runs on packed rows (`fastdpo.data.PairCollator`), which travel in the batch beside the
answers.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from trl import DPOConfig, DPOTrainer

from ..core import checks
from ..data import PairCollator, TokenBudgetSampler
from ..data.columns import IDS, REFERENCE, REFERENCE_TOKENS
from ..data.layouts import LAYOUTS
from ..data.reference import reference_logps, refuse_rotations
from ..data.truncation import truncate
from .packing import PACKED_IDS, attention_of
from .reference import BASE, REF_ADAPTER, check_base, check_frozen
from .trl import patched
from .unwrap import causal_lm, peft_model

__all__ = ["FastDPOConfig", "FastDPOTrainer"]

# Of a budget's batches: epochs whose number is looked at, and orders that are tried for one.
_COUNTED, _DRAWS = 3, 16


@dataclass
class FastDPOConfig(DPOConfig):
    """`trl.DPOConfig`, and how the tokens of pairs are laid out. Options that do not go with the
    layout are refused by `FastDPOTrainer`, by name.
    """

    layout: str = field(
        default="shared_prompts",
        metadata={
            "help": "How pairs lie in the rows that the model runs on: 'padded', TRL's own; "
            "'packed', without padding; 'shared_prompts', each prompt once for both answers.",
            "choices": list(LAYOUTS),
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill each process's training batches with pairs of like lengths to this many "
            "tokens, padding included, in place of per_device_train_batch_size pairs. Each pair "
            "weighs the same in an optimizer's step, over processes and accumulated batches."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder for the log-probabilities that precompute_ref_log_probs computes "
            "(fastdpo.data.reference_logps): continued after a kill, used again by later runs, and "
            "refused where the model, the data or the layout is another. In one process."
        },
    )


class FastDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` whose log-probabilities are fastdpo's, on packed rows or shared prompts.

        trainer = FastDPOTrainer(model, ref_model, args=FastDPOConfig(...), train_dataset=dataset)

    Arguments, losses, metrics and options are TRL's, with `FastDPOConfig`'s beside them. References
    that TRL precomputes (`precompute_ref_log_probs`) are computed in the same layout; a data set
    that has the columns `ref_chosen_logps` and `ref_rejected_logps` already keeps them.

    Source: DPOTrainer of TRL 1.15 and later.

    Raises:
        ValueError: naming the option that does not go with the layout (padding_free, images,
            compute_metrics, experts' balancing loss, context parallelism), or the data set.
        UnsupportedModel: a ValueError, from the first step: the model, or its attention
            implementation, cannot do the layout.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        config = given.get("args")
        if config is None:  # as TRL names it
            config = given["args"] = FastDPOConfig("tmp_trainer")
        if not isinstance(config, FastDPOConfig):
            checks.fail("args", "a FastDPOConfig", type(config).__name__)
        _check(config, given)
        self.layout, self._budget = config.layout, config.max_tokens_per_batch
        self._pairs_in_step: Tensor | None = None
        with patched():
            super().__init__(**given)
        self._lay_out()
        if not config.precompute_ref_log_probs:
            self._check_reference(stays=False)
        if self.layout != "padded":
            _check_built(self)
            self._check_lengths()

    def _lay_out(self) -> None:
        """The layout's collator in the place of TRL's, once."""
        theirs: Any = self.data_collator
        model: Any = self.model
        if self.layout == "padded" or isinstance(theirs, _TrainerCollator):
            return
        names = ("pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of")
        options = {name: getattr(theirs, name) for name in names}
        self.data_collator = _TrainerCollator(
            layout=self.layout,
            attention=attention_of(causal_lm(model)),
            **{k: v for k, v in options.items() if v is not None},
        )

    def _check_lengths(self) -> None:
        """Before training, not in the middle of it."""
        collator: Any = self.data_collator
        sets: dict[str, Any] = {"train_dataset": self.train_dataset}
        if isinstance(self.eval_dataset, dict):
            sets |= {f"eval_dataset[{k!r}]": v for k, v in self.eval_dataset.items()}
        else:
            sets["eval_dataset"] = self.eval_dataset
        for name, dataset in sets.items():
            if dataset is None or isinstance(dataset, IterableDataset):
                continue
            columns = [dataset[key] for key in IDS]
            rows = zip(*columns, strict=True)
            for i, (prompt, *answers) in enumerate(rows):
                try:
                    truncate(prompt, answers, collator.max_length, collator.truncation_mode)
                except ValueError as error:
                    raise ValueError(f"{name}[{i}]: {error}") from None

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._lay_out()
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        self._check_reference(stays=self.state.global_step == 0)
        config: Any = self.args
        if config.reference_cache is None:
            return self._precompute_by_trl(dataset, name, batch_size)
        model: Any = self.model if self.ref_model is None else self.ref_model
        peft = peft_model(model) if self.ref_model is None else None
        adapter = None
        if peft is not None:
            adapter = REF_ADAPTER if REF_ADAPTER in peft.peft_config else BASE
        known = reference_logps(
            self.accelerator.unwrap_model(model).to(self.args.device),
            dataset,
            self._collator(),
            Path(config.reference_cache) / name,
            max_tokens_per_batch=self._budget or 16_384,
            ref_adapter=adapter,
            autocast=self._autocast_dtype(),
            progress=not self.args.disable_tqdm,
        )
        for key, values in _sums(known, config.ld_alpha).items():
            dataset = dataset.add_column(key, values)
        return dataset

    def _check_reference(self, stays: bool) -> None:
        """Of a PEFT model by itself: what training starts from, and would move away from."""
        peft = peft_model(self.model) if self.ref_model is None else None  # type: ignore[arg-type]
        if peft is None:
            return
        if REF_ADAPTER not in peft.peft_config:
            check_base(peft)
        if not stays:
            check_frozen(peft)

    def _precompute_by_trl(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL keeps the numbers in the data set's cache, under a name made of data and weights."""
        own: Any = getattr(self, "_precompute_model_hash", None)
        config: Any = self.args
        if not self._is_vision_dataset and not isinstance(dataset, IterableDataset):
            model: Any = self.model if self.ref_model is None else self.ref_model
            refuse_rotations(model, _lengths(dataset, config.max_length))
        cut = (config.max_length, config.truncation_mode)
        subject = (own, self.layout, *cut, config.ld_alpha, str(self._autocast_dtype()))
        self._precompute_model_hash = Hasher.hash(subject)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = own

    def _autocast_dtype(self) -> torch.dtype | None:
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else None

    def _collator(self) -> PairCollator:
        """That counts tokens, and computes the reference; in place of TRL's own where that is
        padded."""
        theirs: Any = self.data_collator
        options = {
            "max_length": theirs.max_length,
            "truncation_mode": theirs.truncation_mode,
            "pad_to_multiple_of": theirs.pad_to_multiple_of or 1,
        }
        attention = getattr(theirs, "attention", "sdpa")
        return PairCollator(theirs.pad_token_id, self.layout, attention=attention, **options)

    # ---- A budget of tokens

    def get_train_dataloader(self) -> DataLoader:
        if self._budget is None:
            return super().get_train_dataloader()
        args, dataset = self.args, self.train_dataset
        self._set_signature_columns_if_needed()
        sampler = _SteadySampler(
            dataset,  # type: ignore[arg-type]
            self._collator(),
            self._budget,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_replicas=args.world_size,
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
        )
        # As it is: accelerate would deal the batches to the processes once more.
        return _Loader(
            self._remove_unused_columns(dataset, description="training"),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Also counts the pairs of an optimizer's step, of all its batches and processes."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._budget is not None:
            count = sum(batch["completion_mask"].shape[0] // 2 for batch in batches)
            here = torch.tensor(count, device=self.accelerator.device)
            self._pairs_in_step = self.accelerator.reduce(here, "sum")
        return batches, items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if return_outputs and self.layout != "padded":
            checks.fail(
                "prediction_loss_only",
                f"True with layout={self.layout!r}, which has no logits",
                "False",
            )
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._pairs_in_step is None or not model.training:
            return found
        # The mean over this batch becomes its share of the mean over the step: what the trainer
        # divides by, accumulated batches and processes, is multiplied in.
        pairs = inputs["completion_mask"].shape[0] // 2
        steps = self.current_gradient_accumulation_steps * self.args.world_size
        share = pairs * steps / self._pairs_in_step
        return (found[0] * share, *found[1:]) if return_outputs else found * share

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        if PACKED_IDS in inputs:
            inputs = {**inputs, "input_ids": inputs[PACKED_IDS]}
        return super().floating_point_ops(inputs)


def _lengths(dataset: Any, max_length: int | None) -> list[int]:
    """Of all sequences, as they are cut."""
    prompts, *answers = ([len(ids) for ids in dataset[key]] for key in IDS)
    found = [a + b for part in answers for a, b in zip(prompts, part, strict=True)]
    return found if max_length is None else [min(length, max_length) for length in found]


def _sums(known: Any, ld_alpha: float | None) -> dict[str, list[float]]:
    """A kept reference as the loss wants it: LD-DPO weights tokens behind the shorter answer."""
    if ld_alpha is None:
        return {key: known[key][:] for key in REFERENCE}
    found: dict[str, list[float]] = {key: [] for key in REFERENCE}
    for row in known.select_columns(list(REFERENCE_TOKENS)):
        pair = [row[key] for key in REFERENCE_TOKENS]
        shared = min(map(len, pair))
        for key, logps in zip(REFERENCE, pair, strict=True):
            tail = math.fsum(logps[shared:])
            found[key].append(math.fsum(logps[:shared]) + ld_alpha * tail)
    return found


class _SteadySampler(TokenBudgetSampler):
    """As many batches in every epoch. transformers counts those of the first, and goes by that: of
    an epoch with more the last ones would be left out, and one with fewer would leave accumulated
    gradients to the next.
    """

    def _planned(self, draw: int = 0) -> list[list[int]]:
        count = self._count
        for number in range(_DRAWS):
            batches = super()._planned(number)
            if len(batches) <= count:
                return _split(batches, count)
        # The first epoch's batches in another order, those of one step together.
        batches, size = self._of_epoch(0), self.num_replicas
        steps = [batches[i : i + size] for i in range(0, len(batches), size)]
        random.Random(f"{self.seed} {self.epoch}").shuffle(steps)
        return _split([batch for step in steps for batch in step], count)

    @functools.cached_property
    def _count(self) -> int:
        """The most that one of the first epochs has: the others then rarely have more."""
        return max(len(self._of_epoch(epoch)) for epoch in range(_COUNTED))

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        own, self.epoch = self.epoch, epoch
        try:
            return super()._planned()
        finally:
            self.epoch = own


def _split(batches: list[list[int]], count: int) -> list[list[int]]:
    """Two of the batches with the most pairs, until there are so many; the second halves last."""
    found = list(batches)
    largest = [(-len(batch), i) for i, batch in enumerate(found)]
    heapq.heapify(largest)
    while len(found) < count and largest[0][0] < -1:
        _, i = heapq.heappop(largest)
        half = (len(found[i]) + 1) // 2
        found[i], rest = found[i][:half], found[i][half:]
        heapq.heappush(largest, (-len(found[i]), i))
        heapq.heappush(largest, (-len(rest), len(found)))
        found.append(rest)
    return found


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


@dataclass(frozen=True)
class _TrainerCollator(PairCollator):
    """What `trl.DPOTrainer` reads, the answers by themselves, and the rows beside them."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        lengths = batch["row_lengths"].tolist()
        shape = (len(lengths), 1 + max(lengths))
        # A column before the answers, as of a prompt's last token.
        input_ids = torch.full(shape, self.pad_token_id)
        completion_mask = torch.zeros_like(input_ids)
        for s, answer in enumerate(batch["row_labels"].split(lengths)):
            input_ids[s, 1 : 1 + len(answer)] = answer
            completion_mask[s, 1 : 1 + len(answer)] = 1
        return {
            "input_ids": input_ids,
            "completion_mask": completion_mask,
            # For TRL's count of tokens: those that the model runs on.
            "attention_mask": (batch["document_ids"] >= 0).long(),
            PACKED_IDS: batch.pop("input_ids"),
            **batch,
        }


def _check(config: FastDPOConfig, given: Mapping[str, Any]) -> None:
    if config.layout not in LAYOUTS:
        checks.fail("layout", f"one of {list(LAYOUTS)}", repr(config.layout))
    budget = config.max_tokens_per_batch
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            checks.fail("max_tokens_per_batch", "a positive integer or None", repr(budget))
        if isinstance(given.get("train_dataset"), IterableDataset):
            should = "None for a data set that is read in its own order"
            checks.fail("max_tokens_per_batch", should, budget)
        itself = "with max_tokens_per_batch, which orders the pairs itself"
        # The first transformers 5 have group_by_length alone.
        strategy = getattr(config, "train_sampling_strategy", "random")
        if strategy != "random":
            checks.fail("train_sampling_strategy", f"'random' {itself}", repr(strategy))
        if getattr(config, "group_by_length", False):
            checks.fail("group_by_length", f"False {itself}", True)
    if config.reference_cache is not None and not config.precompute_ref_log_probs:
        checks.fail("precompute_ref_log_probs", "True with reference_cache", False)
    if config.layout == "padded":
        cut = config.max_length is not None and config.truncation_mode == "keep_end"
        if config.reference_cache is not None and cut:
            should = "'keep_start' with reference_cache and layout='padded', which TRL cuts"
            checks.fail("truncation_mode", should, "'keep_end'")
        return
    with_layout = f"with layout={config.layout!r}"
    if config.padding_free:
        checks.fail("padding_free", f"False {with_layout}, which has no padding already", True)
    if given.get("data_collator") is not None:
        checks.fail("data_collator", f"None {with_layout}", type(given["data_collator"]).__name__)
    if given.get("compute_metrics") is not None:
        checks.fail("compute_metrics", f"None {with_layout}, which has no logits", "a function")
    if not config.remove_unused_columns:
        checks.fail("remove_unused_columns", f"True {with_layout}", False)


def _check_built(trainer: Any) -> None:
    with_layout = f"with layout={trainer.layout!r}"
    if trainer._is_vision_dataset:
        checks.fail("train_dataset", f"text alone {with_layout}", "images")
    if trainer.aux_loss_enabled:
        should = f"0.0 {with_layout}: transformers counts the experts' tokens by another mask"
        checks.fail("router_aux_loss_coef", should, trainer.router_aux_loss_coef)
    parallel = trainer.accelerator.parallelism_config
    for name in ("cp_size", "sp_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            should = f"1 {with_layout}: its rows hold several sequences and cannot be cut"
            checks.fail(f"parallelism_config.{name}", should, size)
