"""The tensors of a scenario. Every provider gets the same ones.

Hidden states are what a final normalisation leaves (variance 1). The weight's rows are random with
logits of standard deviation 2, and three tokens in four point along their label's row, which gives
the softmax of a trained model: about one nat on most labels, a dozen on the others. With
`peaked=False` logits have standard deviation 0.5 and no token points anywhere: a flat softmax.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.scenarios import DTYPES, Scenario

BETA = 0.1
IGNORE_INDEX = -100
_LOGIT_STD = {True: 2.0, False: 0.5}
_LABEL_LOGIT = 14.0  # about logsumexp of 128k logits of standard deviation 2
_POINTING = 0.75  # share of tokens whose hidden state points along the label's row
_REFERENCE_NOISE = 0.02


@dataclass
class Inputs:
    """One batch; `hidden` and `weight` require gradients as the scenario trains them."""

    scenario: Scenario
    hidden: Tensor  # [2B, T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [2B, T], aligned with hidden
    ref_hidden: Tensor  # [2B, T, D]
    ref_weight: Tensor  # [V, D]
    ref_logps: Tensor  # [2B], sums

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]

    @property
    def gradient_bytes(self) -> int:
        return sum(t.nbytes for t in self.trained)

    @property
    def mask(self) -> Tensor:  # [2B, T]
        return self.labels != IGNORE_INDEX

    @functools.cached_property
    def row_index(self) -> Tensor:  # [N]
        """The flattened positions that carry loss, found once: a collator knows them."""
        return self.mask.flatten().nonzero().squeeze(1)


def make_weight(scenario: Scenario, device: torch.device, seed: int = 0) -> Tensor:  # [V, D]
    generator = torch.Generator(device).manual_seed(seed)
    vocab, size = scenario.shape.vocab_size, scenario.shape.hidden_size
    weight = torch.empty(vocab, size, device=device, dtype=DTYPES[scenario.dtype])
    scale = _LOGIT_STD[scenario.peaked] / size**0.5
    for block in weight.split(8192):  # no fp32 copy of the whole weight
        block.copy_(torch.randn(block.shape, device=device, generator=generator) * scale)
    return weight.requires_grad_(scenario.trains == "head")


def make_inputs(
    scenario: Scenario,
    device: torch.device,
    seed: int = 0,
    weight: Tensor | None = None,  # [V, D]
    with_reference: bool = True,
) -> Inputs:
    """A batch; with `weight` it shares the head of another. Without the reference its
    log-probabilities are 0, which is enough where only memory is measured.
    """
    weight = make_weight(scenario, device, seed) if weight is None else weight
    generator = torch.Generator(device).manual_seed(1000 + seed)
    count, length, size = scenario.sequences, scenario.length, scenario.shape.hidden_size
    dtype = DTYPES[scenario.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    labels = torch.randint(
        scenario.shape.vocab_size, (count, length), device=device, generator=generator
    )
    hidden = torch.empty(count, length, size, device=device, dtype=dtype)
    ref_hidden = torch.empty_like(hidden)
    for s in range(count):
        h = random(length, size)
        if scenario.peaked:
            rows = weight.detach()[labels[s]].float()
            along = rows * (_LABEL_LOGIT / rows.square().sum(-1, keepdim=True))
            points = torch.rand(length, 1, device=device, generator=generator) < _POINTING
            h += torch.where(points, along, torch.zeros((), device=device))
        hidden[s] = h
        ref_hidden[s] = h + _REFERENCE_NOISE * random(length, size)
    labels[:, : length - scenario.loss_tokens // count] = IGNORE_INDEX
    inputs = Inputs(
        scenario,
        hidden,
        weight,
        labels,
        ref_hidden,
        weight.detach(),
        hidden.new_zeros(count, dtype=accumulated(dtype)),
    )
    if with_reference:
        inputs.ref_logps = blocked_logps(
            ref_hidden, weight.detach(), labels, scenario.shape.softcap
        ).sum(-1)
    hidden.requires_grad_(scenario.trains != "forward")
    return inputs


@torch.no_grad()
def blocked_logps(
    hidden: Tensor,  # [2B, T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [2B, T]
    softcap: float | None,
    block: int = 512,
) -> Tensor:  # [2B, T] fp32 (fp64 for fp64), 0 where ignored
    """Log-probabilities multiplied in fp32 at least, a block of rows at a time."""
    wide = accumulated(hidden.dtype)
    weight = weight.to(wide)
    logps = torch.zeros(labels.shape, device=hidden.device, dtype=wide)
    index = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    rows, flat = hidden.flatten(0, 1), labels.flatten()
    for part in index.split(block):
        z = capped(rows[part].to(wide) @ weight.t(), softcap)
        own = z.gather(1, flat[part].unsqueeze(1)).squeeze(1)
        logps.view(-1)[part] = own - z.logsumexp(1)
    return logps


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
