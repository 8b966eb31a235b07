"""The stacks that wrap models for people: transformers' Trainer and its own FSDP and tensor
parallelism, accelerate.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from sampling import sampled
from torch.distributed.fsdp import FSDPModule
from training import (
    BETA,
    PAIRS,
    RATE,
    STEPS,
    assert_right,
    batch,
    one_process,
    our_loss,
    pair,
    share,
    tiny,
    train,
    weights,
)

from fastdpo.integrations import hf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


# ---- transformers.Trainer, whose DDP looks for unused parameters


def with_trainer(folder):
    import transformers

    model, ref = pair()
    rank, world = dist.get_rank(), dist.get_world_size()

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            step = int(inputs["step"][0])
            return hf.dpo_loss(model, share(batch(step), rank, world), ref, beta=BETA).loss

    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, max_steps=STEPS, optim="sgd",
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    steps = [{"step": step} for step in range(STEPS) for _ in range(world)]
    trainer = Trainer(model=model, args=arguments, train_dataset=steps)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(steps)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, weights(model)


def test_transformers_trainer(processes, tmp_path):
    expected = one_process()
    for losses, values in processes.run(with_trainer, str(tmp_path)):
        assert_right([(expected[0], values)], expected)
        assert losses == pytest.approx(expected[0], abs=1e-3)  # it logs four digits


# ---- transformers' DistributedConfig


def distributed(folder, **sizes):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model, ref = (
        AutoModelForCausalLM.from_pretrained(
            f"{folder}/{name}",
            dtype=torch.float32,
            attn_implementation="eager",
            distributed_config=DistributedConfig(**sizes),
        )
        for name in ("policy", "reference")
    )
    ref.eval()
    if "tp_size" not in sizes:
        return train(model, ref), weights(model)
    # Processes of one tensor-parallel group have the same pairs.
    shards = dist.get_world_size() // sizes["tp_size"]
    mine = dist.get_rank() // sizes["tp_size"]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        loss = our_loss(model, share(batch(step), mine, shards), ref)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist(), weights(model)


@pytest.fixture
def saved(tmp_path):
    def save(**options):
        for name, seed in (("policy", 0), ("reference", 1)):
            tiny(seed, **options).save_pretrained(tmp_path / name)
        return str(tmp_path)

    return save


native = pytest.mark.skipif(
    not os.path.exists(
        os.path.join(os.path.dirname(__import__("transformers").__file__), "distributed", "fsdp.py")
    ),
    reason="needs a transformers with DistributedConfig(fsdp_size=…), 5.24",
)


@native
@pytest.mark.parametrize("tied", sampled([False, True], (True,)))
def test_transformers_own_fsdp(processes, saved, tied):
    expected = one_process(
        lambda: (tiny(0, tie_word_embeddings=tied), tiny(1, tie_word_embeddings=tied).eval())
    )
    found = processes.run(distributed, saved(tie_word_embeddings=tied), fsdp_size=2)
    assert_right(found, expected)


@pytest.mark.exhaustive
@native
def test_transformers_own_fsdp_with_tensor_parallelism(four, saved):
    assert_right(four.run(distributed, saved(), fsdp_size=2, tp_size=2), one_process())


# ---- accelerate


def accelerated(fsdp, flags=None):
    from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true" if fsdp else "false",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        if fsdp:  # accelerate shards on GPUs alone, and a CPU has to be passed off as one
            from accelerate.utils import DistributedType

            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        handlers = [DistributedDataParallelKwargs(**(flags or {}))]
        accelerator = Accelerator(cpu=not fsdp, kwargs_handlers=handlers)
        model, ref = pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        net, optimizer = accelerator.prepare(model, optimizer)
        if fsdp:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            ref = fsdp2_prepare_model(accelerator, ref)
            assert isinstance(net, FSDPModule)
            assert isinstance(ref, FSDPModule)
        losses = []
        for step in range(STEPS):
            mine = share(batch(step), dist.get_rank(), dist.get_world_size())
            loss = our_loss(net, mine, ref)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist(), weights(net)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "flags", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str
)
def test_accelerate(processes, flags):
    assert_right(processes.run(accelerated, False, flags), one_process())


def test_accelerates_fsdp2(processes):
    assert PAIRS == 4
    assert_right(processes.run(accelerated, True), one_process())
