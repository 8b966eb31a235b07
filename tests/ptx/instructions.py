"""Every instruction that the executor knows: importing this registers them."""

from ptx import arithmetic, integers, transfers, warps

__all__ = ["arithmetic", "integers", "transfers", "warps"]
