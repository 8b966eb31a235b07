"""An lm_head that stays sharded while rows travel: the values of one process with the whole of it,
each process's own gradients of hidden, and the mean over the processes of the weight's.
"""

from __future__ import annotations

import plain_model
import pytest
import torch
import torch.distributed as dist
from oracle import assert_as_accurate, eager_logps
from plain_model import BETA, STEPS, Model, assert_right, batch, mean, pairs_of, sgd, weights
from test_linear_logps import HEADS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastdpo.loss import linear_dpo_loss, linear_logps
from fastdpo.parallel import (
    DataParallel,
    ShardedHead,
    VocabParallel,
    batch_counts,
    rows_move_less,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


VOCAB, WIDTH = 301, 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows of each process; what of them carries loss is ragged too.
ROWS = {"ragged": (9, 21, 4, 12), "none here": (0, 17, 0, 3), "none": (0, 0, 0, 0)}
SOME_IGNORED = {"all ignored here": (7, 11, 2, 5)}


def tensors(dtype, rows, bias=False, alone=None):
    """hidden and labels of every process, and the whole head."""
    g = torch.Generator().manual_seed(3)
    hidden = [torch.randn(n, WIDTH, generator=g).to(dtype) for n in rows]
    labels = [torch.randint(VOCAB, (n,), generator=g) for n in rows]
    for value in labels:
        value[torch.rand(value.shape, generator=g) < 0.3] = -100
    if alone is not None:
        labels[alone][:] = -100
    weight = (0.3 * torch.randn(VOCAB, WIDTH, generator=g)).to(dtype)
    b = torch.randn(VOCAB, generator=g).to(dtype) if bias else None
    return hidden, labels, weight, b


def my_rows():
    size, rank = dist.get_world_size(), dist.get_rank()
    ends = [0, *(VOCAB * (r + 1) // size + 5 * (r + 1 < size) for r in range(size))]
    return slice(ends[rank], ends[rank + 1])


def upstream_of(labels, dtype):
    return torch.linspace(-1, 2, labels.numel(), dtype=dtype)


def logps_by(given, head, trained, **options):
    hidden, labels, weight, bias = given
    rank, mine = dist.get_rank(), my_rows()
    shard = ShardedHead.over(weight[mine])
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(flag)
        for t, flag in zip(
            (hidden[rank], weight[mine], None if bias is None else bias[mine]), trained, strict=True
        )
    ]
    logps = linear_logps(
        leaves[0], leaves[1], labels[rank], bias=leaves[2], sharded_head=shard, **head, **options
    )
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return logps.detach(), torch.autograd.grad(
        logps, wanted, upstream_of(labels[rank], logps.dtype)
    )


def check(pool, count, given, head=None, trained=(True, True, True), **options):
    hidden, labels, weight, bias = given
    head = head or {}
    found = pool.run(logps_by, given, head, trained, **options)

    def eager(dtype):
        """(logps, gradients) of every process's rows with the whole head; weight's are means."""
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_()
            for t in (torch.cat(hidden[:count]), weight, bias)
        ]
        logps = eager_logps(leaves[0], leaves[1], torch.cat(labels[:count]), leaves[2], **head)
        upstream = torch.cat([upstream_of(value, logps.dtype) for value in labels[:count]])
        grads = torch.autograd.grad(logps, [t for t in leaves if t is not None], upstream)
        return logps.detach(), [grads[0], *(g / count for g in grads[1:])]

    (base, base_grads), (exact, exact_grads) = eager(weight.dtype), eager(torch.float64)
    assert_as_accurate(torch.cat([f[0] for f in found]), base, exact, 2, "logps")
    kept = [i for i, flag in enumerate(trained) if flag and (i < 2 or bias is not None)]
    for i, parts in zip(kept, zip(*(f[1] for f in found), strict=True), strict=True):
        assert all(part.dtype == weight.dtype for part in parts)
        assert_as_accurate(torch.cat(parts), base_grads[i], exact_grads[i], 3, f"gradient {i}")
    return found


@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(processes, dtype, head, workspace):
    options = dict(HEADS[head])
    given = tensors(dtype, ROWS["ragged"], bias=options.pop("bias", False))
    check(processes, 2, given, options, workspace_bytes=workspace)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_frozen_parts(processes, dtype, trained):
    given = tensors(dtype, ROWS["ragged"], bias=True)
    check(processes, 2, given, {"softcap": 4.0}, trained)


@pytest.mark.parametrize("rows", [*ROWS, *SOME_IGNORED])
def test_four_processes_of_few_rows(four, rows):
    alone = 1 if rows in SOME_IGNORED else None
    given = tensors(torch.float32, {**ROWS, **SOME_IGNORED}[rows], bias=True, alone=alone)
    check(four, 4, given)


def statistics(given):
    hidden, labels, weight, _ = given
    rank, mine = dist.get_rank(), my_rows()
    stats = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
    leaves = [hidden[rank].clone().requires_grad_(), weight[mine].clone().requires_grad_()]
    shard = ShardedHead.over(leaves[1])
    found = linear_logps(*leaves, labels[rank], sharded_head=shard, stats=stats)
    grads = torch.autograd.grad(found.entropy.sum(), leaves)
    plain = [hidden[rank].clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = linear_logps(*plain, labels[rank], stats=stats)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    wanted = list(torch.autograd.grad(expected.entropy.sum(), plain))
    dist.all_reduce(wanted[1])
    torch.testing.assert_close(grads[0], wanted[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[1], wanted[1][mine] / 2, atol=1e-5, rtol=1e-4)


def test_statistics(processes):
    processes.run(statistics, tensors(torch.float32, ROWS["ragged"]))


def autocast(given):
    hidden, labels, weight, _ = given
    rank, mine = dist.get_rank(), my_rows()
    leaves = [hidden[rank].clone().requires_grad_(), weight[mine].clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        shard = ShardedHead.over(leaves[1])
        found = linear_logps(*leaves, labels[rank], sharded_head=shard)
        expected = linear_logps(hidden[rank], weight, labels[rank])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(found.sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_autocast(processes):
    processes.run(autocast, tensors(torch.float32, ROWS["ragged"]))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_equal_weights_give_ln_2_to_the_bit(processes, dtype):
    assert all(processes.run(loss_at_initialisation, dtype))


def loss_at_initialisation(dtype):
    pairs = dist.get_rank() + 1
    _, _, weight, _ = tensors(dtype, ROWS["none"])
    hidden = torch.randn(2 * pairs, 5, WIDTH).to(dtype)
    labels = torch.randint(VOCAB, (2 * pairs, 5))
    rows = weight[my_rows()].clone().requires_grad_()
    out = linear_dpo_loss(
        hidden.requires_grad_(), rows, labels, ref_hidden=hidden.detach(),
        ref_weight=rows.detach(), sharded_head=ShardedHead.over(rows),
    )  # fmt: skip
    out.loss.backward()
    return out.loss.item() == torch.tensor(2.0).log().item() and not out.chosen_rewards.any()


# ---- Trained under fully_shard


def trained(objective="sigmoid", hsdp=False, compiled=False, reference=False):
    rank, world = dist.get_rank(), dist.get_world_size()
    shape, names = ((2, world // 2), ("replicate", "shard")) if hsdp else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model, data = Model(bias=True), DataParallel.over()
    model._skip_lm_head = True
    for layer in (*model.layers, model.lm_head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    head = ShardedHead.of(model.lm_head.weight)
    first = [t.detach().clone() for t in (model.lm_head.weight, model.lm_head.bias)]

    def loss_of(hidden, given, counts):
        ref = {"ref_logps": given["ref"]}
        if reference:
            ref = {"ref_hidden": hidden.detach(), "ref_weight": first[0], "ref_bias": first[1]}
        return linear_dpo_loss(
            hidden, model.lm_head.weight, given["labels"], bias=model.lm_head.bias, beta=BETA,
            sharded_head=head, objective=objective, data_parallel=data, **ref, **counts,
        )  # fmt: skip

    if compiled:
        torch._dynamo.reset()
        loss_of = torch.compile(loss_of, backend="eager")
    optimizer, losses = sgd(model), []
    cuts = [(0, 1), (1, 4)] if world == 2 else [(0, 1), (1, 2), (2, 2), (2, 4)]
    for step in range(STEPS):
        given = pairs_of(batch(step), *cuts[rank])
        out = loss_of(model(given["ids"]), given, batch_counts([given["labels"]], data))
        out.loss.backward()
        assert isinstance(model.lm_head.weight, DTensor)  # it was gathered at no time
        assert model.lm_head.weight.grad.placements == model.lm_head.weight.placements
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.detach())
    return mean(losses), weights(model)


def with_bias():
    return Model(bias=True)


def with_sft(logits, given):
    chosen = given["labels"].chunk(2)[0]
    nll = -plain_model.eager_logps(logits.chunk(2)[0], chosen).sum() / (chosen != -100).sum()
    return plain_model.eager_loss(logits, given) + nll


CASES = {"sigmoid": {}, "mpo": {"objective": ("sigmoid", "sft")}, "compiled": {"compiled": True}}


@pytest.mark.parametrize("case", CASES)
def test_fully_shard(processes, case):
    expected = plain_model.expected(with_bias, with_sft if case == "mpo" else None)
    assert_right(processes.run(trained, **CASES[case]), expected)


def test_replicas(four):
    """Two processes share the head; its gradient is averaged over the two pairs of them too."""
    assert_right(four.run(trained, hsdp=True), plain_model.expected(with_bias))


def test_uneven_shares_of_four(four):
    assert_right(four.run(trained), plain_model.expected(with_bias))


def test_a_reference_by_its_hidden_states(processes):
    found = processes.run(trained, reference=True)
    assert found[0][0][0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


# ---- Which to choose, and bad input


def test_rows_move_less():
    shape = (128_256, 4096)
    assert rows_move_less(0, shape, 8)
    assert rows_move_less(128_256, shape, 8)
    assert not rows_move_less(2 * 128_256, shape, 8)
    assert not rows_move_less(128_256, shape, 1024)  # a row's numbers, from so many processes
    assert rows_move_less(165_000, shape, 8, reference=False)
    assert not rows_move_less(165_000, shape, 8)
    for message, call in (
        ("rows should be an int >= 0", lambda: rows_move_less(-1, shape, 8)),
        ("processes should be an int >= 1", lambda: rows_move_less(1, shape, 0)),
        ("dtype_bytes should be an int", lambda: rows_move_less(1, shape, 8, dtype_bytes=2.0)),
        ("shape should be two positive", lambda: rows_move_less(1, (5,), 8)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def refusals(given):
    hidden, labels, weight, bias = given
    hidden, labels, mine = hidden[dist.get_rank()], labels[dist.get_rank()], my_rows()
    rows = weight[mine]
    head, mesh = ShardedHead.over(rows), init_device_mesh("cpu", (2,))
    names = ("replicate", "shard")
    deep = init_device_mesh("cpu", (1, 2), mesh_dim_names=names)

    def place(t, *placements, on=mesh):
        return distribute_tensor(t, on, list(placements))

    for message, call in (
        ("sharded_head should be a fastdpo.parallel.ShardedHead", lambda: linear_logps(
            hidden, rows, labels, sharded_head=dist.group.WORLD)),
        ("sharded_head should be None with vocab_parallel", lambda: linear_logps(
            hidden, rows, labels, sharded_head=head, vocab_parallel=VocabParallel.over(rows))),
        (r"weight should be of shape \[\d+, D\] as sharded_head says", lambda: linear_logps(
            hidden, weight, labels, sharded_head=head)),
        ("bias should be of shape", lambda: linear_logps(
            hidden, rows, labels, bias=bias, sharded_head=head)),
        ("weight should be spread as sharded_head says", lambda: linear_logps(
            hidden, place(weight, Shard(1)), labels, sharded_head=head)),
        ("weight should be spread as sharded_head says", lambda: linear_logps(
            hidden, place(weight[:100], Shard(0)), labels, sharded_head=head)),
        ("hidden should be a plain tensor, this process's own", lambda: linear_logps(
            place(hidden, Replicate()), rows, labels, sharded_head=head)),
        (r"labels should be in \[0, 301\)", lambda: linear_logps(
            hidden, rows, labels + 301, sharded_head=head)),
        ("weight should be a DTensor", lambda: ShardedHead.of(rows)),
        (r"weight should be placed Shard\(0\)", lambda: ShardedHead.of(place(weight, Shard(1)))),
        (r"weight should be placed Shard\(0\)", lambda: ShardedHead.of(
            place(weight, Shard(0), Shard(0), on=deep))),
        ("weight should be sharded so that each", lambda: ShardedHead.of(
            place(weight[:1], Shard(0)))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_input(processes):
    processes.run(refusals, tensors(torch.float32, (9, 9), bias=True))
    with pytest.raises(ValueError, match=r"torch\.distributed"):
        ShardedHead.over(torch.ones(3, 2))
