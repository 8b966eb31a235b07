"""What can be asked of the demo, checked before anything starts."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import objectives
from ..backends import select
from ..objectives.registry import REQUIRED

DTYPES = ("float32", "bfloat16")


class InputError(Exception):
    """What was given cannot be used; the message is one line and says what and where."""


@dataclass(frozen=True)
class Options:
    """The command line of `fastdpo demo`. None: a default that depends on the rest."""

    data: Path | None = None
    model: str | None = None
    output: Path = Path("fastdpo-demo")
    steps: int = 150
    sft_steps: int | None = None
    batch_size: int = 16
    max_length: int = 512
    beta: float = 0.5
    objective: str = "sigmoid"
    label_smoothing: float = 0.0
    lr: float | None = None
    lora: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    backend: str | None = None

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        if self.lora:
            return 1e-4 if self.model else 2e-3
        return 5e-6 if self.model else 2e-4

    @property
    def pretraining_steps(self) -> int:
        """A model made here has to learn to write first; one that was loaded can."""
        if self.sft_steps is not None:
            return self.sft_steps
        return 0 if self.model else 700

    @property
    def torch_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def uses_reference(self) -> bool:
        return objectives.OBJECTIVES[self.objective].reference != "refused"

    def check(self) -> None:
        """
        Raises:
            InputError: naming the option.
        """
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} should be at least 1")
        if self.sft_steps is not None and self.sft_steps < 0:
            raise InputError("--sft-steps should be at least 0")
        if self.max_length < 8:
            raise InputError("--max-length should be at least 8")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError("--lr should be positive")
        if self.seed < 0:
            raise InputError("--seed should be at least 0")
        if self.lora and importlib.util.find_spec("peft") is None:
            raise InputError("--lora needs peft: pip install peft")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype should be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self._check_backend()
        self._check_objective()
        self._check_device()
        self._check_output()

    def _check_backend(self) -> None:
        if self.backend is None or self.backend == "auto":
            return
        known = {entry.name: entry for entry in select.report()}
        if self.backend not in known:
            raise InputError(
                f"--backend should be one of {', '.join(('auto', *known))}, got {self.backend!r}"
            )
        if not known[self.backend].available:
            reason = known[self.backend].reason
            raise InputError(f"--backend {self.backend} cannot be used here: {reason}")

    def _check_objective(self) -> None:
        offered = pair_objectives()
        if self.objective not in offered:
            raise InputError(
                f"--objective should be one of {', '.join(offered)}, got {self.objective!r}"
            )
        try:
            objectives.resolve(
                self.objective,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                has_reference=self.uses_reference,
                options={},
            )
        except ValueError as error:
            raise InputError(f"--objective {self.objective}: {error}") from None

    def _check_device(self) -> None:
        try:
            torch.empty(1, device=self.torch_device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--device {self.device} cannot be used here: {reason}") from None

    def _check_output(self) -> None:
        if not self.output.exists():
            above = next(p for p in self.output.absolute().parents if p.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise InputError(f"--output {self.output} cannot be made: {above} takes no files")
            return
        if not self.output.is_dir():
            raise InputError(f"--output {self.output} is a file")
        if any(self.output.iterdir()) and not (self.output / "summary.json").is_file():
            raise InputError(f"--output {self.output} holds something else; name another directory")


def pair_objectives() -> list[str]:
    """The objectives that need nothing but pairs."""
    return [
        name
        for name, entry in objectives.OBJECTIVES.items()
        if entry.layout == "pairs"
        and all(option.default is not REQUIRED for option in entry.options)
    ]
