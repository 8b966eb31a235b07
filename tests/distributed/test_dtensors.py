"""Hidden states and heads that are DTensors: the values and the gradients of one process, placed as
their tensors are; and what is ambiguous is refused.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_linear_dpo_loss import batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fastdpo.loss import (
    FusedLinearDPOLoss,
    get_batch_logps,
    linear_dpo_loss,
    linear_logps,
    logits_dpo_loss,
)
from fastdpo.parallel import VocabParallel, call_head

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def place(tensor, placement, mesh):
    leaf = tensor.detach().clone()
    return distribute_tensor(leaf, mesh, [placement]).requires_grad_(tensor.is_floating_point())


def whole(value):
    assert isinstance(value, DTensor)
    assert value.placements == (Replicate(),)
    return value.to_local().detach()


def logps_by(shard, labels_too, tensors, bias):
    hidden, weight, labels, *_ = tensors
    mesh, placement = mesh_of_all(), Shard(0) if shard else Replicate()
    h, w = place(hidden, Replicate(), mesh), place(weight, placement, mesh)
    b = place(bias, placement, mesh)
    if labels_too:
        labels = place(labels, Replicate(), mesh)
    found = linear_logps(h, w, labels, bias=b, stats=("entropy", "is_top1"), softcap=4.0)
    assert found.log_sum_sq_probs is None
    upstream = torch.linspace(-1, 2, hidden.shape[0] * hidden.shape[1]).view(hidden.shape[:2])
    total = (found.logps * place(upstream, Replicate(), mesh).detach()).sum()
    (total + 0.3 * found.entropy.sum()).backward()
    for t, p in ((h, Replicate()), (w, placement), (b, placement)):
        assert t.grad.placements == (p,)
    values = [whole(found.logps), whole(found.entropy), whole(found.is_top1)]
    return values, [t.grad.full_tensor() for t in (h, w, b)]


def plain_logps(tensors, bias):
    hidden, weight, labels, *_ = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    found = linear_logps(
        leaves[0], leaves[1], labels, bias=leaves[2], stats=("entropy", "is_top1"), softcap=4.0
    )
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    total = (found.logps * upstream).sum() + 0.3 * found.entropy.sum()
    return (found.logps, found.entropy, found.is_top1), torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("labels_too", [False, True], ids=["plain labels", "labels"])
@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "replicated"])
def test_log_probabilities(three, shard, labels_too):
    tensors = [t.detach() for t in batch()]
    bias = torch.randn(tensors[1].shape[0])
    values, grads = plain_logps(tensors, bias)
    for found, found_grads in three.run(logps_by, shard, labels_too, tensors, bias):
        for a, b in zip((*found, *found_grads), (*values, *grads), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=2e-5, rtol=1e-5)


def loss_by(shard, tensors, options, compiled=False):
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    mesh, placement = mesh_of_all(), Shard(0) if shard else Replicate()
    h, w = place(hidden, Replicate(), mesh), place(weight, placement, mesh)
    ref = {}
    if options.get("objective") != "simpo":
        ref["ref_hidden"] = place(ref_hidden, Replicate(), mesh).detach()
        ref["ref_weight"] = place(ref_weight, placement, mesh).detach()

    def step(h, w):
        return linear_dpo_loss(h, w, labels, **ref, **options)

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, backend="aot_eager")
    out = step(h, w)
    out.loss.backward()
    assert h.grad.placements == (Replicate(),)
    assert w.grad.placements == (placement,)
    return [whole(value) for value in out], [h.grad.full_tensor(), w.grad.full_tensor()]


OPTIONS = [{}, {"objective": "simpo"}, {"objective": ("sigmoid", "sft"), "average_log_prob": True}]


@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss(three, options, shard):
    check_loss(three, options, shard)


def test_the_loss_compiled(three):
    check_loss(three, {}, True, compiled=True)


def check_loss(three, options, shard, **how):
    tensors = [t.detach() for t in batch()]
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    given = {} if options.get("objective") == "simpo" else ref
    expected = linear_dpo_loss(*leaves, labels, **given, **options)
    grads = torch.autograd.grad(expected.loss, leaves)
    for found, found_grads in three.run(loss_by, shard, tensors, options, **how):
        for a, b in zip((*found, *found_grads), (*expected, *grads), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=2e-5, rtol=1e-5)


def equal_weights():
    hidden, weight, labels, *_ = (t.detach() for t in batch(torch.bfloat16))
    mesh = mesh_of_all()
    h, w = place(hidden, Replicate(), mesh), place(weight, Shard(0), mesh)
    out = linear_dpo_loss(h, w, labels, ref_hidden=h.detach())  # the policy's head
    return whole(out.loss).item() == torch.tensor(2.0).log().item()


def test_equal_weights_give_ln_2_to_the_bit(three):
    assert all(three.run(equal_weights))


def liger(tensors, shard):
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    bias = torch.linspace(-1, 1, weight.shape[0])
    module = FusedLinearDPOLoss(compute_nll_loss=True)
    plain = module(weight, hidden, labels, bias, ref_hidden, ref_weight, bias)
    mesh, placement = mesh_of_all(), Shard(0) if shard else Replicate()
    w, b, rw = (place(t, placement, mesh) for t in (weight, bias, ref_weight))
    h, rh = (place(t, Replicate(), mesh) for t in (hidden, ref_hidden))
    loss, others = module(w, h, labels, b, rh, rw, b.detach())
    for a, b in zip((loss, *others), (plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), atol=2e-5, rtol=1e-5)
    loss.backward()
    assert w.grad.placements == (placement,)
    with pytest.raises(
        ValueError, match="lin_weight should be whole where hidden states are plain"
    ):
        module(w, hidden, labels, None, ref_hidden, ref_weight)


@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "replicated"])
def test_ligers_module(three, shard):
    three.run(liger, [t.detach() for t in batch()], shard)


# ---- Tensor parallelism's own hooks, and the ways out of what is ambiguous


def colwise(tensors):
    hidden, weight, labels, *_ = tensors
    head = nn.Linear(*reversed(weight.shape), bias=False)
    head.weight.data.copy_(weight)
    head = parallelize_module(head, mesh_of_all(), ColwiseParallel(output_layouts=Shard(-1)))
    leaf = hidden.clone().requires_grad_()
    count = len(head._forward_hooks)
    logps = call_head(head, lambda h, w, b: linear_logps(h, w, labels, bias=b), leaf)
    whole(logps)
    assert len(head._forward_hooks) == count > 0  # the layout of logits is back
    logps.sum().backward()
    return logps.to_local().detach(), leaf.grad, head.weight.grad.full_tensor()


def test_a_head_of_tensor_parallelism(three):
    tensors = [t.detach() for t in batch()]
    hidden, weight, labels, *_ = tensors
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logps = linear_logps(*leaves, labels)
    grads = torch.autograd.grad(logps.sum(), leaves)
    for found in three.run(colwise, tensors):
        for a, b in zip(found, (logps.detach(), *grads), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def ways_out(tensors):
    """Data parallelism: each process has other pairs. The gradients are fully_shard's means."""
    hidden, weight, labels, *_ = tensors
    rank, mesh = dist.get_rank(), mesh_of_all()
    hidden = hidden + rank
    found = []
    for way in ("full tensor", "call_head"):
        head = nn.Linear(*reversed(weight.shape), bias=False)
        head.weight.data.copy_(weight)
        head = fully_shard(head, mesh=mesh)
        if way == "full tensor":
            w = head.weight.full_tensor(grad_placements=[Partial("avg")])
            linear_dpo_loss(hidden, w, labels).loss.backward()
        else:
            of = lambda h, w, b: linear_dpo_loss(h, w, labels).loss  # noqa: E731
            call_head(head, of, hidden).backward()
        found.append(head.weight.grad.full_tensor())
    torch.testing.assert_close(*found)
    leaf = weight.clone().requires_grad_()
    linear_dpo_loss(hidden, leaf, labels).loss.backward()
    dist.all_reduce(leaf.grad)
    torch.testing.assert_close(found[0], leaf.grad / dist.get_world_size())


def test_the_ways_out(three):
    three.run(ways_out, [t.detach() for t in batch()])


# ---- What is refused


def refusals(tensors):
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    world, mesh = dist.get_world_size(), mesh_of_all()
    deep = init_device_mesh("cpu", (world, 1))
    replicated, rows = place(hidden, Replicate(), mesh), place(weight, Shard(0), mesh)
    bias = torch.zeros(weight.shape[0])
    partial = DTensor.from_local(hidden, mesh, [Partial()], run_check=False)
    two = distribute_tensor(hidden, deep, [Replicate(), Replicate()])
    other = init_device_mesh("cpu", (world,), mesh_dim_names=("other",))
    few = place(weight[: world + 1], Shard(0), mesh)
    uneven = DTensor.from_local(
        weight[: (10, 12, 11)[dist.get_rank()]], mesh, [Shard(0)], run_check=False,
        shape=torch.Size((33, weight.shape[1])), stride=(weight.shape[1], 1),
    )  # fmt: skip
    spread = VocabParallel.of([weight.shape[0]] * world)
    for message, call in (
        (r"weight should be whole.*call_head.*Partial\('avg'\).*VocabParallel.of.*got a DTensor",
            lambda: linear_logps(hidden, rows, labels)),
        ("weight should be whole", lambda: linear_dpo_loss(
            hidden, place(weight, Replicate(), mesh), labels)),
        ("ref_weight should be whole", lambda: linear_dpo_loss(
            hidden, weight, labels, ref_hidden=ref_hidden,
            ref_weight=place(ref_weight, Shard(0), mesh))),
        ("weight should be a DTensor on hidden's mesh", lambda: linear_logps(
            replicated, weight, labels)),
        ("bias should be placed as weight is", lambda: linear_logps(
            replicated, rows, labels, bias=bias)),
        ("bias should be sharded, as weight is", lambda: linear_logps(
            replicated, rows, labels, bias=place(bias, Replicate(), mesh))),
        (r"weight should be placed Shard\(0\).*got (S\(1\)|Shard\(dim=1\))", lambda: linear_logps(
            replicated, place(weight, Shard(1), mesh), labels)),
        (r"hidden should be placed Replicate\(\).*got (P|Partial)", lambda: linear_logps(
            partial, rows, labels)),
        (r"hidden should be placed Replicate\(\)", lambda: linear_logps(
            place(hidden, Shard(1), mesh), rows, labels)),
        (r"labels should be placed Replicate\(\)", lambda: linear_logps(
            replicated, rows, place(labels, Shard(1), mesh))),
        ("hidden should be a DTensor on a mesh of one dimension", lambda: linear_logps(
            two, rows, labels)),
        ("weight should be on the mesh of hidden", lambda: linear_logps(
            replicated, place(weight, Shard(0), other), labels)),
        ("ref_weight should be sharded, as weight is", lambda: linear_dpo_loss(
            replicated, rows, labels, ref_hidden=replicated,
            ref_weight=place(ref_weight, Replicate(), mesh))),
        ("vocab_parallel should be None for DTensors", lambda: linear_logps(
            replicated, rows, labels, vocab_parallel=spread)),
        ("weight should be sharded so that each", lambda: linear_logps(
            replicated, few, labels.clamp(max=2))),
        ("logits should be a plain tensor", lambda: logits_dpo_loss(replicated, labels)),
        ("logits should be a plain tensor", lambda: get_batch_logps(replicated, labels)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    if dist.get_rank() < 2:
        with pytest.raises(ValueError, match="weight should be sharded so that each"):
            linear_logps(replicated, uneven, labels)


def test_bad_input(three):
    three.run(refusals, [t.detach() for t in batch()])
