"""verl: its fused `linear_cross_entropy`, by fastdpo.

verl's actors call that function, by its name, in the place of logits: FSDP's with
`use_fused_kernels` and the backend "triton", Megatron's with `use_fused_kernels`. `patch()` puts
this one there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from ..core import checks
from ..core.results import LinearLogps
from ..distributed.vocabulary import VocabParallel
from ..loss import linear_logps

__all__ = ["linear_cross_entropy", "patch"]

_NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D] or [V_r, D]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    *,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels and entropies, as `verl.utils.kernel.linear_cross_entropy`.

    Args:
        hidden: [..., D], N rows in all.
        weight: [V, D]; with dist_process_group this process's rows, as many in each of them.
        labels: N token ids, every one of which counts; the label of a row is the token to predict
            there.
        temperature: positive; divides the logits.
        reduction: "none", which is what verl asks for.
        dist_process_group: the processes that share the vocabulary. Each then gets its own part of
            hidden's gradient, as verl has it: what gathered hidden (Megatron-LM's sequence
            parallelism) adds the parts up.
        workspace_bytes, backend: as in `fastdpo.loss.linear_logps`; not in verl.

    Returns:
        (log-probabilities [N], entropies [N]), fp32, both differentiable.

    Raises:
        ValueError: naming the argument.
    """
    if reduction != "none":
        checks.fail("reduction", "'none'", repr(reduction))
    checks.is_tensor("hidden", hidden)
    checks.is_tensor("labels", labels)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if labels.numel() != rows.shape[0]:
        should = f"of {rows.shape[0]} entries to fit hidden {checks.shape(hidden)}"
        checks.fail("labels", should, checks.shape(labels))
    found = linear_logps(
        rows,
        weight,
        labels.reshape(-1),
        temperature=temperature,
        stats=("entropy",),
        ignore_index=_NO_TOKEN,
        workspace_bytes=workspace_bytes,
        backend=backend,
        vocab_parallel=_shared(weight, dist_process_group),
    )
    found = cast(LinearLogps, found)
    return found.logps, cast(Tensor, found.entropy)


_NO_TOKEN = -(2**62)  # -100 is no token either, and verl would not leave it out


def _shared(weight: Tensor, group: dist.ProcessGroup | None) -> VocabParallel | None:
    if group is None or dist.get_world_size(group) == 1:
        return None
    sizes = [weight.shape[0]] * dist.get_world_size(group)
    return VocabParallel.of(sizes, group, reduce_hidden_grad=False)


def patch(**options: Any) -> list[str]:
    """Put `linear_cross_entropy` in the place of verl's, in all of its modules that hold it and in
    those that will import it; call it in every process that trains, before its models are made.

    Args:
        **options: workspace_bytes, backend, as in `linear_cross_entropy`.

    Returns:
        The names of the modules where it was put.

    Raises:
        ImportError: there is no verl with such a function.
        ValueError: naming the option.
    """
    unknown = sorted(set(options) - {"workspace_bytes", "backend"})
    if unknown:
        checks.fail("options", "among workspace_bytes and backend", unknown)
    checks.workspace_bytes(options.get("workspace_bytes"))
    checks.backend(options.get("backend"))
    theirs = getattr(importlib.import_module(f"verl.utils.kernel.{_NAME}"), _NAME)
    ours = functools.partial(linear_cross_entropy, **options)
    holders = [
        name
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "verl" and getattr(module, "__dict__", {}).get(_NAME) is theirs
    ]
    for name in holders:
        setattr(sys.modules[name], _NAME, ours)
    return sorted(holders)
