"""Which backend serves which primitive: by argument, then by environment variable, then
automatically.

A choice that cannot be honoured is refused with the reason; nothing is swapped silently. The
automatic choice is made per primitive, and only among backends that say they can run here on this
device and dtype.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from ..names import PACKAGE

NAMES = ("torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "FASTDPO_BACKEND"

# Automatic order per primitive on a CUDA device, with what it rests on. UNMEASURED until a GPU has
# run `python -m benchmarks.kernels`: what reads or writes logits and the loss prefer the CUDA C++
# build, whose loads are wide for any vocabulary; products prefer Triton, and so does the label's
# logit, which is N rows beside N·V and comes from the backend whose product it anchors; the torch
# backend serves whatever the others refuse.
PREFERENCE = {
    "exp_logits": ("triton", "torch"),
    "target_logits": ("triton", "cuda", "torch"),
    "logits_logps": ("cuda", "triton", "torch"),
    "logits_logps_backward": ("cuda", "triton", "torch"),
    "sequence_loss": ("cuda", "triton", "torch"),
}


class Availability(NamedTuple):
    name: str
    available: bool
    reason: str


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def report() -> list[Availability]:
    """Every backend, whether this machine can use it, and why (not)."""
    return [Availability(name, *_available(name)) for name in NAMES]


def requested(backend: str | None) -> str:
    """The backend asked for: the argument, else the environment variable, else "auto"."""
    return backend or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def primitive(name: str, like: torch.Tensor, backend: str | None = None) -> ModuleType:
    """The backend module whose primitive `name` serves tensors like `like` (device and dtype).

    Raises:
        BackendUnavailable: `backend` (or the environment variable) names one that cannot run here.
    """
    choice = requested(backend)
    if choice != "auto":
        ok, reason = _serves(choice, name, like.device, like.dtype)
        if ok:
            return _module(choice)
        if choice == "cuda" and "does not implement" in reason:
            # The CUDA C++ build has no matrix product of its own: its users get the automatic
            # choice for it.
            return primitive(name, like, "auto")
        raise BackendUnavailable(f"backend {choice!r} cannot run {name}: {reason}")
    if like.is_cuda:
        for candidate in PREFERENCE[name]:
            if _serves(candidate, name, like.device, like.dtype)[0]:
                return _module(candidate)
    return _module("torch")


@functools.cache
def _serves(backend: str, name: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    # Remembered, as it is asked several times a step and what a machine has does not change.
    available, reason = _available(backend, device)
    if not available:
        return False, reason
    module = _module(backend)
    if name not in module.PRIMITIVES:
        return False, f"the {backend} backend does not implement it"
    return module.supports(device, dtype)


def _available(backend: str, device: torch.device | None = None) -> tuple[bool, str]:
    try:
        module = _module(backend)
    except ImportError as error:  # triton is no dependency
        return False, str(error)
    there = device is not None and device.type == "cuda" and torch.cuda.is_available()
    with torch.cuda.device(device) if there else contextlib.nullcontext():
        return module.available()  # of the device that is current


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.backends.{backend}")
