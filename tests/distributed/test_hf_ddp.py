"""DistributedDataParallel around a model whose loss is fastdpo's: gradients are those of the whole
batch, with every flag.
"""

from __future__ import annotations

import pytest
import torch
from sampling import sampled
from torch.nn.parallel import DistributedDataParallel
from training import (
    PAIRS,
    RATE,
    STEPS,
    assert_right,
    batch,
    mean,
    one_process,
    our_loss,
    pair,
    sgd,
    share,
    tiny,
    train,
    weights,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


def made(tied=False):
    return tiny(0, tie_word_embeddings=tied), tiny(1, tie_word_embeddings=tied).eval()


def frozen(model):
    model.get_output_embeddings().requires_grad_(False)


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


CASES = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "tied": {"tied": True},
    "static graph, tied": {"static_graph": True, "tied": True},
    "unused parameters, tied": {"find_unused_parameters": True, "tied": True},
    "frozen head": {"prepare": frozen},
    "static graph, frozen head": {"static_graph": True, "prepare": frozen},
    "static graph, checkpointing": {"static_graph": True, "prepare": checkpointed},
    "compiled inside": {"compiled": "inside"},
    "compiled outside": {"compiled": "outside"},
}


def wrapped(tied=False, prepare=None, compiled=None, **flags):
    model, ref = made(tied)
    if prepare is not None:
        prepare(model)
    module = torch.compile(model, backend="aot_eager") if compiled == "inside" else model
    net = DistributedDataParallel(module, **flags)
    if compiled == "outside":
        net = torch.compile(net, backend="aot_eager")
    return train(net, ref), weights(model)


@pytest.mark.parametrize(
    "case", sampled(CASES, ["static graph", "unused parameters, tied", "compiled outside"])
)
def test_every_flag(processes, case):
    options = CASES[case]
    expected = one_process(lambda: made(options.get("tied", False)))
    if options.get("prepare") is frozen:
        expected = one_process(prepare=frozen)
    assert_right(processes.run(wrapped, **options), expected)


def accumulated(**flags):
    """Two backwards a step, of which the second one synchronises."""
    import torch.distributed as dist

    model, ref = pair()
    net = DistributedDataParallel(model, **flags)
    optimizer, losses = sgd(model), []
    for step in range(STEPS):
        mine = share(batch(step), dist.get_rank(), dist.get_world_size())
        total = torch.zeros(())
        for i in range(2):
            part = share(mine, i, 2)
            if i == 0:
                with net.no_sync():
                    loss = our_loss(net, part, ref) / 2
                    loss.backward()
            else:
                loss = our_loss(net, part, ref) / 2
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return mean(losses), weights(model)


@pytest.mark.parametrize("flags", [{}, {"find_unused_parameters": True}], ids=str)
def test_accumulation_without_synchronising(processes, flags):
    assert PAIRS == 4
    assert_right(processes.run(accumulated, **flags), one_process())


def uneven(kind):
    """The second process has no token that carries loss, or no pair at all."""
    import torch.distributed as dist

    model, ref = pair()
    net = DistributedDataParallel(model, find_unused_parameters=kind == "unused")
    optimizer = sgd(model)
    for step in range(STEPS):
        mine = batch(step)
        if dist.get_rank() == 1:
            mine = {k: v[:0] for k, v in mine.items()} if kind == "no pair" else mine
            mine["labels"] = torch.full_like(mine["labels"], -100)
        loss = our_loss(net, mine, ref)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("kind", ["no label", "no pair", "unused"])
def test_a_process_with_nothing_to_learn_from(processes, kind):
    """Its gradient is zero, and half of the mean."""
    model, ref = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE / 2)
    for step in range(STEPS):
        our_loss(model, batch(step), ref).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = weights(model)
    for found in processes.run(uneven, kind):
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 2e-5, name
