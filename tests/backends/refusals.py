"""What the bindings must refuse, and in which words: before any CUDA call, so on every machine."""

from __future__ import annotations

import re
from types import ModuleType
from typing import NamedTuple

import pytest

A = 1 << 20  # an address that is aligned to everything, and never read


def _base() -> dict[str, dict[str, object]]:
    """Arguments that each function would accept."""
    transform = {"scale": 1.0, "softcap": 0.0, "temperature": 1.0}
    queue = {"device": 0, "stream": 0}
    logits = {"logits": A, "dtype": 1, "rows": 4, "vocab": 100, "row_stride": 100, "labels": A}
    return {
        "logits_logps": {
            **logits, **transform, **queue, "logps": A, "lse": A,
            "workspace": A, "workspace_bytes": 1 << 12, "second_launch": False,
        },
        "logits_logps_backward": {
            **logits, **transform, **queue, "lse": A, "grad": A, "grad_stride": 1, "grad_scale": 0,
            "out": 2 * A, "out_dtype": 1, "out_stride": 100,
        },
        "target_logits": {
            **transform, **queue, "hidden": A, "dtype": 1, "rows": 4, "width": 64,
            "hidden_stride": 64, "weight": A, "vocab": 100, "weight_stride": 64, "bias": 0,
            "bias_dtype": 0, "labels": A, "out": A,
        },
        "sequence_loss": {
            **queue, "logps": A, "rows": 10, "labels": 0, "offsets": A, "pairs": 2, "ref_logps": A,
            "beta": 0.1, "label_smoothing": 0.0, "average": False, "interleaved": False, "loss": A,
            "sequence_logps": A, "rewards": A, "coefficients": A,
            "row_coefficients": 0, "workspace": A, "workspace_bytes": 64,
        },
    }  # fmt: skip


class Refusal(NamedTuple):
    function: str
    changed: dict[str, object]
    message: str  # a regular expression, from the start

    def __str__(self) -> str:
        changed = ",".join(f"{name}={value}" for name, value in self.changed.items())
        return f"{self.function}({changed})"


def _all() -> list[Refusal]:
    found = []

    def add(function: str, message: str, **changed: object) -> None:
        found.append(Refusal(function, changed, message))

    pointers = {
        "logits_logps": ("logits", "labels", "logps", "lse"),
        "logits_logps_backward": ("logits", "labels", "lse", "grad", "out"),
        "target_logits": ("hidden", "weight", "labels", "out"),
        "sequence_loss": (
            "logps", "offsets", "ref_logps", "loss", "sequence_logps", "rewards", "coefficients",
            "workspace",
        ),
    }  # fmt: skip
    for function, names in pointers.items():
        for name in names:
            add(function, f"{name} should be an address, got the null pointer", **{name: 0})
            add(function, f"{name} should be a multiple of the element's", **{name: A + 1})
            add(function, f"{name} should be an address, got", **{name: -8})
            add(function, f"{name} should be an address, got", **{name: 1 << 64})
    for function in ("logits_logps", "logits_logps_backward", "target_logits"):
        add(function, "dtype should be the tag 0 .float32., .* got 3", dtype=3)
        add(function, "dtype should be the tag .* got -1", dtype=-1)
        add(function, "rows should be between 0", rows=-1)
        add(function, "rows should fit in 64 bits, got 9223372036854775808", rows=1 << 63)
        add(function, "vocab should be between 1", vocab=0)
        add(function, "softcap should be positive and finite", softcap=-1.0)
        add(function, "softcap should be positive and finite", softcap=float("nan"))
        add(function, "temperature should be positive", temperature=0.0)
        add(function, "temperature should be positive", temperature=float("nan"))
        add(function, "scale should be a finite float32", scale=float("inf"))
        add(function, "scale should be a finite float32", scale=1e39)
        add(function, "device should be between 0", device=-1)
        add(function, "stream should be an address, got", stream=-1)
    for function in ("logits_logps", "logits_logps_backward"):
        add(function, "row_stride should be between 0", row_stride=-100)
        add(function, "row_stride should leave 4 rows within 64 bits", row_stride=1 << 61)
        add(function, "row_stride should leave 4 rows within 64 bits", row_stride=(1 << 63) - 1)
        add(function, "vocab should be between 1 and 1073741824", vocab=(1 << 30) + 1)
        add(function, "rows should fit in a launch .* got 2147483648 of 1 blocks", rows=1 << 31)
        add(function, "rows should fit in a launch .* got 1048576 of", rows=1 << 20, vocab=1 << 28)
    add("logits_logps", "workspace_bytes should be at least 80", vocab=1 << 15, dtype=0,
        workspace_bytes=16)  # fmt: skip
    add("logits_logps", "workspace should be an address, got the null pointer", vocab=1 << 15,
        dtype=0, workspace=0, workspace_bytes=1 << 10)  # fmt: skip
    add("logits_logps_backward", "out_dtype should be the tag .* got 9", out_dtype=9)
    add("logits_logps_backward", "out_stride should be at least vocab, got 99", out_stride=99)
    add(
        "logits_logps_backward", "out_stride should leave 4 rows within 64 bits", out_stride=1 << 62
    )
    add(
        "logits_logps_backward",
        "grad_stride should leave 4 rows within 64 bits",
        grad_stride=1 << 62,
    )
    add(
        "logits_logps_backward",
        "grad_scale should be a multiple of the element's",
        grad_scale=A + 2,
    )
    # In place means the same matrix: address, stride and type.
    add("logits_logps_backward", "out should be logits itself or lie apart", out=A + 2)
    add("logits_logps_backward", "out should be logits itself or lie apart", out=A - 2)
    add("logits_logps_backward", "out should be logits itself or lie apart", out=A, out_dtype=0)
    add("logits_logps_backward", "out should be logits itself or lie apart", out=A, out_stride=101)
    add(
        "logits_logps_backward",
        "out should be logits itself or lie apart",
        row_stride=150,
        out_stride=150,
        out=A + 2 * 60,
    )
    add("target_logits", "width should be between 1", width=0)
    add("target_logits", "bias_dtype should be the tag .* got 7", bias_dtype=7)
    add("target_logits", "bias should be a multiple of the element's", bias=A + 2)
    add("target_logits", "hidden_stride should leave 4 rows within 64 bits", hidden_stride=1 << 62)
    add(
        "target_logits", "weight_stride should leave 100 rows within 64 bits", weight_stride=1 << 60
    )
    add("sequence_loss", "rows should be between 0", rows=-1)
    add("sequence_loss", "pairs should be between 0 and 2147483647", pairs=1 << 31)
    add("sequence_loss", "beta should be finite", beta=float("nan"))
    add("sequence_loss", "label_smoothing should be finite", label_smoothing=float("inf"))
    add("sequence_loss", "workspace_bytes should be at least 24", workspace_bytes=23)
    add("sequence_loss", "labels should be a multiple of the element's", labels=A + 4)
    add(
        "sequence_loss",
        "row_coefficients should be a multiple of the element's",
        row_coefficients=A + 2,
    )
    return found


REFUSALS = _all()


def check(module: ModuleType, refusal: Refusal) -> None:
    arguments = {**_base()[refusal.function], **refusal.changed}
    with pytest.raises(ValueError) as caught:
        getattr(module, refusal.function)(**arguments)
    assert re.match(refusal.message, str(caught.value)), str(caught.value)


def accepted(function: str, **changed: object) -> dict[str, object]:
    return {**_base()[function], **changed}
