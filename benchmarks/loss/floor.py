"""The floor: the bare matrix products of a step, over the rows that carry loss.

T1 is one product hidden · weightᵀ [N, V] in the scenario's dtype, by the vendor's library; a step's
floor is its units times T1. What the three products of a step really take is kept beside it.
"""

from __future__ import annotations

import torch

from benchmarks.inputs import Inputs
from benchmarks.measure import Step

_MOST_ROWS = 8192  # of one product: beyond, [N, V] itself would be larger than most memories


def products(inputs: list[Inputs]) -> dict[str, Step]:
    """The bare products by name: "t1", and "grad_hidden", "grad_weight" where the step has them."""
    scenario = inputs[0].scenario
    rows = [i.hidden.detach()[i.mask] for i in inputs]
    weight = inputs[0].weight.detach()
    n = rows[0].shape[0]
    blocks = [slice(s, min(s + _MOST_ROWS, n)) for s in range(0, n, _MOST_ROWS)]
    logits = weight.new_empty(min(n, _MOST_ROWS), weight.shape[0]).normal_()
    grad_weight = torch.empty_like(weight) if inputs[0].weight.requires_grad else None
    grad_rows = torch.empty_like(rows[0]) if scenario.trains != "forward" else None

    def forward(i: int) -> None:
        x = rows[i % len(rows)]
        for b in blocks:
            torch.mm(x[b], weight.t(), out=logits[: b.stop - b.start])

    def hidden(i: int) -> None:
        for b in blocks:
            torch.mm(logits[: b.stop - b.start], weight, out=grad_rows[b])

    def head(i: int) -> None:
        x = rows[i % len(rows)]
        for b in blocks:
            torch.mm(logits[: b.stop - b.start].t(), x[b], out=grad_weight)

    steps: dict[str, Step] = {"t1": forward}
    if grad_rows is not None:
        steps["grad_hidden"] = hidden
    if grad_weight is not None:
        steps["grad_weight"] = head
    return steps
