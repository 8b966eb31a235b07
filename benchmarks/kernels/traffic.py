"""What each primitive must move and multiply at least, and the time an H200 would take for it.

A model, not a measurement: the larger of bytes over the bandwidth of a copy, and operations over
the rate of the products plus instructions over the rate at which they are issued. Traffic between
L2 and the processors, launches, latencies and the ends of loops are not in it.
"""

from __future__ import annotations

from typing import NamedTuple

H200 = "H200: 790 TFLOP/s bf16, 4.3 TB/s"
# Operations per second: bf16 as an H200 was seen to reach it; TF32 half of that, as in the data
# sheet; fp32 without tensor cores nine tenths of the data sheet's 67.
RATES = {"half": 790e12, "tf32": 395e12, "ieee": 60e12}
BANDWIDTH = 4.3e12  # bytes per second, of a copy, as an H200 was seen to reach it
# Warps' instructions per second: 132 processors, four at each clock.
ISSUE = 132 * 4 * 1.755e9
# Instructions of a warp per logit in exp_logits' epilogue, by (is E stored?, is there a softcap?).
# All of the sm_90 binary, over the logits of a tile: the loop over D is some hundred instructions
# in thousands. A test compares them.
EPILOGUE = {
    (False, False): 0.47,
    (True, False): 0.51,
    (False, True): 0.94,
    (True, True): 1.06,
}


class Work(NamedTuple):
    operations: float
    bytes: float
    kind: str = "ieee"  # how it multiplies: a key of RATES
    instructions: float = 0.0  # that run before or after the operations, never beside them

    @property
    def seconds(self) -> float:
        return max(self._computing, self.bytes / BANDWIDTH)

    @property
    def bound(self) -> str:
        return "products" if self._computing > self.bytes / BANDWIDTH else "bytes"

    @property
    def _computing(self) -> float:
        return self.operations / RATES[self.kind] + self.instructions / ISSUE


def exp_logits(  # many parameters: numbers that its cost depends on
    n: int,
    vocab: int,
    d: int,
    itemsize: int,
    kind: str,
    kept: int = 0,
    quantities: int = 1,
    tile: tuple[int, int, int] = (128, 256, 16),
    softcap: bool = False,
) -> Work:
    """`kept` columns of E, `quantities` sums per row; tile: rows, columns, row tiles in a group.

    A group of row tiles stays in L2 and reads the weight once; each vocabulary tile writes one
    fp32 number per row and quantity, which the reduction reads again. The warps that issue the
    product issue the epilogue after it, so its time is added; statistics are not counted.
    """
    rows, columns, group = tile
    weight_reads = -(-n // (rows * group))
    inputs = itemsize * (n * d + weight_reads * vocab * d)
    partial = 2 * 4 * quantities * n * -(-vocab // columns)
    stored, bare = EPILOGUE[True, softcap], EPILOGUE[False, softcap]
    epilogue = n * (kept * stored + (vocab - kept) * bare)
    return Work(2.0 * n * vocab * d, inputs + partial + itemsize * n * kept, kind, epilogue)


def reduce_sums(n: int, column_tiles: int, quantities: int = 1) -> Work:
    """The partial sums read once, a sum per row and quantity written; a flag and an anchor."""
    return Work(
        float(quantities * n * column_tiles), 4 * quantities * n * (column_tiles + 1) + 9 * n
    )


def nothing_reanchored(n: int, programs: int = 1) -> Work:
    """What ends where no row is flagged: each program has read `n` flags."""
    return Work(float(n * programs), n * programs)


def target_logits(n: int, d: int, itemsize: int) -> Work:
    """hidden, and a row of the weight for each label."""
    return Work(2.0 * n * d, 2 * itemsize * n * d)


def logits_logps(n: int, vocab: int, itemsize: int) -> Work:
    """Each logit read once."""
    return Work(10.0 * n * vocab, itemsize * n * vocab)


def logits_logps_backward(n: int, vocab: int, itemsize: int) -> Work:
    """Each logit read once, each gradient written once."""
    return Work(8.0 * n * vocab, 2 * itemsize * n * vocab)


def sequence_loss(n: int, sequences: int) -> Work:
    """Each log-probability read once; a few numbers, and the logarithms, per sequence.

    A bound only: one program does it all, and waits for memory more than anything else.
    """
    return Work(n + 50.0 * sequences, 4 * n + 24 * sequences)
