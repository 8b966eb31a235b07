"""The two loops: a little pre-training where the model is new, then DPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import PairCollator
from ..data.reference import Run
from ..integrations import hf
from ..integrations.reference import BASE
from ..integrations.tokens import TokenOptions
from ..integrations.unwrap import peft_model
from .collate import Batch, Example, labels_of
from .setting import Setting

STATS = ("entropy", "mean_logits", "is_top1")
_PRETRAINING_LR = 3e-3
_MAX_GRAD_NORM = 1.0
_WARMUP = 0.1


def pretrain(
    model: nn.Module,
    examples: Sequence[Example],
    setting: Setting,
    flawed_per_good: float,
    on_step: Callable[[int, float], None],
) -> None:
    """Next-token prediction on chosen and rejected answers, the prompts included.

    `flawed_per_good` says how many rejected answers the model reads for each chosen one.
    """
    steps = setting.options.pretraining_steps
    trainer = _Optimizer(model, _PRETRAINING_LR, steps)
    model.train()
    for step, batch in enumerate(setting.batches(examples, steps, setting.options.seed + 1)):
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        with setting.autocast():
            logps = hf.sequence_logps(
                model,
                batch["input_ids"],
                labels,
                batch["attention_mask"],
                backend=setting.options.backend,
            )
        assert isinstance(logps, Tensor)
        rejected = flawed_per_good / (1 + flawed_per_good)
        weights = logps.new_tensor([[1 - rejected], [rejected]])
        tokens = (labels[:, 1:] != -100).sum(-1)
        loss = -(weights * logps.view(2, -1)).sum() / (weights * tokens.view(2, -1)).sum()
        trainer.step(loss)
        on_step(step + 1, loss.item())


def ask_reference(
    model: nn.Module,
    examples: Sequence[Example],
    setting: Setting,
    on_batch: Callable[[int], None],
) -> None:
    """Writes the log-probabilities of the model, not yet trained, into the examples."""
    model.eval()
    reference = Run.checked(
        model,
        PairCollator(setting.pad_token_id),
        None if peft_model(model) is None else BASE,
        torch.bfloat16 if setting.options.dtype == "bfloat16" else None,
        TokenOptions(backend=setting.options.backend),
    )
    size = setting.options.batch_size
    order = range(len(examples))
    batches = [order[start : start + size] for start in order[::size]]
    for found in reference.answers([vars(example) for example in examples], batches):
        columns = (found.example, found.ref_chosen_logps, found.ref_rejected_logps)
        for i, chosen, rejected in zip(*columns, strict=True):
            examples[i].ref_chosen_logps = float(chosen)
            examples[i].ref_rejected_logps = float(rejected)
        on_batch(len(found.example))


def train(
    model: nn.Module,
    examples: Sequence[Example],
    setting: Setting,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """DPO, or whichever objective was asked for. `on_step` gets what TRL would log."""
    options = setting.options
    trainer = _Optimizer(model, options.learning_rate, options.steps)
    model.train()
    for step, batch in enumerate(setting.batches(examples, options.steps, options.seed + 2)):
        out = dpo_step(model, batch, setting)
        norm = trainer.step(out.loss)
        metrics = step_metrics(out, batch)
        metrics |= {"grad_norm": norm, "learning_rate": trainer.learning_rate}
        on_step(step + 1, metrics)


def dpo_step(model: nn.Module, batch: Batch, setting: Setting) -> hf.DPOOutput:
    """The forward of one step: the loss, and the statistics that are logged."""
    options = setting.options
    with setting.autocast():
        return hf.dpo_loss(
            model,
            batch,
            beta=options.beta,
            objective=options.objective,
            label_smoothing=options.label_smoothing,
            reference_free=not options.uses_reference,
            stats=STATS,
            backend=options.backend,
        )


def step_metrics(out: hf.DPOOutput, batch: Batch) -> dict[str, float]:
    """TRL's names, averaged as TRL does: rewards over pairs, logits and entropy over tokens."""
    assert out.tokens is not None
    assert out.tokens.mean_logits is not None
    assert out.tokens.entropy is not None
    assert out.tokens.is_top1 is not None
    carries = labels_of(batch)[:, 1:] != -100
    lengths = carries.sum(-1).view(2, -1).sum(-1)  # of all chosen, of all rejected
    logits = out.tokens.mean_logits[:, 1:].sum(-1).view(2, -1).sum(-1) / lengths
    margins = out.chosen_rewards - out.rejected_rewards
    values: dict[str, Tensor] = {
        "loss": out.loss,
        "rewards/chosen": out.chosen_rewards.mean(),
        "rewards/rejected": out.rejected_rewards.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": out.chosen_logps.mean(),
        "logps/rejected": out.rejected_logps.mean(),
        "logits/chosen": logits[0],
        "logits/rejected": logits[1],
        "entropy": out.tokens.entropy.sum() / lengths.sum(),
        "mean_token_accuracy": out.tokens.is_top1.sum() / lengths.sum(),
    }
    return {name: float(value.detach()) for name, value in values.items()}


class _Optimizer:
    """AdamW, clipped, with a linear warmup and a cosine to zero."""

    def __init__(self, model: nn.Module, learning_rate: float, steps: int):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        warmup = max(1, round(_WARMUP * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self.scheduler: Any = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.learning_rate = 0.0

    def step(self, loss: Tensor) -> float:
        """Returns the gradient's norm before clipping."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, _MAX_GRAD_NORM)
        self.learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)
