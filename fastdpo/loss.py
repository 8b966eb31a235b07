"""What users import: DPO and its relatives from hidden states, without the logits.

    linear_logps         hidden states and an lm_head to per-token log-probabilities
    linear_dpo_loss      ... to the preference loss of a batch of pairs
    logits_dpo_loss      materialized logits to the same loss
    get_batch_logps      materialized logits to sequence log-probabilities
    preference_loss      sequence log-probabilities to losses and rewards
    FusedLinearDPOLoss   a drop-in for Liger-Kernel's LigerFusedLinearDPOLoss

The fourth and fifth keep the names and the semantics of the original DPO repository.

Everything is checked here, before anything is computed: bad input gets a ValueError that names the
argument. What the functions compute, and why it is fast, is in `fastdpo.core.linear`; the list of
objectives is `fastdpo.objectives.OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import objectives
from .backends.contract import LogitMap
from .core import checks, rows, sequences, sharded, step
from .core.call import Call, LossCall
from .core.logits import checked_labels, logits_logps
from .core.results import LinearDPOOutput, LinearDPOStats, LinearLogps
from .distributed.data import DataParallel
from .distributed.dtensors import takes_dtensors
from .distributed.sequence import SequenceParallel
from .distributed.sharded import ShardedHead
from .distributed.vocabulary import VocabParallel
from .integrations.liger import FusedLinearDPOLoss
from .objectives import OBJECTIVES, Pairs
from .objectives.precision import narrowed

__all__ = [
    "FusedLinearDPOLoss",
    "LinearDPOOutput",
    "LinearDPOStats",
    "LinearLogps",
    "get_batch_logps",
    "linear_dpo_loss",
    "linear_logps",
    "logits_dpo_loss",
    "preference_loss",
]


@takes_dtensors
def linear_logps(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
    workspace_bytes: int | None = None,
    backend: str | None = None,
    row_index: Tensor | rows.Rows | None = None,  # [N]
    vocab_parallel: VocabParallel | None = None,
    sharded_head: ShardedHead | None = None,
) -> Tensor | LinearLogps:
    """Per-token log-probabilities of `labels` under an lm_head, without materializing the logits.

    The logits are `softcap(logit_scale · (hidden · weightᵀ + bias)) / temperature` with
    `softcap(x) = cap · tanh(x / cap)`, and the result is `logits[label] − logsumexp(logits)`.

    Args:
        hidden: [..., D] last hidden states; fp32, bf16, fp16 or fp64, any strides. Positions that
            carry no loss are left out before any product, and get a zero gradient.
        weight: [V, D] the lm_head's weight, in hidden's dtype (any dtype under `torch.autocast`,
            which chooses the dtype of the product as it does for `torch.nn.functional.linear`;
            gradients come back in the inputs' own).
        labels: [...] integers, already aligned with hidden: the label of a position is the token to
            predict there.
        bias: [V], optional, as weight.
        logit_scale: multiplies the logits before the softcap (Cohere's `logit_scale`, 1 / Granite's
            `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`, positive, or None.
        temperature: positive; divides the logits last.
        ignore_index: the label of positions that carry no loss.
        stats: any of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; the result is then a
            `LinearLogps`. Statistics come from the same pass. The entropy is differentiable (for an
            entropy bonus), which costs nothing until it enters a loss; then no further product
            with a trained head, two with a frozen one, and one with a softcap. The others carry no
            gradient. `is_top1` is what `logits.argmax(-1) == labels`
            means: of several largest logits the first one counts, and entries of the vocabulary
            with equal rows and biases have equal logits, to the bit.
        workspace_bytes: memory that may be kept between forward and backward when the head is
            trained, beyond gradients.
            None: 2 GiB on a GPU, on a CPU 128 MiB (512 MiB for 16-bit inputs, which cost more to
            compute again); 256 and 32 MiB where that would hold less than a quarter of what could
            be kept. More of it means less recomputation (3 instead of 4 products).
        backend: "torch", "triton", "cuda", "auto", or None for the environment variable
            FASTDPO_BACKEND, else "auto".
        row_index: [N] int64, the flattened positions that carry loss, ascending, where the caller
            knows them (a collator on the CPU does). Nothing then waits for the GPU; all other
            positions are taken as ignored. Without it, labels on a GPU cost exactly one
            synchronisation, which also checks that they are in range.
        vocab_parallel: under tensor parallelism, how the lm_head is spread over the processes:
            `weight` and `bias` are then this process's rows of it, hidden and labels the same on
            all of them, and so are the results and hidden's gradient. All of them call.
        sharded_head: under data parallelism, an lm_head whose rows stay spread over the processes:
            `weight` and `bias` are this process's rows of it, or the DTensor that fully_shard made;
            hidden, labels and results are each process's own, and rows that carry loss travel. All
            of the processes call, and go backward. The gradient of weight and bias is the mean over
            the processes, reduced already; it costs one wait for a GPU, and torch.compile breaks
            its graph there.

    DTensors on one mesh of one dimension say it themselves: hidden Replicate, weight and bias
    Shard(0) (or Replicate), everything else plain or Replicate. The results are then DTensors too,
    Replicate, and gradients are placed as their tensors are; torch.compile breaks its graph there.

    Returns:
        Log-probabilities shaped like labels, in fp32 (fp64 for fp64 inputs), exactly 0 at ignored
        positions; with `stats` a `LinearLogps` whose first field they are. Differentiable once in
        hidden, weight and bias.

    Raises:
        ValueError: naming the argument, for shapes, dtypes or devices that do not fit, a label
            outside [0, V) that is not `ignore_index`, an option outside its range, or DTensors
            placed in another way (plain hidden states with a weight that is a DTensor among them).
        fastdpo.backends.select.BackendUnavailable: the backend asked for cannot run here.
    """
    head = checks.lm_head(
        hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature
    )
    labels = checks.labels(labels, hidden.shape[:-1], hidden)
    call = Call(
        checks.stats(stats),
        checks.workspace_bytes(workspace_bytes),
        checks.backend(backend),
        checks.compute_dtype(hidden),
        checks.vocab_parallel(vocab_parallel, head),
        checks.sharded_head(sharded_head, head, vocab_parallel),
    )
    found = rows.find(labels, ignore_index, call.vocab_size(head), row_index)
    found = sharded.exchanged(found, call)
    tokens = step.at_labels(step.token_logps(hidden, head, found, call), found)
    return tokens if call.stats else tokens.logps


@takes_dtensors
def linear_dpo_loss(
    hidden: Tensor,  # [2B, T, D] or [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [2B, T] or [N]
    *,
    bias: Tensor | None = None,  # [V]
    ref_logps: Tensor | None = None,  # [2B] or like labels
    ref_hidden: Tensor | None = None,  # [2B, T, D'] or [N, D']
    ref_weight: Tensor | None = None,  # [V, D']
    ref_bias: Tensor | None = None,  # [V]
    beta: float = 0.1,
    objective: str | Sequence[str] | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    pairs: str = "concatenated",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,  # [2B + 1]
    row_index: Tensor | rows.Rows | None = None,  # [N]
    stats: Sequence[str] = (),
    vocab_parallel: VocabParallel | None = None,
    sharded_head: ShardedHead | None = None,
    sequence_parallel: SequenceParallel | None = None,
    data_parallel: DataParallel | None = None,
    num_pairs: float | Tensor | None = None,  # []
    num_tokens: float | Tensor | None = None,  # []
    **objective_options: object,
) -> LinearDPOOutput | LinearDPOStats:
    """The preference loss of a batch of pairs, from the policy's hidden states (Rafailov et al.,
    arXiv 2305.18290).

        loss = mean over pairs of −log σ(β · (h(chosen) − h(rejected)))   h = Σ_t log π − log π_ref

    for the default objective; see `fastdpo.objectives.OBJECTIVES` for the others.

    Args:
        hidden: [2B, T, D] the policy's last hidden states; or packed, [N, D] with `cu_seqlens`.
        weight, bias, logit_scale, softcap, temperature: the head, as in `linear_logps`.
        vocab_parallel, sharded_head: how it is spread, as in `linear_logps`. Scale, softcap,
            temperature and the spread over processes are the reference head's too.
        ignore_index, workspace_bytes, backend, row_index: as in `linear_logps`.
        labels: [2B, T] (packed: [N]), aligned with hidden: the label of a position is the token to
            predict there.
        ref_logps: the reference's log-probabilities: [2B] per sequence, as they enter the loss
            (averages where `average_log_prob`, weighted where `ld_alpha`), or per token, shaped
            like labels ([2B] packed labels: per sequence).
        ref_hidden, ref_weight, ref_bias: the reference as its hidden states and head instead (no
            gradient is computed; its hidden size may differ). ref_weight None means the policy's
            weight and bias, as for adapters that leave the head. With neither, the loss is
            reference-free.
        beta: the strength of the pull towards the reference, positive.
        objective: a name in OBJECTIVES, or several: a sequence with the option `loss_weights`, or
            {name: weight} (MPO).
        label_smoothing: the probability that a label is flipped, for the objectives that define it.
        average_log_prob: divide each sequence's log-probability by its number of tokens that carry
            loss.
        pairs: "concatenated" (first half chosen, second half rejected) or "interleaved" (even rows
            chosen).
        cu_seqlens: [2B + 1] int32 or int64, where each packed sequence starts and ends
            (flash-attention's).
        stats: what `linear_logps` can tell about the tokens on the way, for logging: comes back in
            `tokens`, beside their log-probabilities.
        sequence_parallel: under sequence or context parallelism, the processes that hold tokens of
            the same sequences: hidden, labels and what is per token are then this process's part
            of them. All processes get the same loss, each the gradient of its own tokens (the
            weights' gradients are to be added up over them, not averaged).
        data_parallel: the processes that have other pairs of the same batch, and whose gradients
            are averaged (by DDP, FSDP, ZeRO). The loss is then P · Σ / n with P their number, Σ the
            sum over this call's pairs and n the number of pairs of all of them (for NLL terms, sums
            over and numbers of tokens): its mean over the processes is the loss of the whole
            batch, and so are averaged gradients, whatever each process has. n is counted over the
            group, in this call, unless given; every process calls.
        num_pairs: the number of pairs (prompts of rankings, single sequences) of the global batch,
            over all processes and over the micro-batches whose gradients are accumulated; a number,
            or a tensor [] on any device. The loss is Σ / num_pairs, times P with data_parallel:
            micro-batches' losses add up to that of the global batch, and are not to be averaged.
        num_tokens: with num_pairs, the number of the chosen answers' tokens that carry loss, in the
            same batch: what NLL terms (sft, sft_weight, cpo, orpo) are divided by; others do not
            read it. `fastdpo.parallel.batch_counts` counts both.
        **objective_options: the options of the objective, among them `f_divergence`, `sft_weight`,
            `ld_alpha`, `use_weighting`; see its entry.

    DTensors are understood as in `linear_logps`.

    Returns:
        LinearDPOOutput (LinearDPOStats with `stats`): the scalar loss, the sequences'
        log-probabilities and implicit rewards r = β · (log π − log π_ref), in fp32 (fp64 for fp64
        inputs). An empty batch, or one that is ignored throughout, gives a finite loss with zero
        gradients.

    Raises:
        ValueError: naming the argument, before anything is computed.
        fastdpo.backends.select.BackendUnavailable: the backend asked for cannot run here.
    """
    head = checks.lm_head(
        hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature
    )
    checks.flag("average_log_prob", average_log_prob)
    pairs = checks.pairs(pairs)
    labels = checks.labels(labels, checks.batch_shape(hidden, cu_seqlens), hidden)
    ref_head = checks.reference_head(ref_logps, ref_hidden, ref_weight, ref_bias, hidden, head)
    resolved = objectives.resolve(
        objective,
        beta=beta,
        label_smoothing=label_smoothing,
        has_reference=ref_logps is not None or ref_head is not None,
        options=objective_options,
    )
    count = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    checks.sequence_count(count, resolved, hidden.device, cu_seqlens)
    per_token = checks.reference_logps(ref_logps, labels, count)
    call = Call(
        checks.stats(stats),
        checks.workspace_bytes(workspace_bytes),
        checks.backend(backend),
        checks.compute_dtype(hidden),
        checks.vocab_parallel(vocab_parallel, head),
        checks.sharded_head(sharded_head, head, vocab_parallel),
    )
    loss = LossCall(
        resolved,
        average_log_prob,
        pairs,
        cu_seqlens,
        checks.sequence_parallel(sequence_parallel, resolved),
        checks.normalization(
            num_pairs, num_tokens, data_parallel, resolved, count // resolved.num_candidates
        ),
    )
    found = rows.find(labels, ignore_index, call.vocab_size(head), row_index)
    found = sharded.exchanged(found, call)
    reference = step.Reference(ref_logps, per_token, ref_hidden, ref_head)
    output, tokens = step.linear_loss(hidden, head, found, reference, call, loss)
    if not call.stats:
        return output
    return LinearDPOStats(*output, step.at_labels(tokens, found, detach=True))


def logits_dpo_loss(
    logits: Tensor,  # [2B, T, V] or [N, V]
    labels: Tensor,  # [2B, T] or [N]
    *,
    ref_logps: Tensor | None = None,  # [2B] or like labels
    beta: float = 0.1,
    objective: str | Sequence[str] | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    pairs: str = "concatenated",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,  # [2B + 1]
    inplace_backward: bool = False,
    **objective_options: object,
) -> LinearDPOOutput:
    """`linear_dpo_loss` for code that has the policy's logits already.

    They are read once in the forward and once in the backward. On the CUDA C++ backend the
    default objective is one launch sequence from the logits to the loss and its coefficients.

    Args:
        logits: [2B, T, V] in fp32, bf16, fp16 or fp64; or packed, [N, V] with `cu_seqlens`. Rows
            any stride apart are read where they lie; where [2B, T] cannot be viewed as one
            dimension (`logits[:, :-1]`) they are copied first: ignore the last label instead.
        labels: [2B, T] (packed: [N]), aligned with logits: the label of a position is the token to
            predict there.
        ref_logps: the reference's log-probabilities: [2B] per sequence, as they enter the loss
            (averages where `average_log_prob`, weighted where `ld_alpha`), or per token, shaped
            like labels. None: the loss is reference-free.
        beta, objective, label_smoothing, average_log_prob, pairs: as in `linear_dpo_loss`.
        ignore_index, backend, cu_seqlens: as in `linear_dpo_loss`.
        **objective_options: as in `linear_dpo_loss`; `use_weighting` needs hidden states.
        logit_scale, softcap, temperature: what is still to be done to the logits, as in
            `linear_logps`.
        inplace_backward: let the backward write the logits' gradient over the logits, which saves
            memory of their size. For logits that nothing reads after the loss: whoever else holds
            them (a detached copy that shares their memory, numpy) finds the gradient there. A
            backward that retains the graph, and a compiled one (whose memory torch.compile plans),
            still write elsewhere.

    Returns:
        LinearDPOOutput, as `linear_dpo_loss`.

    Raises:
        ValueError: naming the argument, before anything is computed.
        fastdpo.backends.select.BackendUnavailable: the backend asked for cannot run here.
    """
    logit_map = checks.materialized(logits, cu_seqlens, logit_scale, softcap, temperature)
    checks.flag("average_log_prob", average_log_prob)
    pairs = checks.pairs(pairs)
    labels = checks.labels(labels, logits.shape[:-1], logits, of="logits")
    resolved = objectives.resolve(
        objective,
        beta=beta,
        label_smoothing=label_smoothing,
        has_reference=ref_logps is not None,
        options=objective_options,
    )
    if resolved.wpo:
        checks.fail("use_weighting", "off: logits_dpo_loss has no Σp² of its tokens", "it")
    count = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    checks.sequence_count(count, resolved, logits.device, cu_seqlens)
    per_token = checks.reference_logps(ref_logps, labels, count)
    checks.inplace_backward(inplace_backward, logits)
    return step.logits_loss(
        logits,
        checked_labels(labels, checks.ignored(ignore_index), logits.shape[-1]),
        logit_map,
        step.Reference(ref_logps, per_token),
        LossCall(resolved, average_log_prob, pairs, cu_seqlens),
        checks.backend(backend),
        inplace_backward,
    )


def get_batch_logps(
    logits: Tensor,  # [S, T, V]
    labels: Tensor,  # [S, T]
    average_log_prob: bool = False,
    *,
    inplace_backward: bool = False,
) -> Tensor:  # [S]
    """Sequence log-probabilities from materialized logits, as the original DPO repository's
    `_get_batch_logps`.

    Labels are shifted here: the logits of position t predict the label of position t + 1. The
    logits are read once in the forward and once in the backward.

    Args:
        logits: [S, T, V] in fp32, bf16, fp16 or fp64.
        labels: [S, T] integers; −100 carries no loss. They are not modified.
        average_log_prob: the mean over the tokens that carry loss instead of the sum.
        inplace_backward: as in `logits_dpo_loss`.

    Returns:
        [S] in fp32 (fp64 for fp64 logits); 0 for a sequence without tokens that carry loss, where
        the original's average would be NaN.

    Raises:
        ValueError: naming the argument, for shapes that do not fit or a label outside [0, V) that
            is not −100.
    """
    checks.floating("logits", logits)
    if logits.dim() != 3 or logits.shape[-1] == 0:
        checks.fail("logits", "of shape [S, T, V] with V > 0", checks.shape(logits))
    checks.flag("average_log_prob", average_log_prob)
    checks.inplace_backward(inplace_backward, logits)
    labels = checks.labels(labels, logits.shape[:-1], logits, of="logits")
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)[:, : labels.shape[1]]
    targets = checked_labels(shifted, -100, logits.shape[-1])
    per_token = logits_logps(logits, targets, LogitMap(), inplace=inplace_backward)
    lengths = (shifted != -100).sum(-1)
    all_rows = torch.full_like(lengths, shifted.shape[1])
    sums = sequences.sequence_sums(per_token.flatten(), all_rows)
    return sums / lengths.clamp(min=1) if average_log_prob else sums


def preference_loss(
    policy_chosen_logps: Tensor,  # [B]
    policy_rejected_logps: Tensor,  # [B]
    reference_chosen_logps: Tensor,  # [B]
    reference_rejected_logps: Tensor,  # [B]
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO losses and rewards from sequence log-probabilities, as the original DPO repository's
    `preference_loss`.

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] each.
        reference_chosen_logps, reference_rejected_logps: [B] each.
        beta: positive.
        label_smoothing: in [0, 0.5); conservative DPO (Mitchell 2023).
        ipo: the IPO loss (Azar et al., arXiv 2310.12036) instead; label smoothing does not apply to
            it.
        reference_free: take the reference as uniform in the loss (the rewards still use the one
            given).

    Returns:
        (losses [B], chosen_rewards [B], rejected_rewards [B]), the rewards detached.

    Raises:
        ValueError: naming the argument.
    """
    given = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    for name, value in given.items():
        checks.is_tensor(name, value)
        if value.shape != policy_chosen_logps.shape:
            checks.fail(name, f"of shape {checks.shape(policy_chosen_logps)}", checks.shape(value))
    checks.is_number("beta", beta, positive=True)
    checks.smoothing(label_smoothing)
    if ipo and label_smoothing:
        checks.fail("label_smoothing", "0 with ipo, whose loss does not define it", label_smoothing)
    chosen, rejected = reference_chosen_logps, reference_rejected_logps
    pairs = Pairs.of(
        policy_chosen_logps,
        policy_rejected_logps,
        torch.zeros_like(chosen) if reference_free else chosen,
        torch.zeros_like(rejected) if reference_free else rejected,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    entry = OBJECTIVES["ipo" if ipo else "sigmoid"]
    losses = entry.fn(pairs, **({"length_normalized": False} if ipo else {}))
    chosen_rewards = beta * (policy_chosen_logps - chosen).detach()
    rejected_rewards = beta * (policy_rejected_logps - rejected).detach()
    return narrowed(losses, pairs.dtype), chosen_rewards, rejected_rewards
