"""What each primitive must move and multiply at least, and the time an H200 would take for it.

A model, not a measurement: the larger of operations over the rate of the products and bytes over
the bandwidth of a copy. Traffic between L2 and the processors, launches and the ends of loops are
not in it. The rates of bf16 and of a copy are what an H200 was seen to reach; fp32 rates are the
data sheet's.
"""

from __future__ import annotations

from typing import NamedTuple

H200 = "H200: 790 TFLOP/s bf16, 4.3 TB/s"
RATES = {"half": 790e12, "tf32": 395e12, "ieee": 60e12}  # operations per second
BANDWIDTH = 4.3e12  # bytes per second


class Work(NamedTuple):
    operations: float
    bytes: float
    kind: str = "ieee"  # how it multiplies: a key of RATES

    @property
    def seconds(self) -> float:
        return max(self.operations / RATES[self.kind], self.bytes / BANDWIDTH)

    @property
    def bound(self) -> str:
        products = self.operations / RATES[self.kind] > self.bytes / BANDWIDTH
        return "products" if products else "bytes"


def exp_logits(
    n: int,
    vocab: int,
    d: int,
    itemsize: int,
    kind: str,
    kept: int = 0,
    quantities: int = 1,
    tile: tuple[int, int, int] = (128, 256, 16),
) -> Work:
    """`kept` columns of E, `quantities` sums per row; tile: rows, columns, row tiles in a group.

    A group of row tiles stays in L2 and reads the weight once; each vocabulary tile writes one
    fp32 number per row and quantity, which the reduction reads again.
    """
    rows, columns, group = tile
    weight_reads = -(-n // (rows * group))
    inputs = itemsize * (n * d + weight_reads * vocab * d)
    partial = 2 * 4 * quantities * n * -(-vocab // columns)
    return Work(2.0 * n * vocab * d, inputs + partial + itemsize * n * kept, kind)


def target_logits(n: int, d: int, itemsize: int) -> Work:
    """hidden, and a row of the weight for each label."""
    return Work(2.0 * n * d, 2 * itemsize * n * d)


def logits_logps(n: int, vocab: int, itemsize: int) -> Work:
    """Each logit read once."""
    return Work(6.0 * n * vocab, itemsize * n * vocab)


def logits_logps_backward(n: int, vocab: int, itemsize: int) -> Work:
    """Each logit read once, each gradient written once."""
    return Work(6.0 * n * vocab, 2 * itemsize * n * vocab)


def sequence_loss(n: int, sequences: int) -> Work:
    """Each log-probability read once; a few numbers per sequence."""
    return Work(n, 4 * n + 24 * sequences)
