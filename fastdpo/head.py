"""`fastdpo.backends.contract.Head`, by the path it had before."""

from fastdpo.backends.contract import Head

__all__ = ["Head"]
