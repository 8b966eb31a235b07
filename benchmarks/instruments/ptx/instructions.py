"""Every instruction that the executor knows: importing this registers them."""

from benchmarks.instruments.ptx import arithmetic, hopper, integers, transfers, warps, wgmma

__all__ = ["arithmetic", "hopper", "integers", "transfers", "warps", "wgmma"]
