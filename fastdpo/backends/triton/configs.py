"""The tile shapes of exp_logits per architecture; `FASTDPO_AUTOTUNE=1` prints lines for this table.

A row's result may not depend on how many rows there are. Its additions over D follow BLOCK_D and
the tensor core instruction's shape along D, those over V follow the tile's columns, the chunks, and
how warps share the columns; none of it depends on a tile's rows. So for few rows only `rows` and
`warps` change, together, so that each warp keeps its share of the tile; a test reads both compiled
layouts and compares them. (That a matrix instruction of one shape adds a row's products in an order
that ignores the other rows is the hardware's promise, not ours to prove.) Two tiles are not halved.
sm_80's for 16-bit inputs would need more registers than four warps have, and spill (2 to 6 values
under Triton 3.9, up to 32 under 3.6). On sm_100 half the rows are another instruction, M = 64 for
128, of which nobody promises that it adds alike; by a B200's data sheet 64 rows wait for the
weight's bytes there anyway, twice as long as 128 do for the product.

What compiling each line for its architecture gives: `python -m benchmarks.kernels --static`. On
sm_90 none of the 256 combinations of E, bias, softcap, ragged vocabulary and statistics spills a
register for 16-bit inputs under Triton 3.9, nor do those tried under 3.6 and 3.8; elsewhere none
that was tried without statistics. What spills under 3.9, in loads and stores:

    sm_100  16-bit inputs without a softcap and two statistics or more: TRL's 103 with E, in 1,900
            instructions, and 62 without; all four 549 in 2,800. The accumulator leaves its own
            memory for registers all at once, and they do not suffice.
    sm_80   all four with E, softcap, bias and a ragged vocabulary: 26 in 7,680 (12 with half the
            depth; none in eight chunks, which lengthen every epilogue by a tenth to a third).
            Of few TF32 rows all four without E: 20.
    any     kernels for flagged rows with statistics, bias and a ragged vocabulary: 2 on sm_120 for
            16-bit inputs, 2 to 10 on sm_90 and sm_100 for fp32.

Under 3.6 and 3.8 a few values of the rare ones on sm_80 (all statistics, or three with a softcap).
None of these tiles has been timed yet.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    chunks: int = 1  # the epilogue takes the columns in so many parts
    group: int = 16  # row tiles that share a strip of the weight
    descriptors: bool = False  # the persistent kernel, where the tensors allow it
    flatten: bool = False
    residents: int = 1  # programs of the persistent kernel that share a processor
    halves: bool = False  # half the rows with half the warps gives every row the same bits

    def few_rows(self) -> Tile:
        """For few rows: half of them, where a row's sums cannot tell."""
        if not self.halves:
            return self
        return dataclasses.replace(self, rows=self.rows // 2, warps=self.warps // 2)


_PLAIN = Tile(32, 128, 32, warps=8, stages=2)
_PLAIN_TF32 = Tile(32, 64, 32, warps=8, stages=2)
_PLAIN_IEEE = Tile(32, 32, 32, warps=8, stages=2)
_TF32 = Tile(128, 128, 32, warps=8, stages=2, chunks=2, halves=True)
_IEEE = Tile(64, 64, 16, warps=4, stages=3)

# architecture -> kind of head and precision -> tile. "half" is fp16 and bf16 inputs, "softcap"
# those with a softcap (where its tile differs), "tf32" and "ieee" the two ways to multiply fp32.
# "plain" is for 16-bit rows at any address, which are copied element by element, and flagged rows;
# "plain tf32" the same for fp32 rows, where it differs from _PLAIN_TF32.
CONFIGS: dict[str, dict[str, Tile]] = {
    "sm_80": {
        "half": Tile(128, 256, 64, warps=8, stages=3, chunks=4),
        "plain": _PLAIN,
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "sm_86": {
        "half": Tile(128, 128, 64, warps=8, stages=3, chunks=2, halves=True),
        "plain": _PLAIN,
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "sm_89": {
        "half": Tile(128, 128, 64, warps=8, stages=3, chunks=2, halves=True),
        "plain": _PLAIN,
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "sm_90": {
        "half": Tile(
            128, 256, 64, warps=8, stages=4, chunks=4, descriptors=True, flatten=True, halves=True
        ),
        # 64 rows at least, for Hopper's own matrix instructions.
        "plain": Tile(64, 128, 32, warps=8, stages=2),
        "plain tf32": Tile(64, 128, 32, warps=8, stages=2),
        "tf32": Tile(
            128, 256, 32, warps=8, stages=4, chunks=4, descriptors=True, flatten=True, halves=True
        ),
        "ieee": _IEEE,
    },
    # Persistent, but not flattened: of the flattened loop Triton emits the body twice, with 256
    # exponentials per thread for 128.
    "sm_100": {
        "half": Tile(128, 256, 64, warps=8, stages=3, descriptors=True),
        "plain": Tile(32, 128, 32, warps=8, stages=2, chunks=2),
        "softcap": Tile(128, 128, 64, warps=8, stages=4, descriptors=True),
        "tf32": Tile(128, 128, 32, warps=8, stages=4, descriptors=True),
        "ieee": _IEEE,
    },
    "sm_120": {
        "half": Tile(128, 128, 64, warps=8, stages=3, chunks=2, halves=True),
        "plain": Tile(32, 128, 32, warps=8, stages=2, chunks=2),
        "plain tf32": Tile(32, 64, 32, warps=8, stages=2, chunks=2),
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "gfx942": {
        "half": Tile(128, 256, 64, warps=8, stages=2, chunks=2, halves=True),
        "plain": Tile(64, 128, 32, warps=8, stages=2),
        "ieee": Tile(128, 64, 32, warps=4, stages=2),
    },
    # No machine: shapes small enough that a test's few rows and columns make several tiles of each.
    "interpreter": {
        "half": Tile(
            16,
            64,
            16,
            warps=4,
            stages=2,
            chunks=2,
            group=2,
            descriptors=True,
            flatten=True,
            halves=True,
        ),
        "plain": Tile(16, 32, 16, warps=4, stages=2, chunks=2, group=2),
        "ieee": Tile(16, 64, 16, warps=4, stages=2, chunks=2, group=2),
    },
}

FEW_ROWS = 64
# Of one program at most, in bytes: NVIDIA's opt-in limit, AMD's LDS.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


def supported_arch(arch: str) -> str | None:
    """The table's architecture that serves `arch`: itself, or the nearest older one of its
    family.
    """
    if arch in CONFIGS:
        return arch
    if match := re.fullmatch(r"sm_(\d+)", arch):
        number = int(match[1])
        family = [int(known[3:]) for known in CONFIGS if known.startswith("sm_")]
        older = [known for known in family if known < number and known // 10 == number // 10]
        return f"sm_{max(older)}" if older else None
    return "gfx942" if arch.startswith("gfx95") else None


def has_tf32(arch: str) -> bool:
    return "tf32" in _table(arch)


def pick(arch: str, kind: str, softcap: bool) -> Tile:
    """The tile for many rows; `Tile.few_rows` is the one for few."""
    table = _table(arch)
    if softcap and kind == "half" and "softcap" in table:
        kind = "softcap"
    return table[kind if kind in table else "ieee"]


def pick_plain(arch: str, kind: str) -> Tile:
    """The tile for flagged rows, and where rows do not all start at 16-byte multiples."""
    table = _table(arch)
    if kind == "half":
        return table["plain"]
    if kind == "tf32" and kind in table:
        return table.get("plain tf32", _PLAIN_TF32)
    return _PLAIN_IEEE


def _table(arch: str) -> dict[str, Tile]:
    known = supported_arch(arch)
    if known is None:
        raise ValueError(f"arch should be one of {', '.join(CONFIGS)}, but is {arch}")
    return CONFIGS[known]
