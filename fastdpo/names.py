"""The names that a copy of fastdpo has in a process.

Several copies may be imported beside each other: the installed package, and others under other
names from anywhere (Hugging Face's `kernels` imports each build under its `id`). Modules are kept
apart by Python; operators are registered with PyTorch, which has one table for the process and
lets a later registration of a name replace an earlier one. So a copy registers its operators in
namespaces of its own, and every use of them goes through here.
"""

from __future__ import annotations

import hashlib
import re

import torch

PACKAGE = __name__.rpartition(".")[0]  # "fastdpo", or what this copy was imported as


def namespace(package: str) -> str:
    """The namespace of the operators of a copy that is imported as `package`.

    "fastdpo" for the package under its own name; a build's `id` (`_fastdpo_<backend>_<hash>`) as it
    is, as the Hub asks; any other name with a hash of it, which makes an identifier of
    "vendor.fastdpo" that no other name becomes.
    """
    if package == "fastdpo" or re.fullmatch(r"_fastdpo_[a-z]+_[0-9a-f]+", package):
        return package
    digest = hashlib.sha256(package.encode()).hexdigest()[:12]
    return f"fastdpo_{re.sub(r'[^0-9A-Za-z_]', '_', package)}_{digest}"


NAMESPACE = namespace(PACKAGE)  # of what torch.compile sees
TRITON = f"{NAMESPACE}_triton"  # of the backends' own operators
CUDA = f"{NAMESPACE}_cuda"

ops = getattr(torch.ops, NAMESPACE)
