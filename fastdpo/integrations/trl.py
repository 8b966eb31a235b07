"""TRL's trainers with fastdpo's log-probabilities: the same trainers, losses and metrics.

TRL (1.15 and later) gives a model a forward that returns per-token log-probabilities and statistics
instead of logits when it is called with `fused_lm_head=True` (`add_fused_lm_head`), and its DPO,
KTO, SFT, GRPO, RLOO and AsyncGRPO trainers compute every loss from them.

    patched()           while it lasts, trainers that are built get fastdpo's forward
    patch()             for the rest of the process
    use_fastdpo         for a trainer that is built already
    add_fused_lm_head   what they put in TRL's place, for a model of one's own
    FastDPOTrainer      DPOTrainer on packed rows or with shared prompts, and its FastDPOConfig

All other calls of the models go where they went before.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.autograd import is_traced
from ..core.rows import Rows
from .batches import IGNORE_INDEX, shifted_labels, unshifted_labels
from .forward import AUX_LOSS, answered_inside, examine
from .packing import PackedTokens
from .reference import without_dropout
from .tap import Answers
from .tokens import (
    TokenOptions,
    find_rows,
    logps_of,
    packed_answer,
    packed_inputs,
    rows_with_loss,
    token_answer,
)
from .trl_reference import take_known_references
from .unwrap import UnsupportedModel, causal_lm

__all__ = [
    "FastDPOConfig",  # noqa: F822 (by __getattr__)
    "FastDPOTrainer",  # noqa: F822
    "add_fused_lm_head",
    "patch",
    "patched",
    "use_fastdpo",
]

_NAME = "add_fused_lm_head"
_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def __getattr__(name: str) -> Any:
    """The trainer is a class of TRL's, which is imported with it."""
    if name in ("FastDPOConfig", "FastDPOTrainer"):
        from . import trl_trainer

        return getattr(trl_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def patch(*, workspace_bytes: int | None = None, backend: str | None = None) -> None:
    """From now on every trainer of TRL that is built takes its log-probabilities from fastdpo: the
    policy, the reference, and references that are precomputed.

        fastdpo.integrations.trl.patch()
        trainer = DPOTrainer(model, ref_model, args=args, train_dataset=dataset)

    And with `precompute_ref_log_probs=True` the DPOTrainer takes rows whose reference is known,
    those of `fastdpo.data.load_reference`, which TRL itself would tokenize and compute again.

    Losses, metrics and every option of the trainers stay TRL's own, but for three things that are
    right here: a forward without gradients (the reference, evaluation) has no dropout in attention
    either; padding on the left moves no positions; and under FSDP2 in mixed precision
    log-probabilities and losses are not rounded to 16 bits (accelerate's `output_dtype`, which is
    set to None for models that are prepared from then on).

    Args:
        workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.

    Raises:
        ValueError: naming the argument, or TRL where its trainers have no fused lm_head.
    """
    TokenOptions(workspace_bytes=workspace_bytes, backend=backend)
    ours = functools.partial(add_fused_lm_head, workspace_bytes=workspace_bytes, backend=backend)
    _replace(_theirs(), ours)
    take_known_references()


@contextmanager
def patched(*, workspace_bytes: int | None = None, backend: str | None = None) -> Iterator[None]:
    """`patch`, for the trainers that are built inside a `with`."""
    before, undo = _theirs(), take_known_references()
    try:
        patch(workspace_bytes=workspace_bytes, backend=backend)
        yield
    finally:
        _replace(_theirs(), before)
        undo()


def use_fastdpo(
    trainer: Any,
    *,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Any:
    """Let a trainer of TRL that is built take its log-probabilities from fastdpo, as `patch` does;
    call it before `train()`.

        trainer = use_fastdpo(DPOTrainer(model, ref_model, args=args, train_dataset=dataset))
        trainer.train()

    What `precompute_ref_log_probs` computed while the trainer was built is TRL's; `patched` reaches
    that too.

    Args:
        trainer: a DPO, KTO, SFT, GRPO, RLOO or AsyncGRPO trainer, not yet training.
        workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.

    Returns:
        The trainer itself.

    Raises:
        ValueError: trainer has no model with TRL's fused lm_head, or a reference that is sharded
            already and rounds its outputs (build it under `patched` instead).
        UnsupportedModel: a ValueError; see `fastdpo.integrations.hf.sequence_logps`.
    """
    options = TokenOptions(workspace_bytes=workspace_bytes, backend=backend)
    models = [getattr(trainer, name, None) for name in ("model", "ref_model")]
    found = [(m, _fused_options(causal_lm(m))) for m in models if isinstance(m, nn.Module)]
    if not found or any(theirs is None for _, theirs in found):
        checks.fail(
            "trainer",
            "a trainer of TRL 1.15 or later whose model has a fused lm_head (DPO, KTO, SFT, GRPO, "
            "RLOO, AsyncGRPO)",
            type(trainer).__name__,
        )
    for model, _ in found:
        _refuse_rounding(model)
        examine(model, token_type_ids=())  # the batches may bring token types
    for model, theirs in found:
        assert theirs is not None
        _answer(causal_lm(model), _options(options, **theirs))
    _exact_outputs()
    return trainer


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    *,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> None:
    """TRL's function of that name, with its contract: `model(..., labels=labels,
    fused_lm_head=True)` then returns a `trl.trainer.utils.FusedCausalLMOutput`.

    Args:
        model: a causal language model of transformers, without wrappers.
        temperature: positive; divides the logits.
        cast_lm_head_to_fp32: multiply hidden states and head in fp32, outside autocast.
        outputs: among "log_probs" (always computed), "entropy" (differentiable),
            "log_sum_sq_probs", "mean_logits" and "is_top1"; the others are None.
        workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.

    The forward takes `labels` [S, T] (shifted inside; the outputs are [S, T − 1]) or `shift_labels`
    [S, T] (taken as they are; the outputs are [S, T]), and `num_items_in_batch`, by which the loss
    −Σ log p is divided in place of the number of labels.

    Raises:
        ValueError: naming the argument.
        UnsupportedModel: a ValueError; see `fastdpo.integrations.hf.sequence_logps`.
    """
    options = _options(
        TokenOptions(workspace_bytes=workspace_bytes, backend=backend),
        temperature=temperature,
        cast_lm_head_to_fp32=cast_lm_head_to_fp32,
        outputs=outputs,
    )
    _exact_outputs()
    _answer(causal_lm(model), options)


def _options(
    base: TokenOptions, *, temperature: float, cast_lm_head_to_fp32: bool, outputs: Sequence[str]
) -> TokenOptions:
    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown:
        checks.fail("outputs", f"names among {list(_OUTPUTS)}", repr(unknown))
    stats = tuple(name for name in outputs if name != "log_probs")
    return TokenOptions(
        stats, temperature, base.workspace_bytes, base.backend, fp32_head=cast_lm_head_to_fp32
    )


# ---- Where TRL has the function


def _theirs() -> Callable[..., None]:
    import trl.trainer.utils as utils

    function = getattr(utils, _NAME, None)
    if function is None:
        import trl

        checks.fail("trl", f"a version with {_NAME}, 1.15 or later", trl.__version__)
    return function


def _replace(old: Callable[..., None], new: Callable[..., None]) -> None:
    """In every module that holds it; those that are imported later import the new one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl.") and vars(module).get(_NAME) is old:
            setattr(module, _NAME, new)


def _fused_options(lm: Any) -> dict[str, Any] | None:
    """What TRL's function, or ours, was given for this model; None where it has no fused head."""
    function = _function(lm.forward)
    while function is not None:
        if inspect.isfunction(function) and "fused_lm_head" in function.__code__.co_varnames:
            known = inspect.getclosurevars(function).nonlocals
            names = ("temperature", "cast_lm_head_to_fp32", "outputs")
            if all(name in known for name in names):
                return {name: known[name] for name in names}
            ours = known.get("options")
            if isinstance(ours, TokenOptions):
                return dict(zip(names, (ours.temperature, ours.fp32_head, ours.stats), strict=True))
        function = getattr(function, "__wrapped__", None)  # accelerate's autocast, say
    return None


# ---- What accelerate's FSDP2 rounds


def _exact_outputs() -> None:
    """In mixed precision accelerate has FSDP2 round what leaves a model, the loss included."""
    from accelerate.state import AcceleratorState

    plugin: Any = AcceleratorState._shared_state.get("fsdp_plugin")
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) in (torch.bfloat16, torch.float16):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def _refuse_rounding(model: nn.Module) -> None:
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            dtype = module._get_fsdp_state()._mp_policy.output_dtype  # type: ignore[operator]
            if dtype in (torch.bfloat16, torch.float16):
                checks.fail(
                    "trainer",
                    "built under fastdpo.integrations.trl.patched(), where FSDP2 has sharded its "
                    "reference: it would round log-probabilities",
                    f"outputs in {dtype}",
                )


# ---- The forward


class _LastRows:
    """The rows that carry loss, of the labels last seen.

    A trainer hands one tensor of labels to the policy and then to the reference: finding its rows
    once saves the second wait for a GPU.
    """

    def __init__(self) -> None:
        self._labels: Callable[[], Tensor | None] = lambda: None
        self._seen: tuple[int, bool] | None = None
        self._rows: Rows | None = None

    def find(
        self,
        model: nn.Module,
        labels: Tensor,  # [S, T]
        shifted: Tensor,  # [S, T] the same, shifted
    ) -> Rows:
        if is_traced(labels) or labels.is_inference():
            return find_rows(model, shifted)
        seen = labels._version, shifted is labels  # they may come as shift_labels, and as labels
        if self._rows is None or self._labels() is not labels or self._seen != seen:
            self._rows = find_rows(model, shifted)  # first, as it may raise
            self._labels, self._seen = weakref.ref(labels, self._forget), seen
        return self._rows

    def _forget(self, _: object) -> None:
        if self._labels() is None:
            self._rows = None


_LAST_ROWS = _LastRows()


def _answer(lm: nn.Module, options: TokenOptions) -> None:
    """Give `lm` a forward that answers `fused_lm_head=True` by fastdpo.

    It holds no model: a copy of the model (`copy.deepcopy` binds the method to it) answers for
    itself.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    signature = _signature(lm.forward)
    previous = _unbound_forward(lm)
    own_names = ("labels", "shift_labels", "num_items_in_batch")

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return previous(self, *args, **kwargs)
        given = dict(zip(list(signature.parameters)[1:], args, strict=False))
        kwargs = {**given, **kwargs}
        labels, shift_labels, num_items = (kwargs.pop(name, None) for name in own_names)
        if (labels is None) == (shift_labels is None):
            raise ValueError(
                "labels should be given with fused_lm_head=True, or shift_labels, got "
                f"{'neither' if labels is None else 'both'}"
            )
        # TRL's columns are the positions that predict: all but the last, where it shifts.
        shifted, columns = shift_labels, None
        if labels is not None:
            shifted, columns = shifted_labels(labels), max(0, labels.shape[1] - 1)
        assert shifted is not None
        found = _LAST_ROWS.find(self, shift_labels if labels is None else labels, shifted)
        config = self.config.get_text_config()
        packed = PackedTokens.beside(kwargs)
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        kwargs["use_cache"] = False
        own = functools.partial(previous, self)
        answer = token_answer(shifted, found, options, columns)
        # The trainer's reference, and its evaluation: TRL sets the probability of Dropout modules
        # to 0, not that of attention.
        with nullcontext() if torch.is_grad_enabled() else without_dropout(self):
            asked = {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
            if packed is not None:
                answers = _packed(self, packed, options, own, kwargs)
            else:
                known = unshifted_labels(shifted) if labels is None else labels
                examine(self, shifted.device, labels=known, forward=own, **asked)
                answers = answered_inside(self, shifted, answer=answer, forward=own, **kwargs)
        tokens = logps_of(answers)._asdict()
        if packed is not None:  # to where the labels are
            there = found.to(tokens["logps"].device)
            back = {k: v for k, v in tokens.items() if v is not None}
            tokens |= {k: there.at_labels(v)[:, :columns] for k, v in back.items()}
        logps, aux_loss = tokens.pop("logps"), answers.get(AUX_LOSS)
        mask = shifted[:, :columns].to(logps.device) != IGNORE_INDEX
        loss = -logps.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        if aux_loss is not None:
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
        return FusedCausalLMOutput(
            loss=loss, log_probs=logps, label_mask=mask, aux_loss=aux_loss, **tokens
        )

    # Trainers and generation look at the forward's signature.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    lm.forward = types.MethodType(forward, lm)


def _packed(
    lm: nn.Module,
    packed: PackedTokens,
    options: TokenOptions,
    own: Callable[..., Any],
    kwargs: dict[str, Any],
) -> Answers:
    """Of rows that hold several sequences, in place of the padded ones [N each]."""
    found = rows_with_loss(lm, packed)
    answer = packed_answer(packed, found, options)
    given = {**kwargs, "input_ids": packed.input_ids, "attention_mask": None}
    given |= packed_inputs(lm, packed, own)
    return answered_inside(
        lm, packed.input_ids, answer=answer, forward=own, in_order=False, **given
    )


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


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    bound = inspect.signature(function)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return bound.replace(parameters=[first, *bound.parameters.values()])
