"""fastdpo: Direct Preference Optimization without ever writing the logits.

    linear_logps         hidden states and an lm_head to per-token log-probabilities
    linear_dpo_loss      ... to the preference loss of a batch of pairs
    logits_dpo_loss      materialized logits to the same loss
    get_batch_logps      materialized logits to sequence log-probabilities
    preference_loss      sequence log-probabilities to losses and rewards
    FusedLinearDPOLoss   a drop-in for Liger-Kernel's LigerFusedLinearDPOLoss
    VocabParallel        an lm_head whose rows several processes share
    SequenceParallel     sequences whose tokens several processes share

The functions are those of `fastdpo.loss`, the last two those of `fastdpo.parallel`;
`fastdpo.integrations` has Hugging Face models and TRL. A name is imported when it is first used:
`import fastdpo` alone loads no PyTorch, and nothing here loads Triton or transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loss import (
        FusedLinearDPOLoss,
        get_batch_logps,
        linear_dpo_loss,
        linear_logps,
        logits_dpo_loss,
        preference_loss,
    )
    from .parallel import SequenceParallel, VocabParallel

# The only place that states it: pyproject.toml reads it from here.
__version__ = "0.1.0"

__all__ = [
    "FusedLinearDPOLoss",
    "SequenceParallel",
    "VocabParallel",
    "__version__",
    "get_batch_logps",
    "linear_dpo_loss",
    "linear_logps",
    "logits_dpo_loss",
    "preference_loss",
]

_HOMES = {"SequenceParallel": ".parallel", "VocabParallel": ".parallel"}
_MODULES = ("loss", "parallel")  # `import fastdpo` is enough for `fastdpo.loss.linear_logps`


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".loss"), __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
