"""How often the model prefers the better answer, on pairs it was not trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..integrations import hf
from .collate import Batch, Example, collate, labels_of
from .setting import Setting


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1]; a tie counts as a half."""

    preference_accuracy: float  # log-probability per token: chosen above rejected
    reward_accuracy: float  # implicit reward, against the reference: chosen above rejected
    reward_margin: float  # mean implicit reward of chosen minus rejected
    by_flaw: dict[str, float]  # preference_accuracy for each flaw


class Evaluator:
    """Asks a model about held-out examples."""

    def __init__(self, examples: Sequence[Example], setting: Setting):
        self.examples = examples
        self.setting = setting

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Evaluation:
        training = model.training
        model.eval()
        sums, averages, references = [], [], []
        size = self.setting.options.batch_size
        for start in range(0, len(self.examples), size):
            part = self.examples[start : start + size]
            batch = collate(part, self.setting.pad_token_id, self.setting.device)
            logps, lengths = self._sequence_logps(model, batch)
            sums.append(logps.view(2, -1))
            averages.append((logps / lengths).view(2, -1))
            references.append(_reference(batch, len(part)))
        model.train(training)
        chosen, rejected = torch.cat(averages, 1)
        rewards = self.setting.options.beta * (
            torch.cat(sums, 1).cpu() - torch.cat(references, 1).cpu()
        )
        preferred = _wins(chosen, rejected)
        by_flaw = defaultdict(list)
        for example, win in zip(self.examples, preferred.tolist(), strict=True):
            by_flaw[example.flaw].append(win)
        return Evaluation(
            preferred.mean().item(),
            _wins(*rewards).mean().item(),
            (rewards[0] - rewards[1]).mean().item(),
            {flaw: sum(wins) / len(wins) for flaw, wins in by_flaw.items()},
        )

    def _sequence_logps(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with self.setting.autocast():
            logps = hf.sequence_logps(
                model,
                batch["input_ids"],
                labels_of(batch),
                batch["attention_mask"],
                backend=self.setting.options.backend,
            )
        assert isinstance(logps, Tensor)
        return logps, batch["completion_mask"].sum(-1)


def _reference(batch: Batch, pairs: int) -> Tensor:  # [2, B]
    if "ref_chosen_logps" not in batch:
        return torch.zeros(2, pairs)
    return torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])


def _wins(chosen: Tensor, rejected: Tensor) -> Tensor:  # [B], [B] -> [B]
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
