"""TRL's DPOTrainer with fastdpo's log-probabilities: the same trainer, losses and metrics.

TRL (1.16 and later) gives the model a forward that returns per-token log-probabilities and
statistics instead of logits when it is called with `fused_lm_head=True`, and computes every loss
from them. `use_fastdpo(trainer)` answers those calls; all others go where they went before.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.autograd import is_traced
from ..core.rows import Rows
from .batches import IGNORE_INDEX, shifted_labels
from .forward import AUX_LOSS, answered_inside, examine
from .reference import without_dropout
from .tokens import TokenOptions, find_rows, logps_of, token_answer
from .unwrap import UnsupportedModel, causal_lm, peft_model

__all__ = ["use_fastdpo"]


def use_fastdpo(
    trainer: Any,
    *,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Any:
    """Let a `trl.DPOTrainer` take its log-probabilities from fastdpo; call it before `train()`.

        trainer = use_fastdpo(DPOTrainer(model, ref_model, args=args, train_dataset=dataset))
        trainer.train()

    Policy, reference and adapters, precomputed references, every `loss_type` and every metric of
    the trainer stay TRL's own, but for two things that are right here: a forward without gradients
    (the reference, evaluation) has no dropout in attention either, and padding on the left moves no
    positions. (What `precompute_ref_log_probs` computed while the trainer was built is TRL's.)
    Calls without `fused_lm_head=True` (generation among them) reach the forward that the model had.

    Args:
        trainer: a `trl.DPOTrainer`, built and not yet training.
        workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.

    Returns:
        The trainer itself.

    Raises:
        ValueError: trainer is no DPOTrainer of a TRL that fuses the lm_head, or uses what this
            adapter does not support: prompt-learning adapters, FSDP, DeepSpeed ZeRO-3.
        UnsupportedModel: a ValueError; see `fastdpo.integrations.hf.sequence_logps`.
    """
    import trl

    add = getattr(trl.trainer.utils, "add_fused_lm_head", None)
    if not isinstance(trainer, trl.DPOTrainer) or add is None:
        checks.fail("trainer", "a trl.DPOTrainer of TRL 1.16 or later", type(trainer).__name__)
    _refuse_sharded(trainer)
    policy = cast(nn.Module, trainer.model)
    peft = peft_model(policy)
    if peft is not None and any(config.is_prompt_learning for config in peft.peft_config.values()):
        checks.fail("trainer.model", "without a prompt-learning adapter", type(peft).__name__)
    options = TokenOptions((), 1.0, workspace_bytes, backend)
    policy_stats: tuple[str, ...] = ("entropy", "mean_logits", "is_top1")
    if trainer.use_weighting:
        policy_stats += ("log_sum_sq_probs",)
    rows = _LastRows()
    reference = cast("nn.Module | None", trainer.ref_model)
    for model in (policy, reference):
        if model is not None:  # the batches may bring token types, and are then looked at
            examine(model, token_type_ids=())
    _answer(causal_lm(policy), rows, options.with_stats(*policy_stats))
    if reference is not None:
        _answer(causal_lm(reference), rows, options)
    return trainer


def _refuse_sharded(trainer: Any) -> None:
    if trainer.is_fsdp_enabled:
        checks.fail("trainer", "without FSDP: its lm_head is sharded", "FSDP")
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        checks.fail("trainer", "without DeepSpeed ZeRO-3: its lm_head is sharded", "ZeRO-3")


class _LastRows:
    """The rows that carry loss, of the labels last seen.

    A trainer hands one tensor of labels to the policy and then to the reference: finding its rows
    once saves the second wait for a GPU.
    """

    def __init__(self) -> None:
        self._labels: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._rows: Rows | None = None

    def find(
        self,
        model: nn.Module,
        labels: Tensor,  # [S, T]
        shifted: Tensor,  # [S, T] the same, shifted
    ) -> Rows:
        if is_traced(labels) or labels.is_inference():
            return find_rows(model, shifted)
        if self._rows is None or self._labels() is not labels or self._version != labels._version:
            self._rows = find_rows(model, shifted)  # first, as it may raise
            self._labels, self._version = weakref.ref(labels), labels._version
        return self._rows


def _answer(lm: nn.Module, rows: _LastRows, options: TokenOptions) -> None:
    """Give `lm` a forward that answers `fused_lm_head=True` by fastdpo.

    It holds no model: a copy of the model (`copy.deepcopy` binds the method to it) answers for
    itself.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    signature = _signature(lm.forward)
    previous = _unbound_forward(lm)

    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return previous(self, *args, **kwargs)
        labels: Tensor = kwargs.pop("labels")  # [S, T]
        own = functools.partial(previous, self)
        # The trainer's reference, and its evaluation: TRL sets the probability of Dropout modules
        # to 0, not that of attention.
        quiet = nullcontext() if torch.is_grad_enabled() else without_dropout(self)
        shifted = shifted_labels(labels)
        found = rows.find(self, labels, shifted)
        with quiet:
            examine(self, labels.device, labels=labels, forward=own, **kwargs)
            answer = token_answer(shifted, found, options)
            answers, outputs = answered_inside(self, *args, answer=answer, forward=own, **kwargs)
        tokens = logps_of(answers)
        # TRL's columns are the positions that predict: all but the last.
        columns = {k: None if v is None else v[:, :-1] for k, v in tokens._asdict().items()}
        logps = cast(Tensor, columns.pop("logps"))
        mask = shifted[:, :-1] != IGNORE_INDEX
        return FusedCausalLMOutput(
            loss=-logps.sum() / mask.sum().clamp(min=1),
            log_probs=logps,
            label_mask=mask,
            aux_loss=answers.get(AUX_LOSS),
            **columns,
        )

    # Trainers and generation look at the forward's signature.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    lm.forward = types.MethodType(forward, lm)


def _unbound_forward(lm: nn.Module) -> Callable[..., Any]:
    """The forward that `lm` has without TRL's fused head, as a function of the model it is called
    on.

    TRL's own replacement keeps the model that it was made for, which is another one after a copy.
    """
    bound: Callable[..., Any] = lm.forward
    inner = inspect.getclosurevars(_function(bound)).nonlocals.get("original_forward")
    if inner is not None and "fused_lm_head" in _function(bound).__code__.co_varnames:
        bound = inner
    if getattr(bound, "__self__", None) is lm:
        return _function(bound)
    owner = weakref.ref(lm)

    def of_the_owner(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not owner():
            raise UnsupportedModel(
                f"model: a copy of a {type(self).__name__} whose forward had been replaced before "
                "use_fastdpo, by something that belongs to the original; copy the model first"
            )
        return bound(*args, **kwargs)

    return of_the_owner


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def _signature(function: Callable[..., Any]) -> Any:
    bound = inspect.signature(function)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return bound.replace(parameters=[first, *bound.parameters.values()])
