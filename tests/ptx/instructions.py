"""Every instruction that the executor knows: importing this registers them."""

from ptx import arithmetic, hopper, integers, transfers, warps, wgmma

__all__ = ["arithmetic", "hopper", "integers", "transfers", "warps", "wgmma"]
