"""Liger-Kernel's fused DPO loss, by fastdpo: the same arguments, values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objectives
from ..backends.contract import Head, accumulate_dtype
from ..core import checks, rows, sequences, step
from ..core.call import Call, LossCall
from ..distributed.dtensors import Local, Names, any_dtensor
from ..distributed.vocabulary import VocabParallel

__all__ = ["FusedLinearDPOLoss"]

_ARGUMENTS = ("lin_weight", "_input", "target", "bias", "ref_input", "ref_weight", "ref_bias")
_HEADS = (Names("_input", "lin_weight"), Names("ref_input", "ref_weight", "ref_bias"))


class FusedLinearDPOLoss(torch.nn.Module):
    """A drop-in for Liger-Kernel's `LigerFusedLinearDPOLoss`: the same arguments, values and
    gradients.

    Where it differs: label smoothing works with "sigmoid" too (Liger ignores it there), "ipo"
    works, a batch without tokens that carry loss gives the loss of a margin of 0
    (ln 2) and not NaN, and every objective of `fastdpo.objectives` over pairs is accepted.

    Args:
        ignore_index: label of positions that carry no loss.
        beta: positive.
        alpha: weight of the NLL of the chosen answers, where `compute_nll_loss`.
        compute_nll_loss: whether to add it.
        compiled, chunk_size: tune Liger's internals; accepted, and there is nothing here for them
            to tune.
        use_ref_model: whether the reference's hidden states and weight are given to `forward`.
            Where they are not, its log-probabilities are taken as 0, as in Liger.
        average_log_prob: divide each sequence's log-probability by its number of tokens.
        loss_type: the objective's name.
        label_smoothing: for the objectives that define it.
        discopop_tau: the temperature of "discopop"; unused by the others, as in Liger.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self._resolve()

    @property
    def _zero_reference(self) -> bool:
        """Whether, as in Liger, log-probabilities of 0 stand in for a reference that is needed."""
        entry = objectives.OBJECTIVES.get(self.loss_type)
        return not self.use_ref_model and entry is not None and entry.reference == "required"

    def _resolve(self) -> objectives.ResolvedObjective:
        return objectives.resolve(
            self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            has_reference=self.use_ref_model or self._zero_reference,
            options={"discopop_tau": self.discopop_tau} if self.loss_type == "discopop" else {},
        )

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
        """The loss and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean,
        nll_loss, chosen_rewards, rejected_rewards).

        The first half of the batch is chosen, the second rejected; target is aligned with _input.
        The means of the logits are over every position and vocabulary entry, ignored positions
        included, as Liger's. DTensors are understood as in `fastdpo.loss.linear_logps`.

        Raises:
            ValueError: naming the argument.
        """
        given = (lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)
        if not any_dtensor(given):
            return self._forward(*given)
        local = Local.of(dict(zip(_ARGUMENTS, given, strict=True)), _HEADS)
        found = self._forward(*local.tensors.values(), shared=local.vocab_parallel)
        return local.placed(found)

    def _forward(
        self,
        lin_weight: Tensor,  # [V, D]
        _input: Tensor,  # [2B, T, D]
        target: Tensor,  # [2B, T]
        bias: Tensor | None,  # [V]
        ref_input: Tensor | None,  # [2B, T, D']
        ref_weight: Tensor | None,  # [V, D']
        ref_bias: Tensor | None,  # [V]
        *,
        shared: VocabParallel | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            checks.fail("ref_input and ref_weight", "given where use_ref_model", "None")
        resolved = self._resolve()
        if not self.use_ref_model:
            ref_input = ref_weight = ref_bias = None
        head = checks.lm_head(
            _input, lin_weight, bias, logit_scale=1.0, softcap=None, temperature=1.0
        )
        labels = checks.labels(target, checks.batch_shape(_input, None), _input, of="_input")
        ref_head = checks.reference_head(None, ref_input, ref_weight, ref_bias, _input, head)
        checks.sequence_count(labels.shape[0], resolved, _input.device)
        call = Call(compute_dtype=checks.compute_dtype(_input), vocab_parallel=shared)
        found = rows.find(labels, self.ignore_index, call.vocab_size(head))
        reference = step.Reference(hidden=ref_input, head=ref_head)
        if self._zero_reference:
            reference = step.Reference(logps=_input.new_zeros(labels.shape[0]))
        loss_call = LossCall(resolved, self.average_log_prob)
        output, tokens = step.linear_loss(_input, head, found, reference, call, loss_call)
        loss, nll = output.loss, output.loss.new_zeros(())
        if self.compute_nll_loss:
            segments = found.segments(None)
            sums = sequences.sequence_sums(tokens.logps, segments.rows)
            nll = step.chosen_nll(sums, segments, loss_call.pairs)
            loss = loss + self.alpha * nll
        means = [mean_logits(half, head, shared) for half in _input.detach().chunk(2)]
        return loss, (
            output.chosen_logps.detach(),
            output.rejected_logps.detach(),
            *means,
            nll.detach(),
            output.chosen_rewards,
            output.rejected_rewards,
        )


@torch.no_grad()
def mean_logits(
    hidden: Tensor,  # [B, T, D]
    head: Head,
    shared: VocabParallel | None = None,
) -> Tensor:  # []
    """The mean logit over positions and vocabulary, from the means of its two factors."""
    dtype = accumulate_dtype(hidden.dtype)
    mean_hidden = hidden.reshape(-1, hidden.shape[-1]).mean(0, dtype=dtype)
    mean = mean_hidden @ head.weight.detach().mean(0, dtype=dtype)
    if head.bias is not None:
        mean = mean + head.bias.detach().mean(dtype=dtype)
    if shared is None:
        return mean
    return shared.total(mean * (head.vocab_size / shared.vocab_size))
