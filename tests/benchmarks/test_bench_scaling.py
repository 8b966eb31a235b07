"""The formulas of `benchmarks.scaling` against what real steps hand to their collectives, on CPU
processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import scaling
from benchmarks.scaling import Cluster, Step
from fastdpo.loss import linear_dpo_loss, linear_logps
from fastdpo.parallel import SequenceParallel, ShardedHead, VocabParallel, rows_move_less

ROOT = Path(__file__).parents[2]
N, S, D, V = 12, 4, 8, 32
FP32 = Step(D, V, rows=N, sequences=S, dtype_bytes=4)


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    pool = Processes(request.param, str(tmp_path_factory.mktemp("store") / "file"))
    yield pool, request.param
    pool.close()


class Counter(TorchDispatchMode):
    """Bytes sent in the collectives that run under it, by equations (1) to (3)."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            if name == "allgather_":
                ((parts,), _) = args[:2]
                self.gathered(parts)
            elif name == "_allgather_base_":
                self.sent += scaling.all_gather(size(args[0]), args[0].numel() // args[1].numel())
            elif name == "_reduce_scatter_base_":
                shares = args[1].numel() // args[0].numel()
                self.sent += scaling.reduce_scatter(size(args[1]), shares)
            elif name == "allreduce_":
                members = dist.ProcessGroup.unbox(args[1]).size()
                self.sent += sum(scaling.all_reduce(size(t), members) for t in args[0])
            else:
                raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))

    def gathered(self, parts):
        self.sent += scaling.all_gather(sum(map(size, parts)), len(parts))


def size(tensor):
    return tensor.numel() * tensor.element_size()


class Head(nn.Linear):
    """Calls the loss inside itself, where a wrapper has gathered the weight."""

    def __init__(self):
        super().__init__(D, V, bias=False)

    def forward(self, hidden, labels):
        return linear_logps(hidden, self.weight, labels)


def sent_by(step):
    warnings.simplefilter("ignore")  # gloo's, of its devices
    with Counter() as counter:
        step()
    return counter.sent


def check(processes, function, expected, *args):
    pool, _ = processes
    for sent in pool.run(function, *args):
        assert sent == pytest.approx(sum(t.sent for t in expected.traffic), rel=1e-12)
    assert sent > 0


# ---- Sharing data


def _ddp():
    model = nn.parallel.DistributedDataParallel(Head())
    hidden, labels = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    return sent_by(lambda: model(hidden, labels).sum().backward())


def test_ddp(processes):
    check(processes, _ddp, scaling.ddp(FP32, processes[1]))


def _fsdp(dtype, group_size, reference):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world = dist.get_world_size()
    if group_size == world:
        mesh = init_device_mesh("cpu", (world,))
    else:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (world // group_size, group_size), mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Not the default of a root, whose weight stays whole until its backward.
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    model, frozen = fully_shard(Head(), **options), fully_shard(Head(), **options)
    hidden, labels = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))

    def step():
        if reference:
            with torch.no_grad():
                frozen(hidden, labels)
        model(hidden, labels).sum().backward()

    return sent_by(step)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("replicas", [1, 2])
def test_fsdp(processes, dtype, replicas, reference):
    gpus = processes[1]
    if gpus // replicas == 1:
        pytest.skip("nothing is sharded over one process: the pool of four runs this")
    step = Step(D, V, rows=N, dtype_bytes=dtype.itemsize, reference=reference)
    expected = scaling.fsdp(step, gpus, gpus // replicas)
    check(processes, _fsdp, expected, dtype, gpus // replicas, reference)


def _rows(group_size, reference):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    if group_size == world:
        mesh, placements = init_device_mesh("cpu", (world,)), [Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (world // group_size, group_size))
        placements = [Replicate(), Shard(0)]
    weight = nn.Parameter(distribute_tensor(torch.randn(V, D), mesh, placements))
    head = ShardedHead.of(weight)
    hidden, ref_hidden, labels = batch(S, N // S)
    ref = {"ref_hidden": ref_hidden, "ref_weight": weight.detach()} if reference else {}

    def step():
        linear_dpo_loss(hidden, weight, labels, sharded_head=head, **ref).loss.backward()

    return sent_by(step)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_rows(processes, replicas, reference):
    gpus = processes[1]
    if gpus // replicas == 1:
        pytest.skip("nothing is sharded over one process: the pool of four runs this")
    step = Step(D, V, rows=N, sequences=S, dtype_bytes=4, reference=reference)
    expected = scaling.rows(step, gpus, gpus // replicas)
    check(processes, _rows, expected, gpus // replicas, reference)


# ---- Sharing a vocabulary or a sequence


def batch(sequences, length):
    hidden, ref_hidden = torch.randn(2, sequences, length, D)
    return hidden.requires_grad_(), ref_hidden, torch.randint(V, (sequences, length))


def _tensor(group_size, reference):
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [list(range(i, i + group_size)) for i in range(0, world, group_size)]
    tensor = [dist.new_group(members) for members in groups][rank // group_size]
    # Every process makes every group.
    columns = [dist.new_group(list(range(i, world, group_size))) for i in range(group_size)]
    shared = VocabParallel.of([V // group_size] * group_size, tensor)
    weight = nn.Parameter(torch.randn(V // group_size, D))
    count = group_size * N
    hidden, ref_hidden, labels = batch(S, count // S)
    ref = {"ref_hidden": ref_hidden, "ref_weight": weight.detach()} if reference else {}

    def step():
        linear_dpo_loss(hidden, weight, labels, vocab_parallel=shared, **ref).loss.backward()
        if group_size < world:  # what data parallelism does with a replicated shard
            dist.all_reduce(weight.grad, group=columns[rank % group_size])

    return sent_by(step)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_tensor(processes, replicas, reference):
    gpus = processes[1]
    if gpus // replicas == 1:
        pytest.skip("nothing is shared in one process: the pool of four runs this")
    step = Step(D, V, rows=N, dtype_bytes=4, reference=reference)
    expected = scaling.tensor(step, gpus, gpus // replicas)
    check(processes, _tensor, expected, gpus // replicas, reference)


def _sequence(reference):
    """The sums over processes happen inside an operator, which a dispatch mode does not see."""
    world = dist.get_world_size()
    hidden, ref_hidden, labels = batch(S * world, N // S)
    weight = nn.Parameter(torch.randn(V, D))
    ref = {"ref_hidden": ref_hidden, "ref_weight": weight.detach()} if reference else {}
    counter, all_gather = Counter(), dist.all_gather

    def counted(parts, value, group=None):
        counter.gathered(parts)
        return all_gather(parts, value, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counted)
        shared = SequenceParallel.over()
        linear_dpo_loss(hidden, weight, labels, sequence_parallel=shared, **ref).loss.backward()
    return counter.sent + sent_by(lambda: dist.all_reduce(weight.grad))


@pytest.mark.parametrize("reference", [True, False])
def test_sequence(processes, reference):
    gpus = processes[1]
    step = Step(D, V, rows=N, sequences=S, dtype_bytes=4, reference=reference)
    check(processes, _sequence, scaling.sequence(step, gpus, gpus), reference)


# ---- Formulas among themselves


@pytest.mark.parametrize("model", scaling.HEADS)
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("group", [2, 8, 64, 1024])
def test_below_the_crossover_rows_send_less(model, group, reference):
    def sent(strategy, count):
        step = Step(*scaling.HEADS[model], rows=count, reference=reference)
        return sum(t.sent for t in strategy(step, group, group).traffic)

    step = Step(*scaling.HEADS[model], reference=reference)
    count = scaling.crossover(step, group) / group
    assert sent(scaling.rows, 0.99 * count) < sent(scaling.fsdp, 0.99 * count)
    assert sent(scaling.rows, 1.01 * count) > sent(scaling.fsdp, 1.01 * count)
    width, vocab = scaling.HEADS[model]
    for factor in (0.99, 1.01):
        rows = int(factor * count * group)
        less = rows_move_less(rows, (vocab, width), group, reference=reference)
        assert less == (factor < 1)


def test_the_crossover_of_few_processes_is_a_quarter_more_rows_than_the_vocabulary():
    step = Step(1 << 20, 128_256)  # so wide that a row's numbers weigh nothing
    assert scaling.crossover(step, 2) == pytest.approx(1.25 * 128_256, rel=1e-3)


def test_one_gpu_sends_nothing_and_needs_the_same():
    steps = {"llama-3-8b": Step(*scaling.HEADS["llama-3-8b"])}
    found = scaling.estimates(steps, [1], Cluster(), 8)
    assert {e.sent_bytes for e in found} == {0}
    assert len({e.memory_bytes for e in found}) == len({e.one_by_one for e in found}) == 1
    # Four products of 2·N·D·V at the peak.
    assert found[0].one_by_one == pytest.approx(4 * 2 * 4096 * 4096 * 128_256 / 989.4e12)


def test_links():
    cluster = Cluster()
    assert cluster.bandwidth(8, 1) == 450e9  # a node
    assert cluster.bandwidth(16, 1) == 400e9  # two nodes, a ring for each of eight cards
    assert cluster.bandwidth(2, 8) == 50e9  # one GPU of each node
    assert cluster.bandwidth(4, 4) == 100e9  # two of them


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("rows should be positive", lambda: Step(D, V, rows=0)),
        ("nvlink should be positive", lambda: Cluster(nvlink=-1.0)),
        ("gpus should be powers of two", lambda: scaling.estimates({}, [3], Cluster(), 8)),
        ("shared should be powers", lambda: scaling.estimates({}, [2], Cluster(), 3)),
        ("gpus_per_node should", lambda: scaling.estimates({}, [2], Cluster(gpus_per_node=6), 8)),
    ],
)
def test_bad_input(message, make):
    with pytest.raises(ValueError, match=message):
        make()


# ---- The command


def command(*arguments):
    run = [sys.executable, "-m", "benchmarks.scaling", *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_json_has_what_the_table_shows():
    done = command("--json", "--models", "llama-3-8b", "--gpus", "1", "64", "--rows", "1024")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["inputs"]["steps"]["llama-3-8b"]["rows"] == 1024
    assert {r["gpus"] for r in found["results"]} == {1, 64}
    assert {r["strategy"] for r in found["results"]} >= set(scaling.DATA_PARALLEL)
    for r in found["results"]:
        both = r["compute_seconds"] + r["exchange_seconds"]
        assert r["one_by_one_seconds"] == pytest.approx(both)


def test_the_table():
    done = command("--gpus", "8", "--no-reference", "--efficiency", "0.5")
    assert done.returncode == 0, done.stderr
    assert "of which 50% is reached" in done.stdout
    assert "rows, by node" in done.stdout


def test_the_command_refuses_what_the_formulas_refuse():
    done = command("--gpus", "12")
    assert done.returncode == 2
    assert "gpus should be powers of two, got 12" in done.stderr


def test_the_page_is_current():
    """Renew it with: python -m benchmarks.scaling --write"""
    steps = {name: Step(*shape) for name, shape in scaling.HEADS.items()}
    expected = scaling.markdown(steps, list(scaling.GPUS), Cluster(), 8)
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert page.split(scaling.BEGIN)[1].split(scaling.END)[0].strip() == expected
