"""TRL's DPOTrainer before 1.15, by its seam for Liger-Kernel's fused loss.

With `use_liger_kernel=True` those trainers compute no logits: they call `self.liger_loss` with
hidden states and heads, and log what it returns. `use_fastdpo_loss(trainer)` puts fastdpo there,
with what the trainer's configuration asks for: the seam itself hands over β and the loss's name
alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.results import LinearDPOStats
from ..loss import linear_dpo_loss
from .heads import hidden_scale, read_head
from .hf import sequence_logps
from .order import ordinary_tokens
from .reference import without_dropout

__all__ = ["use_fastdpo_loss"]

_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's other losses have no ε


def use_fastdpo_loss(
    trainer: Any,
    *,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Any:
    """Let a `trl.DPOTrainer` of TRL 1.8 to 1.12 that was built with `use_liger_kernel=True` take
    its loss from fastdpo; call it before `train()`. From TRL 1.15 on there is no such seam:
    `fastdpo.integrations.trl.use_fastdpo` is for those.

        args = DPOConfig(..., use_liger_kernel=True)
        trainer = use_fastdpo_loss(DPOTrainer(model, ref_model, args=args, train_dataset=dataset))
        trainer.train()

    Losses are those that the same trainer computes from logits: label smoothing, `discopop_tau`,
    the length-normalized "ipo", `ld_alpha`, `use_weighting` and what a model's family does to its
    logits (softcap, scale) are taken from trainer and model, though the seam does not hand them
    over. So are the metrics that it logs, but for the two that TRL does not log there (entropy and
    token accuracy).

    Args:
        trainer: a `trl.DPOTrainer`, built and not yet training.
        workspace_bytes, backend: as in `fastdpo.loss.linear_logps`.

    Returns:
        The trainer itself.

    Raises:
        ValueError: trainer has no such seam, shards its head (FSDP, DeepSpeed ZeRO-3), uses an
            f-divergence, or its loss has an option outside its range.
        UnsupportedModel: a ValueError; the head cannot be read, hidden states are changed between
            backbone and head, or logits in a way that nobody has told fastdpo.
    """
    if getattr(trainer, "liger_loss", None) is None or not hasattr(trainer, "loss_types"):
        should = "a trl.DPOTrainer of TRL 1.8 to 1.12 that was built with use_liger_kernel=True"
        checks.fail("trainer", should, type(trainer).__name__)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    zero_3 = plugin is not None and plugin.zero_stage == 3
    if trainer.is_fsdp_enabled or zero_3:
        name = "ZeRO-3" if zero_3 else "FSDP"
        checks.fail("trainer", "without FSDP and ZeRO-3: the seam reads lm_head.weight", name)
    if trainer.f_divergence_type != "reverse_kl":
        should = "reverse_kl: the seam's trainers have others only with logits"
        checks.fail("trainer.f_divergence_type", should, trainer.f_divergence_type)
    checks.workspace_bytes(workspace_bytes)
    trainer.liger_loss = _Loss(
        _objective(trainer),
        _head(trainer),
        {"workspace_bytes": workspace_bytes, "backend": checks.backend(backend)},
    )
    return trainer


def _objective(trainer: Any) -> dict[str, Any]:
    """The trainer's loss as options of `linear_dpo_loss`."""
    ((name, weight),) = zip(trainer.loss_types, trainer.loss_weights, strict=True)
    options: dict[str, Any] = {"objective": {name: weight}, "beta": trainer.beta}
    if name in _SMOOTHED:
        options["label_smoothing"] = trainer.label_smoothing
    if name == "discopop":
        options["discopop_tau"] = trainer.args.discopop_tau
    if name == "ipo":
        options["length_normalized"] = True
    if trainer.ld_alpha is not None:
        options["ld_alpha"] = trainer.ld_alpha
    if trainer.use_weighting:
        options["use_weighting"] = True
    return options


def _head(trainer: Any) -> dict[str, Any]:
    """What both models do to their logits, as options of `linear_dpo_loss`."""
    found = []
    for model in (trainer.model, trainer.ref_model):
        if model is None:
            continue
        _compare_logits(model)
        head = read_head(model)
        rows = model.get_output_embeddings().weight.shape[0]
        if head.vocab_size != rows:
            should = f"without a padded vocabulary: the seam hands over all {rows} rows"
            checks.fail("trainer.model", should, f"{head.vocab_size} entries")
        if hidden_scale(model) != 1.0:
            should = "one whose head multiplies the backbone's hidden states as they are"
            checks.fail("trainer.model", should, type(model).__name__)
        found.append({"logit_scale": head.scale, "softcap": head.softcap})
    if found[0] != found[-1]:
        should = f"one whose logits are those of trainer.model, {found[0]}"
        checks.fail("trainer.ref_model", should, found[-1])
    return found[0]


def _compare_logits(model: Any) -> None:
    """Of a few tokens: the seam itself never asks the model for its logits.

    Raises:
        UnsupportedModel: it does something to them that its family's entry does not say.
    """
    config = model.config
    ids = ordinary_tokens(config.to_dict(), config.get_text_config().vocab_size, 4)
    if not ids:
        return
    tokens = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    with torch.no_grad(), without_dropout(model):
        sequence_logps(model, tokens, tokens)


class _Loss(nn.Module):
    """Called, and answering, as Liger-Kernel's `LigerFusedLinearDPOLoss`."""

    def __init__(self, objective: dict[str, Any], head: dict[str, Any], run: dict[str, Any]):
        super().__init__()
        self.options = {**objective, **head, **run}

    def forward(
        self,
        lin_weight: Tensor,  # [V, D]
        _input: Tensor,  # [2B, T, D]
        target: Tensor,  # [2B, T]
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2B, T, D']
        ref_weight: Tensor | None = None,  # [V, D']
        ref_bias: Tensor | None = None,  # [V]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = linear_dpo_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            ref_hidden=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            stats=("mean_logits",),
            **self.options,
        )
        out = cast(LinearDPOStats, output)
        # As the trainer logs them from logits: over the tokens that carry loss.
        counts = (target != -100).sum(-1)
        means = [_mean(v, n) for v, n in _halves(cast(Tensor, out.tokens.mean_logits), counts)]
        (chosen_logps, chosen_counts), _ = _halves(out.tokens.logps, counts)
        return out.loss, (
            out.chosen_logps.detach(),
            out.rejected_logps.detach(),
            *means,
            -_mean(chosen_logps, chosen_counts),
            out.chosen_rewards,
            out.rejected_rewards,
        )


def _halves(values: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(values.chunk(2), counts.chunk(2), strict=True))


@torch.no_grad()
def _mean(
    values: Tensor,  # [B, T], 0 where there is no loss
    counts: Tensor,  # [B]
) -> Tensor:  # []
    return values.sum() / counts.sum().clamp(min=1)
