"""python -m benchmarks.scaling: bytes, time and memory of an lm_head and its loss over many GPUs.

On paper: no GPU is asked. One DPO step of the head on P processes, each of which has N rows that
carry loss: the policy's forward and backward (three products of the size N × V × D) and the
reference's forward (one). V vocabulary entries, D hidden size, b bytes of an element of hidden
states and weights, b_r bytes of an element of a gradient that is summed over processes, S sequences
of a process. fastdpo adds up in 4 bytes.

What a process sends for a tensor of X bytes in all, around a ring of p processes:

    (1)  all-gather       X · (p − 1)/p
    (2)  reduce-scatter   X · (p − 1)/p
    (3)  all-reduce       2 · X · (p − 1)/p            a reduce-scatter, then an all-gather

Where every process holds Y bytes that all of them get, X = p · Y in (1). In these terms a step
sends (tests/benchmarks/test_bench_scaling.py counts what the collectives are given):

    ddp       The head is whole everywhere; its gradient is all-reduced.
              (3) of V·D·b_r
    fsdp      The head is sharded over G processes, and gathered for the policy's forward, its
              backward, and the reference's forward; the gradient is reduce-scattered.
              3 × (1) of V·D·b,  (2) of V·D·b_r
    rows      The head is sharded over G processes, and stays so (`fastdpo.parallel.ShardedHead`).
              The M = G·N rows travel: hidden states of policy and reference and the labels (8
              bytes) are gathered, and how many each process has (8 bytes), the vocabulary is
              shared as below, each process takes the log-probabilities of its own rows, whose
              gradients (4 bytes) are gathered; those of hidden are reduce-scattered.
              2 × (1) of M·D·b,  (1) of 12·M + 8·G,  (2) of 4·M·D,  numbers of M rows
    tensor    V/T entries of the vocabulary in each of T processes, which have the same M = T·N
              rows (`fastdpo.VocabParallel`); the gradient of hidden is all-reduced.
              (3) of 4·M·D,  numbers of M rows
    sequence  The head is whole everywhere, its gradient all-reduced as in ddp; C processes hold
              parts of the same C·S sequences (`fastdpo.SequenceParallel`), whose lengths (8 bytes)
              and log-probabilities under both models (4 each) are gathered from each of them.
              (3) of V·D·b_r,  (1) of C · 16·C·S

Numbers of M rows, for the policy and again for the reference: the label's logit, an anchor and a
sum, 4 bytes each, gathered from each of G processes, so that all add them up in one order: (1) of
G · 12·M. Where G or T is less than P, there are P/G replicas of a shard, and its gradient is
all-reduced over them: (3) of V·D·b_r / G. Without a reference, its terms are left out.

So, over the same G, rows send less than the weight while

    (4)  M < V·D·(3b + b_r) / (D·(2b + 4) + 12 + 24·G)

(but for 8·G bytes), which is 1.25 V for b = 2, b_r = 4 and few processes; from G ≈ D/3 on the
numbers of a row weigh as much as its hidden states.

Time is that of the products at the peak rate of the vendor's sheet, and of the bytes at the rate of
its links; "overlapped" is the longer of the two, "one by one" their sum. Between nodes a ring for
each network card runs through all GPUs of a node, so that a group with m members in a node sends at
min(NVLink, m · network). Real kernels and networks reach a part of both: `--efficiency` scales the
products. Not in it: latency, the backbone, the optimizer, other traffic at the same time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"

# NVIDIA, "H100 Tensor Core GPU" data sheet, SXM5: 900 GB/s NVLink per GPU, both directions
# together; 1,979 TFLOP/s bf16 with sparsity, 989.4 dense. NVIDIA, "ConnectX-7" data sheet: NDR
# InfiniBand, 400 Gb/s a port; one card for each GPU of a DGX H100.
NVLINK, NETWORK, TFLOPS, GPUS_PER_NODE = 450.0, 50.0, 989.4, 8
# Meta, Llama 3 model cards and configurations.
HEADS = {"llama-3-8b": (4096, 128_256), "llama-3-70b": (8192, 128_256)}
GPUS = (1, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Cluster:
    """What the vendor says of a GPU and of its links, each way."""

    nvlink: float = NVLINK  # GB/s of a GPU, inside a node
    network: float = NETWORK  # GB/s of a GPU, between nodes
    tflops: float = TFLOPS  # of dense 16-bit products
    gpus_per_node: int = GPUS_PER_NODE
    efficiency: float = 1.0  # the part of `tflops` that the products reach

    def __post_init__(self) -> None:
        _positive(self)

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes per second that a process of a group sends; members are `stride` GPUs apart."""
        if (size - 1) * stride < self.gpus_per_node:
            return self.nvlink * 1e9
        members = max(1, self.gpus_per_node // stride)
        across = members * self.network * 1e9
        return across if members == 1 else min(self.nvlink * 1e9, across)


@dataclass(frozen=True)
class Step:
    """One step of the head of one model, on each process."""

    hidden_size: int  # D
    vocab_size: int  # V
    rows: int = 4096  # N, that carry loss
    sequences: int = 16  # S
    dtype_bytes: int = 2  # b
    reduce_bytes: int = 4  # b_r
    reference: bool = True

    def __post_init__(self) -> None:
        _positive(self)

    @property
    def models(self) -> int:
        return 1 + self.reference

    @property
    def elements(self) -> int:  # of the weight
        return self.vocab_size * self.hidden_size

    @property
    def gathers(self) -> int:  # of a weight that is gathered: forward, backward; reference
        return 2 + self.reference

    @property
    def flops(self) -> float:
        return (3 + self.reference) * 2.0 * self.rows * self.elements


def _positive(values: Cluster | Step) -> None:
    for name, value in asdict(values).items():
        if name != "reference" and not value > 0:
            raise ValueError(f"{name} should be positive, got {value!r}")


def all_gather(total: float, size: int) -> float:
    return total * (size - 1) / size


reduce_scatter = all_gather


def all_reduce(total: float, size: int) -> float:
    return 2 * all_gather(total, size)


class Traffic(NamedTuple):
    sent: float  # bytes, by each process
    size: int  # of the group
    stride: int  # GPUs between its members


class Plan(NamedTuple):
    """What a strategy exchanges, and what lies on a GPU."""

    traffic: list[Traffic]
    # Bytes of weights and rows of policy and reference, and of their gradients, as far as they lie
    # there at one time; without the optimizer's states and fastdpo's workspace.
    memory: float


def numbers(rows: float, step: Step, size: int) -> float:
    """Sent for the rows' numbers under a shared vocabulary."""
    return step.models * all_gather(size * 12 * rows, size)


def replicas(step: Step, gpus: int, size: int) -> list[Traffic]:
    """The gradient of a shard over those that hold the same one."""
    count = gpus // size
    if count == 1:
        return []
    return [Traffic(all_reduce(step.elements * step.reduce_bytes / size, count), count, size)]


def memory(step: Step, size: int, count: int) -> float:
    """A shard of `size`, and `count` rows of hidden states; with their gradients."""
    shard = step.elements * (step.models * step.dtype_bytes + step.reduce_bytes) / size
    return shard + count * step.hidden_size * (step.models * step.dtype_bytes + 4)


def ddp(step: Step, gpus: int) -> Plan:
    return Plan(replicas(step, gpus, 1), memory(step, 1, step.rows))


def fsdp(step: Step, gpus: int, size: int) -> Plan:
    """Memory: beside its shard a process has one weight whole, and its gradient before that is
    scattered.
    """
    weight, grad = step.elements * step.dtype_bytes, step.elements * step.reduce_bytes
    sent = step.gathers * all_gather(weight, size) + reduce_scatter(grad, size)
    traffic = [Traffic(sent, size, 1), *replicas(step, gpus, size)]
    whole = 0 if size == 1 else weight + grad
    return Plan(traffic, memory(step, size, step.rows) + whole)


def rows(step: Step, gpus: int, size: int) -> Plan:
    count = size * step.rows
    sent = (
        step.models * all_gather(count * step.hidden_size * step.dtype_bytes, size)
        + all_gather(12 * count + 8 * size, size)
        + reduce_scatter(4 * count * step.hidden_size, size)
        + numbers(count, step, size)
    )
    traffic = [Traffic(sent, size, 1), *replicas(step, gpus, size)]
    return Plan(traffic, memory(step, size, count))


def tensor(step: Step, gpus: int, size: int) -> Plan:
    count = size * step.rows
    sent = all_reduce(4 * count * step.hidden_size, size) + numbers(count, step, size)
    traffic = [Traffic(sent, size, 1), *replicas(step, gpus, size)]
    return Plan(traffic, memory(step, size, count))


def sequence(step: Step, gpus: int, size: int) -> Plan:
    count = size * step.sequences
    sent = all_gather(size * (8 + 4 * step.models) * count, size)
    traffic = [Traffic(sent, size, 1), *replicas(step, gpus, 1)]
    return Plan(traffic, memory(step, 1, step.rows))


def crossover(step: Step, size: int) -> float:
    """Equation (4): the rows of a group below which they send less than the weight."""
    b, models = step.dtype_bytes, step.models
    weight = step.elements * (step.gathers * b + step.reduce_bytes)
    return weight / (step.hidden_size * (models * b + 4) + 12 + 12 * models * size)


Strategy = Callable[[Step, int], Plan]


def strategies(cluster: Cluster, shared: int) -> dict[str, Strategy]:
    """By name; `shared` processes share a vocabulary or a sequence."""

    def node(gpus: int) -> int:
        return min(gpus, cluster.gpus_per_node)

    return {
        "ddp": ddp,
        "fsdp": lambda s, p: fsdp(s, p, p),
        "fsdp, by node": lambda s, p: fsdp(s, p, node(p)),
        "rows": lambda s, p: rows(s, p, p),
        "rows, by node": lambda s, p: rows(s, p, node(p)),
        f"tensor {shared}": lambda s, p: tensor(s, p, min(p, shared)),
        f"sequence {shared}": lambda s, p: sequence(s, p, min(p, shared)),
    }


DATA_PARALLEL = ("ddp", "fsdp", "fsdp, by node", "rows", "rows, by node")


@dataclass(frozen=True)
class Estimate:
    model: str
    strategy: str
    gpus: int
    sent_bytes: float  # by each process
    memory_bytes: float
    compute_seconds: float
    exchange_seconds: float

    @property
    def overlapped(self) -> float:
        return max(self.compute_seconds, self.exchange_seconds)

    @property
    def one_by_one(self) -> float:
        return self.compute_seconds + self.exchange_seconds


def estimate(
    model: str, name: str, strategy: Strategy, step: Step, gpus: int, cluster: Cluster
) -> Estimate:
    traffic, needed = strategy(step, gpus)
    return Estimate(
        model,
        name,
        gpus,
        sum(t.sent for t in traffic),
        needed,
        step.flops / (cluster.tflops * 1e12 * cluster.efficiency),
        sum(t.sent / cluster.bandwidth(t.size, t.stride) for t in traffic),
    )


def estimates(
    steps: dict[str, Step], gpus: list[int], cluster: Cluster, shared: int
) -> list[Estimate]:
    """
    Raises:
        ValueError: a number of GPUs is not a power of two.
    """
    counts = (("gpus", gpus), ("shared", [shared]), ("gpus_per_node", [cluster.gpus_per_node]))
    for name, values in counts:
        for value in values:
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} should be powers of two, got {value}")
    return [
        estimate(model, name, strategy, step, count, cluster)
        for model, step in steps.items()
        for name, strategy in strategies(cluster, shared).items()
        for count in gpus
    ]


# ---- Output


class Grid(NamedTuple):
    title: str
    head: list[str]
    body: list[list[str]]


def grids(steps: dict[str, Step], gpus: list[int], found: list[Estimate]) -> Iterator[Grid]:
    columns = ["", *(f"{count:,} GPU{'s' * (count > 1)}" for count in gpus)]
    quantities = (
        ("bytes that a GPU sends", lambda e: _bytes(e.sent_bytes)),
        (
            "time of a step, ms: overlapped / one by one",
            lambda e: f"{_ms(e.overlapped)} / {_ms(e.one_by_one)}",
        ),
        ("memory of a GPU", lambda e: _bytes(e.memory_bytes)),
    )
    for model, step in steps.items():
        of_model = [e for e in found if e.model == model]
        by_name = {name: [e for e in of_model if e.strategy == name] for name in _names(of_model)}
        shape = f"{model}, D {step.hidden_size:,}, V {step.vocab_size:,}"
        for title, cell in quantities:
            body = [[name, *map(cell, row)] for name, row in by_name.items()]
            yield Grid(f"{shape}: {title}", columns, body)
        body = [
            ["least time, one by one", *(_least(of_model, p, "one_by_one") for p in gpus)],
            ["least memory", *(_least(of_model, p, "memory_bytes") for p in gpus)],
            ["rows send less below, rows a GPU", *(_below(step, p) for p in gpus)],
        ]
        yield Grid(f"{shape}: which to choose", columns, body)


def _names(found: list[Estimate]) -> list[str]:
    return list(dict.fromkeys(e.strategy for e in found))


def _least(found: list[Estimate], gpus: int, quantity: str) -> str:
    """Of those that only share data; "any" where nothing is exchanged."""
    there = [e for e in found if e.gpus == gpus and e.strategy in DATA_PARALLEL]
    best = min(getattr(e, quantity) for e in there)
    names = [e.strategy for e in there if getattr(e, quantity) <= best * 1.01]
    return "any" if len(names) == len(DATA_PARALLEL) else " or ".join(names)


def _below(step: Step, gpus: int) -> str:
    return "–" if gpus == 1 else f"{crossover(step, gpus) / gpus:,.0f}"


def _bytes(count: float) -> str:
    if count == 0:
        return "0"
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if count >= s)
    return f"{count / size:.3g} {unit}" if count < 1e12 else f"{count / 1e9:,.0f} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def assumed(step: Step, cluster: Cluster) -> str:
    reached = "" if cluster.efficiency == 1 else f", of which {cluster.efficiency:.0%} is reached"
    return (
        f"On paper: {step.rows:,} rows with loss and {step.sequences} sequences a GPU, "
        f"{step.dtype_bytes} bytes an element, gradients summed in {step.reduce_bytes}, "
        f"{'with' if step.reference else 'without'} a reference; {cluster.tflops:g} TFLOP/s"
        f"{reached}, {cluster.nvlink:g} GB/s NVLink and {cluster.network:g} GB/s network each way, "
        f"{cluster.gpus_per_node} GPUs a node."
    )


def markdown(steps: dict[str, Step], gpus: list[int], cluster: Cluster, shared: int) -> str:
    found = estimates(steps, gpus, cluster, shared)
    parts = [assumed(next(iter(steps.values())), cluster)]
    for title, head, body in grids(steps, gpus, found):
        rule = ["---", *("---:" for _ in head[1:])]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
        parts += [f"**{title}**", "\n".join(lines)]
    return "\n\n".join(parts)


def as_json(steps: dict[str, Step], gpus: list[int], cluster: Cluster, shared: int) -> str:
    results: list[dict[str, Any]] = [
        {**asdict(e), "overlapped_seconds": e.overlapped, "one_by_one_seconds": e.one_by_one}
        for e in estimates(steps, gpus, cluster, shared)
    ]
    inputs = {
        "cluster": asdict(cluster),
        "steps": {model: asdict(step) for model, step in steps.items()},
        "shared": shared,
    }
    return json.dumps({"inputs": inputs, "results": results}, indent=1)


def show(steps: dict[str, Step], gpus: list[int], cluster: Cluster, shared: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(assumed(next(iter(steps.values())), cluster))
    for title, head, body in grids(steps, gpus, estimates(steps, gpus, cluster, shared)):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left")
        for row in body:
            table.add_row(*row)
        console.print(table)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0]
    )
    defaults = {f.name: f.default for f in (*fields(Step), *fields(Cluster))}
    made.add_argument("--models", nargs="+", choices=HEADS, default=list(HEADS))
    made.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="powers of two")
    made.add_argument("--shared", type=int, default=8, help="processes of tensor and sequence")
    for name, kind, help_text in (
        ("rows", int, "a GPU, that carry loss"),
        ("sequences", int, "a GPU"),
        ("dtype-bytes", int, "of an element of weights and hidden states"),
        ("reduce-bytes", int, "of an element of a gradient that is summed over processes"),
        ("nvlink", float, "GB/s of a GPU each way; NVIDIA's data sheet of the H100 SXM5"),
        ("network", float, "GB/s of a GPU each way; NDR InfiniBand, 400 Gb/s (ConnectX-7)"),
        ("tflops", float, "dense bf16; NVIDIA's data sheet of the H100 SXM5"),
        ("gpus-per-node", int, "with a network card each"),
        ("efficiency", float, "the part of tflops that the products reach"),
    ):
        default = defaults[name.replace("-", "_")]
        made.add_argument(
            f"--{name}", type=kind, default=default, help=f"{help_text} (%(default)s)"
        )
    made.add_argument("--no-reference", dest="reference", action="store_false")
    action = made.add_mutually_exclusive_group()
    action.add_argument("--json", action="store_true", help="print JSON")
    action.add_argument("--markdown", action="store_true", help="print Markdown")
    action.add_argument("--write", action="store_true", help=f"put it into docs/{PAGE.name}")
    return made


def main() -> None:
    args = parser().parse_args()
    given = vars(args)
    try:
        cluster = Cluster(**{f.name: given[f.name] for f in fields(Cluster)})
        shared_by_all = {f.name: given[f.name] for f in fields(Step) if f.name in given}
        steps = {name: Step(*HEADS[name], **shared_by_all) for name in args.models}
        chosen = (steps, args.gpus, cluster, args.shared)
        estimates(*chosen)
    except ValueError as error:
        parser().error(str(error))
    if args.json:
        print(as_json(*chosen))
    elif args.markdown:
        print(markdown(*chosen))
    elif args.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        whole = f"{before}{BEGIN}\n{markdown(*chosen)}\n{END}{rest.split(END)[1]}"
        PAGE.write_text(whole, encoding="utf-8")
    else:
        show(*chosen)


if __name__ == "__main__":
    main()
