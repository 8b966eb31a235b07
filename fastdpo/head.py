"""`fastdpo.backends.contract.Head`, by the path it had before."""

from .backends.contract import Head

__all__ = ["Head"]
