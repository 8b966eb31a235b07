"""What a kernel can do wrong."""

from __future__ import annotations


class Fault(Exception):
    """An error of the kernel that runs, not of the executor."""


class OutOfBounds(Fault):
    pass


class Misaligned(Fault):
    pass


class Uninitialised(Fault):
    pass


class Race(Fault):
    pass


class Divergence(Fault):
    """Threads wait for others that will not come."""
