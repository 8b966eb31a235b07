"""Sequences whose tokens are spread over processes, in a Hugging Face model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import BETA, RATE, STEPS, VOCAB, assert_right, eager_loss, pair, sgd, weights

from fastdpo.integrations import hf
from fastdpo.parallel import SequenceParallel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")
LENGTH = 12


class _Gathered(torch.autograd.Function):
    """Every process's part [..., T, D], one after the other."""

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, -2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), -2)[dist.get_rank()]


def gathered(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention of this process's queries to everybody's keys: what a ring computes."""
    groups = query.shape[1] // key.shape[1]
    key, value = (_Gathered.apply(t).repeat_interleave(groups, 1) for t in (key, value))
    length = query.shape[2]
    place = dist.get_rank() * length + torch.arange(length)
    later = torch.arange(key.shape[2]) > place.unsqueeze(1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def batch(step):
    g = torch.Generator().manual_seed(50 + step)
    ids = torch.randint(3, VOCAB, (8, LENGTH), generator=g)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1::3, 9:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def part(whole):
    """This process's columns; the labels shifted before they are cut."""
    shifted = torch.nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=-100)
    places = torch.arange(LENGTH).expand_as(shifted)
    tensors = {"input_ids": whole["input_ids"], "shift_labels": shifted, "position_ids": places}
    rank, world = dist.get_rank(), dist.get_world_size()
    return {name: t.chunk(world, 1)[rank] for name, t in tensors.items()}


def spread(kind, objective="sigmoid"):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("gathered", gathered)
    model, ref = pair()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for m in (model, ref):
        m.config._attn_implementation = "gathered"
        if kind == "fsdp2":
            for layer in m.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(m.lm_head, mesh=mesh)
            fully_shard(m, mesh=mesh)
    shared, optimizer, losses = SequenceParallel.over(), sgd(model), []
    for step in range(STEPS):
        out = hf.dpo_loss(model, part(batch(step)), ref, beta=BETA, sequence_parallel=shared)
        # Each process has the gradient of its own tokens: FSDP's mean is to be a sum.
        (out.loss * (dist.get_world_size() if kind == "fsdp2" else 1)).backward()
        if kind == "plain":
            for p in model.parameters():
                dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss))
    return losses, weights(model)


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_training(processes, kind):
    model, ref = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        loss = eager_loss(model, batch(step), ref)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert_right(processes.run(spread, kind), (losses, weights(model)))


def sums(average):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("gathered", gathered)
    model, _ = pair()
    model.config._attn_implementation = "gathered"
    mine, shared = part(batch(0)), SequenceParallel.over()
    ids = mine.pop("input_ids")
    with torch.no_grad():
        whole = hf.sequence_logps(
            model, ids, average_log_prob=average, sequence_parallel=shared, **mine
        )
        tokens = hf.sequence_logps(model, ids, per_token=True, sequence_parallel=shared, **mine)
    return whole, tokens


@pytest.mark.parametrize("average", [False, True])
def test_log_probabilities(processes, average):
    model, _ = pair()
    given = batch(0)
    with torch.no_grad():
        expected = hf.sequence_logps(
            model, given["input_ids"], given["labels"], average_log_prob=average
        )
        tokens = hf.sequence_logps(model, given["input_ids"], given["labels"], per_token=True)
    found = processes.run(sums, average)
    for whole, _ in found:
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-4)
    # With shift_labels a column is about what its position predicts.
    joined = torch.cat([part for _, part in found], 1)
    torch.testing.assert_close(joined[:, :-1], tokens[:, 1:], rtol=1e-5, atol=1e-4)


def refused():
    model, ref = pair()
    shared = SequenceParallel.over()
    good = part(batch(0))
    labels = {"input_ids": good["input_ids"], "labels": good["input_ids"]}
    unplaced = {k: v for k, v in good.items() if k != "position_ids"}
    for given, name in (
        (labels, "labels should be given as shift_labels"),
        (unplaced, "position_ids"),
    ):
        with pytest.raises(ValueError, match=name):
            hf.dpo_loss(model, given, ref, sequence_parallel=shared)
        ids = given["input_ids"]
        rest = {k: v for k, v in given.items() if k != "input_ids"}
        with pytest.raises(ValueError, match=name):
            hf.sequence_logps(model, ids, sequence_parallel=shared, **rest)
    with pytest.raises(ValueError, match="ld_alpha should be"):
        hf.dpo_loss(model, good, ref, sequence_parallel=shared, ld_alpha=0.5)


def test_what_a_part_cannot_know_is_asked_for(processes):
    processes.run(refused)


def test_a_group_is_a_group():
    model, ref = pair()
    given = {**batch(0), "position_ids": torch.arange(LENGTH).expand(8, -1)}
    with pytest.raises(ValueError, match="sequence_parallel should be"):
        hf.dpo_loss(model, given, ref, sequence_parallel=2)
