"""Adapters on a model that is sharded: on the backbone, on the head, and a head trained in full."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from sampling import sampled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import (
    BETA,
    assert_right,
    eager_logps,
    one_process,
    tiny,
    train,
    weights,
)

from fastdpo.integrations import hf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")
peft = pytest.importorskip("peft", reason="needs peft")

TARGETS = {
    "backbone": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(kind):
    model = tiny(0)
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS[kind])
    return peft.get_peft_model(model, config), None


def eager_loss(model, given, _):
    with torch.no_grad(), model.disable_adapter():
        reference = eager_logps(model, given)
    chosen, rejected = (eager_logps(model, given) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def ours(model, given, _):
    return hf.dpo_loss(model, given, beta=BETA).loss


def sharded(kind, units):
    net, _ = adapted(kind)
    base = net.get_base_model()
    if units.startswith("ddp"):
        net = DistributedDataParallel(net, static_graph=units == "ddp, static graph")
        return train(net, None, ours), weights(net)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    if units == "own unit":
        fully_shard(base.lm_head, mesh=mesh)
    if units == "with the norm":
        fully_shard([base.model.norm, base.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(net, mesh=mesh)
    return train(net, None, ours), weights(net)


UNITS = ["ddp", "ddp, static graph", "root", "own unit", "with the norm"]


@pytest.mark.parametrize("units", sampled(UNITS, ["own unit"]))
@pytest.mark.parametrize("kind", TARGETS)
def test_adapters(processes, kind, units):
    expected = one_process(lambda: adapted(kind), eager_loss)
    assert_right(processes.run(sharded, kind, units), expected)


def prompted(wrapped):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(3)
    net = peft.get_peft_model(tiny(0), config)
    with torch.no_grad():
        for p in net.prompt_encoder.parameters():
            p.normal_()
    if not wrapped:
        return train(net, tiny(1).eval(), shared=False), weights(net)
    return train(DistributedDataParallel(net, static_graph=True), tiny(1).eval()), weights(net)


def test_virtual_tokens(processes):
    assert_right(processes.run(prompted, True), prompted(False))
