"""What bad input gets: a ValueError that names the argument and what it should be, before anything
is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..backends import select
from ..backends.contract import Head, LogitMap
from ..distributed.data import DataParallel
from ..distributed.dtensors import is_dtensor
from ..distributed.sequence import SequenceParallel
from ..distributed.sharded import ShardedHead
from ..distributed.vocabulary import VocabParallel
from ..objectives import PAIRS, ResolvedObjective
from .autograd import is_traced
from .call import STATS, Normalization

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INT64_MAX = 2**63 - 1


def fail(argument: str, should: str, got: object) -> NoReturn:
    raise ValueError(f"{argument} should be {should}, got {got}")


def shape(t: Tensor) -> str:
    return f"{list(t.shape)}"


def is_tensor(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(argument, "a torch.Tensor", type(value).__name__)


def floating(argument: str, value: object) -> None:
    """A dense tensor in a dtype that PyTorch computes in."""
    is_tensor(argument, value)
    assert isinstance(value, Tensor)
    if is_dtensor(value):
        fail(argument, "a plain tensor (to_local or full_tensor makes one)", "a DTensor")
    if value.dtype not in FLOATING:
        names = [str(dtype).removeprefix("torch.") for dtype in FLOATING]
        fail(argument, f"of a floating-point dtype among {names}", value.dtype)
    if value.layout != torch.strided:
        fail(argument, "a dense (strided) tensor", value.layout)


def is_number(argument: str, value: float, *, positive: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 if positive else -math.inf) < value < math.inf or value == 0:
        fail(
            argument,
            "a positive number" if positive else "a finite number other than 0",
            repr(value),
        )


def flag(argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        fail(argument, "True or False", repr(value))


def smoothing(value: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < 0.5:
        fail("label_smoothing", "in [0, 0.5)", repr(value))


def lm_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    prefix: str = "",
    extra: Tensor | None = None,
) -> Head:
    """The head that these arguments describe; `prefix` ("ref_") goes before the tensors' names in
    messages. `extra` is ours, and fits the weight.
    """
    name = f"{prefix}hidden"
    floating(name, hidden)
    floating(f"{prefix}weight", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        fail(f"{prefix}weight", "of shape [V, D] with V > 0 and D > 0", shape(weight))
    size = weight.shape[1] + (0 if extra is None else extra.shape[1])
    if hidden.dim() == 0 or hidden.shape[-1] != size:
        fail(
            name,
            f"of shape [..., {size}] to fit {prefix}weight {shape(weight)}",
            shape(hidden),
        )
    _same_device(name, hidden, f"{prefix}weight", weight)
    compute = compute_dtype(hidden)
    if compute is None and hidden.dtype != weight.dtype:
        fail(
            f"{prefix}weight",
            f"of {name}'s dtype {hidden.dtype} (or call under torch.autocast)",
            weight.dtype,
        )
    if bias is not None:
        floating(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            fail(f"{prefix}bias", f"of shape [{weight.shape[0]}]", shape(bias))
        _same_device(name, hidden, f"{prefix}bias", bias)
        if compute is None and bias.dtype != hidden.dtype:
            fail(f"{prefix}bias", f"of {name}'s dtype {hidden.dtype}", bias.dtype)
    curve = logit_map(logit_scale, softcap, temperature)
    return Head(weight, bias, curve.scale, curve.softcap, curve.temperature, extra)


def materialized(
    logits: Tensor,
    cu_seqlens: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> LogitMap:
    """What is still to be done to logits [2B, T, V], or [N, V] with cu_seqlens."""
    floating("logits", logits)
    if cu_seqlens is None:
        if logits.dim() != 3 or logits.shape[-1] == 0:
            should = "of shape [2B, T, V] with V > 0, or [N, V] with cu_seqlens"
            fail("logits", should, shape(logits))
    else:
        if logits.dim() != 2 or logits.shape[-1] == 0:
            fail("logits", "of shape [N, V] with V > 0, with cu_seqlens", shape(logits))
        boundaries(cu_seqlens, logits.shape[0], logits, of="logits")
    return logit_map(logit_scale, softcap, temperature)


def logit_map(logit_scale: float, softcap: float | None, temperature: float) -> LogitMap:
    is_number("logit_scale", logit_scale)
    is_number("temperature", temperature, positive=True)
    if softcap is not None:
        is_number("softcap", softcap, positive=True)
    cap = None if softcap is None else float(softcap)
    return LogitMap(float(logit_scale), cap, float(temperature))


def compute_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast would multiply in, or None where it would not interfere (off, or fp64
    inputs).
    """
    device = hidden.device.type
    if hidden.dtype == torch.float64 or hidden.is_meta:  # autocast knows no such device
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def labels(
    value: Tensor,
    expected: torch.Size | Sequence[int],
    like: Tensor,
    *,
    of: str = "hidden",
) -> Tensor:
    """Labels of integer dtype and the expected shape, as int64."""
    is_tensor("labels", value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        fail("labels", "of an integer dtype", value.dtype)
    if tuple(value.shape) != tuple(expected):
        fail("labels", f"of shape {list(expected)} to fit {of}", shape(value))
    _same_device(of, like, "labels", value)
    if value.dtype == torch.uint64:
        # The largest of them would come out negative, as what is ignored: 2^63 - 1 is as far
        # outside of every vocabulary.
        return value.view(torch.int64).where(value.view(torch.int64) >= 0, _INT64_MAX)
    return value.long()


def label_values(
    value: Tensor,  # [...]
    ignore_index: int,
    vocab_size: int,
) -> tuple[Tensor, int]:
    """Which labels carry loss [...], and how many do, all of them in [0, V): the one wait for a
    GPU.
    """
    carries = value != ignore_index
    outside = carries & ((value < 0) | (value >= vocab_size))
    count, bad = torch.stack([carries.sum(), outside.sum()]).tolist()
    if bad:
        should = f"in [0, {vocab_size}) or ignore_index ({ignore_index})"
        fail("labels", should, f"{value[outside][0].item()} among them")
    return carries, count


def row_index(
    value: Tensor,  # [N]
    labels: Tensor,  # [M]
) -> None:
    is_tensor("row_index", value)
    if value.dtype != torch.int64 or value.dim() != 1:
        should = "a one-dimensional tensor of int64"
        fail("row_index", should, f"{value.dtype} {shape(value)}")
    _same_device("labels", labels, "row_index", value)
    if value.numel() == 0 or is_traced(value):
        return
    inside = ((value >= 0) & (value < labels.numel())).all()
    _holds(inside, "row_index", f"positions in [0, {labels.numel()})", "others")
    ascending = (value.diff() > 0).all()
    _holds(ascending, "row_index", "in strictly ascending order", "another order")


def picked_labels(
    value: Tensor,  # [N] at the positions of row_index
    vocab_size: int,
) -> None:
    """On a GPU nothing waits: a label out of range trips a device-side assertion."""
    inside = (value >= 0) & (value < vocab_size)
    should = f"in [0, {vocab_size}) at every position of row_index"
    if not value.is_cpu:
        torch._assert_async(inside.all(), f"labels should be {should}")
    elif not bool(inside.all()):
        fail("labels", should, value[~inside][0].item())


def inplace_backward(value: bool, logits: Tensor) -> None:
    """Whether the gradient can lie where the logits do."""
    flag("inplace_backward", value)
    if value and not logits.is_contiguous():
        fail("inplace_backward", "False for logits that are not contiguous", "True")
    if value and logits.is_leaf and logits.requires_grad:
        fail("inplace_backward", "False for logits that are a leaf with a gradient", "True")


def ignored(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        fail("ignore_index", "an int", repr(value))
    return value


def stats(value: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(value, (str, Sequence)):
        fail("stats", f"a sequence of names among {list(STATS)}", repr(value))
    value = (value,) if isinstance(value, str) else tuple(value)
    unknown = [name for name in value if name not in STATS]
    if unknown or len(set(value)) != len(value):
        fail("stats", f"distinct names among {list(STATS)}", list(value))
    return value


def workspace_bytes(value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        fail("workspace_bytes", "None or a number of bytes >= 0", repr(value))
    return value


def backend(value: str | None) -> str | None:
    known = ("auto", *select.NAMES)
    if value is not None and value not in known:
        fail("backend", f"None or one of {list(known)}", repr(value))
    if value is None and select.requested(None) not in known:
        fail(select.ENVIRONMENT_VARIABLE, f"one of {list(known)}", repr(select.requested(None)))
    return value


def vocab_parallel(value: VocabParallel | None, head: Head) -> VocabParallel | None:
    if value is None:
        return None
    if not isinstance(value, VocabParallel):
        fail("vocab_parallel", "a fastdpo.parallel.VocabParallel", type(value).__name__)
    rows = value.sizes[value.rank]
    if head.vocab_size != rows:
        fail("weight", f"of shape [{rows}, D] as vocab_parallel says", shape(head.weight))
    return value


def sharded_head(value: ShardedHead | None, head: Head, shared: object) -> ShardedHead | None:
    if value is None:
        return None
    if not isinstance(value, ShardedHead):
        fail("sharded_head", "a fastdpo.parallel.ShardedHead", type(value).__name__)
    if shared is not None:
        should = "None with vocab_parallel: processes have the same hidden states, or their own"
        fail("sharded_head", should, "both")
    rows = value.vocabulary.sizes[value.vocabulary.rank]
    if head.vocab_size != rows:
        fail("weight", f"of shape [{rows}, D] as sharded_head says", shape(head.weight))
    return value


def shares_sequences(value: SequenceParallel | None) -> SequenceParallel | None:
    if value is not None and not isinstance(value, SequenceParallel):
        fail("sequence_parallel", "a fastdpo.parallel.SequenceParallel", type(value).__name__)
    return value


def sequence_parallel(
    value: SequenceParallel | None, resolved: ResolvedObjective
) -> SequenceParallel | None:
    if shares_sequences(value) is None:
        return None
    for name, given in (
        ("ld_alpha", resolved.ld_alpha is not None),
        ("use_weighting", resolved.wpo),
    ):
        if given:
            fail(name, "off with sequence_parallel: it needs whole sequences", "it")
    return value


def normalization(
    num_pairs: float | Tensor | None,
    num_tokens: float | Tensor | None,
    data_parallel: DataParallel | None,
    resolved: ResolvedObjective,
    count: int | None = None,  # pairs of this call, where known
) -> Normalization | None:
    """What the loss is divided by; None where it is the call's own pairs and tokens."""
    if num_pairs is None and num_tokens is None and data_parallel is None:
        return None
    if data_parallel is not None and not isinstance(data_parallel, DataParallel):
        should = "a fastdpo.parallel.DataParallel"
        fail("data_parallel", should, type(data_parallel).__name__)
    if not resolved.is_sum_over_pairs:
        parts = [part.entry.name for part in resolved.parts if part.entry.whole_batch]
        if not parts:
            should = (
                "off with num_pairs or data_parallel: the weights multiply one NLL of all pairs"
            )
            fail("use_weighting", should, "True with sft")
        should = "None, as data_parallel too, for objectives that compare a batch's pairs"
        fail("num_pairs", should, f"one of them for {', '.join(parts)}")
    if num_pairs is None and num_tokens is not None:
        fail("num_pairs", "given with num_tokens", "None")
    if num_tokens is None and num_pairs is not None and resolved.needs_nll:
        fail("num_tokens", "given with num_pairs for objectives with an NLL term", "None")
    _count("num_pairs", num_pairs, count or 0)
    _count("num_tokens", num_tokens, 0)
    return Normalization(num_pairs, num_tokens, data_parallel)


def _count(argument: str, value: float | Tensor | None, least: int) -> None:
    """Values of tensors are looked at on the CPU alone, so as not to wait for a GPU."""
    if value is None:
        return
    should = f"a number >= {least} (this call's), or a tensor of it"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            fail(argument, f"{should}, of one element", f"{value.dtype} {shape(value)}")
        if not value.is_cpu or is_traced(value):
            return
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(argument, should, repr(value))
    if not least <= value < math.inf:
        fail(argument, should, value)


def pairs(value: str) -> str:
    if value not in PAIRS:
        fail("pairs", f"one of {list(PAIRS)}", repr(value))
    return value


def boundaries(
    value: Tensor,  # [S + 1]
    total: int,
    like: Tensor,
    of: str = "hidden",
) -> Tensor:
    """Boundaries of a packed batch."""
    is_tensor("cu_seqlens", value)
    if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1 or value.numel() < 1:
        fail(
            "cu_seqlens",
            "a one-dimensional tensor of int32 or int64, [2B + 1]",
            f"{value.dtype} {shape(value)}",
        )
    _same_device(of, like, "cu_seqlens", value)
    if not is_traced(value):
        ends = (value[0] == 0) & (value[-1] == total) & (value.diff() >= 0).all()
        got = value.tolist() if value.is_cpu else "others"
        _holds(ends, "cu_seqlens", f"ascending from 0 to the number of rows, {total}", got)
    return value


def batch_shape(hidden: Tensor, cu_seqlens: Tensor | None) -> torch.Size:
    if cu_seqlens is None:
        if hidden.dim() != 3:
            fail("hidden", "of shape [2B, T, D], or [N, D] with cu_seqlens", shape(hidden))
    else:
        if hidden.dim() != 2:
            fail("hidden", "of shape [N, D] with cu_seqlens", shape(hidden))
        boundaries(cu_seqlens, hidden.shape[0], hidden)
    return hidden.shape[:-1]


def reference_head(
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    hidden: Tensor,
    head: Head,
) -> Head | None:
    """The reference's head, or None where there is no reference or its log-probabilities are
    given.
    """
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                fail(name, "given only with ref_hidden", "it alone")
        return None
    if ref_logps is not None:
        fail("ref_logps", "None where ref_hidden is given: one kind of reference", "both")
    if ref_weight is None:
        if ref_bias is not None:
            fail("ref_bias", "given only with ref_weight", "it alone")
        ref_weight, ref_bias = head.weight, head.bias
    ref_head = lm_head(
        ref_hidden,
        ref_weight,
        ref_bias,
        logit_scale=head.scale,
        softcap=head.softcap,
        temperature=head.temperature,
        prefix="ref_",
    )
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        fail("ref_hidden", f"of shape {[*hidden.shape[:-1], 'D']}", shape(ref_hidden))
    if ref_head.vocab_size != head.vocab_size:
        fail("ref_weight", f"of shape [{head.vocab_size}, D]", shape(ref_weight))
    if ref_hidden.device != hidden.device:
        fail("ref_hidden", f"on hidden's device {hidden.device}", ref_hidden.device)
    return ref_head


def sequence_count(
    count: int,
    resolved: ResolvedObjective,
    device: torch.device | None,
    cu_seqlens: Tensor | None = None,
    *,
    name: str = "labels",
) -> None:
    """`name` is the argument whose first dimension it is, where there is no cu_seqlens; a device of
    None leaves it to a later check where the options are."""
    if count % resolved.num_candidates:
        name = name if cu_seqlens is None else "cu_seqlens"
        group = "pairs" if resolved.layout == "pairs" else f"groups of {resolved.num_candidates}"
        fail(name, f"of a number of sequences that makes whole {group}", f"{count} sequences")
    resolved.check(count, device)


def reference_logps(
    ref_logps: Tensor | None,
    labels: Tensor,
    count: int,
) -> bool:
    """Whether ref_logps is per token."""
    if ref_logps is None:
        return False
    floating("ref_logps", ref_logps)
    if ref_logps.device != labels.device:
        fail("ref_logps", f"on hidden's device {labels.device}", ref_logps.device)
    if ref_logps.shape == (count,):
        return False
    if ref_logps.shape != labels.shape:
        fail("ref_logps", f"of shape [{count}] or {shape(labels)}", shape(ref_logps))
    return True


def _holds(condition: Tensor, argument: str, should: str, got: object) -> None:  # []
    """On a GPU nothing waits: there it is a device-side assertion. Other devices have none."""
    if condition.is_cuda:
        torch._assert_async(condition, f"{argument} should be {should}")
    elif condition.is_cpu and not bool(condition):
        fail(argument, should, got)


def _same_device(a: str, first: Tensor, b: str, second: Tensor) -> None:
    if first.device != second.device:
        fail(b, f"on {a}'s device {first.device}", second.device)
