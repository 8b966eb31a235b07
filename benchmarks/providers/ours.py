"""fastdpo itself: `fastdpo.loss.linear_dpo_loss` with what a user can choose."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdpo
from benchmarks.accuracy.oracle import Expected
from benchmarks.inputs import BETA, IGNORE_INDEX, Inputs
from benchmarks.providers.base import Provider
from fastdpo.backends import select
from fastdpo.loss import linear_dpo_loss, linear_logps

EVERYTHING = 1 << 50  # a workspace that holds E of any batch


class FastDPO(Provider):
    """One backend and one workspace; None leaves the choice to fastdpo."""

    def __init__(
        self,
        name: str,
        summary: str,
        backend: str | None,
        workspace: int | None,
        rows_known: bool = False,
    ):
        self.name, self.summary = name, f"fastdpo {fastdpo.__version__}: {summary}"
        self.backend, self.workspace = backend, workspace
        self.rows_known = rows_known  # nothing then waits for a GPU

    def absent(self, device: torch.device) -> str | None:
        if self.backend is None:
            return None
        if self.backend != "torch" and device.type != "cuda":
            return "its kernels need a GPU (an interpreter would be no timing)"
        if device.type != "cuda":
            return "on a CPU it is what fastdpo chooses by itself"
        like = torch.empty(0, device=device, dtype=torch.bfloat16)
        try:
            select.primitive("exp_logits", like, self.backend)
        except select.BackendUnavailable as error:
            return str(error)
        return None

    def forward(self, inputs: Inputs) -> Expected:
        if inputs.scenario.reference == "forward":
            reference = {"ref_hidden": inputs.ref_hidden, "ref_weight": inputs.ref_weight}
        else:
            reference = {"ref_logps": inputs.ref_logps}
        out = linear_dpo_loss(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            **reference,
            beta=BETA,
            softcap=inputs.scenario.shape.softcap,
            ignore_index=IGNORE_INDEX,
            workspace_bytes=self.workspace,
            backend=self.backend,
            row_index=inputs.row_index if self.rows_known else None,
        )
        return Expected(out.loss, torch.cat([out.chosen_logps, out.rejected_logps]).detach())

    @torch.no_grad()
    def token_logps(self, inputs: Inputs) -> Tensor:  # [2B, T]
        """What the loss sums over each sequence, 0 where ignored."""
        return linear_logps(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            softcap=inputs.scenario.shape.softcap,
            ignore_index=IGNORE_INDEX,
            workspace_bytes=self.workspace,
            backend=self.backend,
            row_index=inputs.row_index if self.rows_known else None,
        )
