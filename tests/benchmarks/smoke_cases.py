"""Checks that smoke must tell apart: `--checks-from smoke_cases`."""

from __future__ import annotations

import os
import signal

import torch
import triton
import triton.language as tl

from benchmarks.smoke import rows
from benchmarks.smoke.table import Absent, Found, Place, check


@triton.jit
def waits(flag_ptr):
    while tl.load(flag_ptr) == 0:
        pass


@triton.jit
def refused(ptr):
    tl.store(ptr, no_such_name)  # noqa: F821


def _spoilt(place: Place, spoil) -> Found:
    """The check of a right kernel, whose gradient somebody has touched since."""
    module = place.module("triton")
    right = module.logits_logps_backward

    def backward(grad, logits, labels, lse, logit_map, out):
        right(grad, logits, labels, lse, logit_map, out)
        spoil(out)

    module.logits_logps_backward = backward
    return rows._there_and_back(place, "triton", torch.float32, False)


@check("case slightly wrong")
def slightly_wrong(place: Place) -> Found:
    return _spoilt(place, lambda out: out.mul_(1.001))


@check("case not a number")
def not_a_number(place: Place) -> Found:
    return _spoilt(place, lambda out: out[-1, -1].fill_(float("nan")))


@check("case right")
def right(place: Place) -> Found:
    return _spoilt(place, lambda out: None)


@check("case fails")
def fails(place: Place) -> Found:
    refused[(1,)](torch.zeros(1, device=place.device))
    return Found()


@check("case dies")
def dies(place: Place) -> Found:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Found()


@check("case hangs")
def hangs(place: Place) -> Found:
    waits[(1,)](torch.zeros(1, dtype=torch.int32, device=place.device))
    return Found()


@check("case absent")
def absent(place: Place) -> Found:
    raise Absent("nobody has it")
