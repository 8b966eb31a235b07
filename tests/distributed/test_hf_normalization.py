"""The mean over all processes' pairs and tokens, in a Hugging Face model under DDP."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import BETA, RATE, STEPS, assert_right, batch, mean, pair, sgd, weights

from fastdpo.integrations import hf
from fastdpo.parallel import DataParallel, batch_counts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")
OBJECTIVE = {"objective": {"sigmoid": 1.0, "sft": 0.5}, "beta": BETA}


def some(whole, start, stop):
    rows = torch.cat([torch.arange(start, stop), 4 + torch.arange(start, stop)])
    return {name: value[rows] for name, value in whole.items()}


def uneven(accumulated):
    """One process has a pair, the other three: at once, or one by one."""
    model, ref = pair()
    net, data = DistributedDataParallel(model), DataParallel.over()
    optimizer, losses = sgd(model), []
    for step in range(STEPS):
        places = [(0, 1)] if dist.get_rank() == 0 else [(1, 4)]
        counts = {}
        if accumulated:
            places = [(0, 1), (1, 1), (1, 1)] if dist.get_rank() == 0 else [(1, 2), (2, 3), (3, 4)]
        parts = [some(batch(step), *place) for place in places]
        if accumulated:
            labels = [
                torch.nn.functional.pad(p["labels"][:, 1:], (0, 1), value=-100) for p in parts
            ]
            counts = batch_counts(labels, data)
        total = torch.zeros(())
        for part in parts:
            loss = hf.dpo_loss(net, part, ref, data_parallel=data, **counts, **OBJECTIVE).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return mean(losses), weights(model)


@pytest.mark.parametrize("accumulated", [False, True])
def test_uneven_processes(processes, accumulated):
    model, ref = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        loss = hf.dpo_loss(model, batch(step), ref, **OBJECTIVE).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert_right(processes.run(uneven, accumulated), (losses, weights(model)))


def test_tokens_are_counted_where_they_are_read():
    model, ref = pair()
    with pytest.raises(ValueError, match="num_tokens should be"):
        hf.dpo_loss(model, batch(0), ref, num_pairs=4, **OBJECTIVE)
