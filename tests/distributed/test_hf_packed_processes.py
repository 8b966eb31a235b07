"""Packed rows and shared prompts on models that are wrapped: as padded pairs in one process."""

from __future__ import annotations

import pytest
import torch
from sampling import sampled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import BETA, assert_right, eager_loss, one_process, pair, train, weights

from fastdpo.data import PairCollator
from fastdpo.integrations import hf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")

PROMPT = 3


def of_one_prompt(given):
    """Both answers behind the chosen one's prompt."""
    ids = given["input_ids"].clone()
    half = len(ids) // 2
    ids[half:, :PROMPT] = ids[:half, :PROMPT]
    return {**given, "input_ids": ids}


def padded_loss(model, given, ref):
    return eager_loss(model, of_one_prompt(given), ref)


class PackedLoss:
    def __init__(self, layout):
        self.layout = layout

    def __call__(self, model, given, ref):
        given = of_one_prompt(given)
        rows = [
            ids[: int(n)].tolist()
            for ids, n in zip(given["input_ids"], given["attention_mask"].sum(-1), strict=True)
        ]
        half = len(rows) // 2
        examples = [
            {"prompt_ids": a[:PROMPT], "chosen_ids": a[PROMPT:], "rejected_ids": b[PROMPT:]}
            for a, b in zip(rows[:half], rows[half:], strict=True)
        ]
        batch = PairCollator(0, self.layout, attention="eager")(examples)
        return hf.dpo_loss(model, batch, ref, beta=BETA).loss


def wrapped(wrapper, layout):
    model, ref = pair()
    if wrapper == "ddp":
        return train(
            DistributedDataParallel(model, static_graph=True), ref, PackedLoss(layout)
        ), weights(model)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for lm in (model, ref):
        for layer in lm.model.layers:
            fully_shard(layer, mesh=mesh)
        if wrapper == "fsdp2, own unit":
            fully_shard(lm.lm_head, mesh=mesh)
        fully_shard(lm, mesh=mesh)
    return train(model, ref, PackedLoss(layout)), weights(model)


CASES = [
    (w, la) for w in ("ddp", "fsdp2", "fsdp2, own unit") for la in ("packed", "shared_prompts")
]
KEPT = [("ddp", "packed"), ("fsdp2, own unit", "shared_prompts")]


@pytest.mark.parametrize("case", sampled(CASES, KEPT), ids="-".join)
def test_packed(processes, case):
    assert_right(processes.run(wrapped, *case), one_process(loss_of=padded_loss))
