"""TRL's DPOTrainer in two processes, built under `patched()`, against one process: DDP, FSDP2 (also
in mixed precision, which TRL as it ships rounds), and ZeRO-3.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from sampling import sampled
from torch.distributed.fsdp import FSDPModule
from training import weights

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs"),
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("trl", "1.16", reason="needs trl 1.16, and that Python 3.11")
pytest.importorskip("datasets", reason="needs datasets")


ENVIRONMENT = {
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    },
}


@contextlib.contextmanager
def environment(kind):
    import transformers
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    before = dict(os.environ)
    arguments = transformers.training_args
    init = PartialState.__init__
    has_bf16 = arguments.is_torch_bf16_gpu_available
    on_cpu = "false" if kind == "zero3" else "true"
    os.environ.update({"ACCELERATE_USE_CPU": on_cpu, "ACCELERATE_MIXED_PRECISION": "no"})
    os.environ.update(ENVIRONMENT.get(kind, {}))
    try:
        if kind in (
            "fsdp2",
            "zero3",
        ):  # accelerate shards on GPUs alone: a CPU is passed off as one

            def told(self, cpu=False, **kwargs):
                init(self, True, **kwargs)
                if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
                    self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

            PartialState.__init__ = told
            arguments.is_torch_bf16_gpu_available = lambda: True
        yield
    finally:
        arguments.is_torch_bf16_gpu_available = has_bf16
        PartialState.__init__ = init
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)


def trained(folder, kind, patch, **args):
    import test_trl as single

    from fastdpo.integrations.trl import patched

    folder = tempfile.mkdtemp(dir=folder)
    if kind == "zero3":
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        args["deepspeed"] = os.path.join(folder, "zero.json")
        with open(args["deepspeed"], "w") as file:
            json.dump(config, file)
    world = dist.get_world_size() if dist.is_initialized() else 1
    with environment(kind), patched() if patch else contextlib.nullcontext():
        trainer = single.built(
            folder,
            single.model(),
            False,
            None if args.get("precompute_ref_log_probs") else single.disturbed(single.model()),
            **{
                "per_device_train_batch_size": single.BATCH // world,
                "train_sampling_strategy": "sequential",
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                **args,
            },
        )
        trainer.train()
        assert (kind == "fsdp2") == isinstance(trainer.model, FSDPModule)
        if trainer.ref_model is not None:
            assert (kind == "fsdp2") == isinstance(trainer.ref_model, FSDPModule)
        logged = [row for row in trainer.state.log_history if "loss" in row]
        if kind == "zero3":
            import deepspeed

            assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
            assert type(trainer.ref_model).__name__ == "DeepSpeedEngine"

            with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
                return logged, weights(trainer.model)
        return logged, weights(trainer.model)


def one(folder, **args):
    """TRL as it ships, in one process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        return trained(folder, "one process", False, **args)


KEYS = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "logits/chosen")
# Not precompute_ref_log_probs: TRL itself fails there for a dataset in memory and two processes.
CASES = {
    "ddp": ("ddp", {}),
    "ddp, unused parameters": ("ddp", {"ddp_find_unused_parameters": True}),
    "ddp, checkpointing": ("ddp", {"gradient_checkpointing": True}),
    "fsdp2": ("fsdp2", {"use_cpu": False}),
    "fsdp2, wpo": ("fsdp2", {"use_cpu": False, "use_weighting": True}),
    "zero3": ("zero3", {"use_cpu": False}),
}


@pytest.mark.parametrize("case", sampled(CASES, ["fsdp2"]))
def test_the_same_training_run(processes, case, tmp_path):
    kind, args = CASES[case]
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="needs deepspeed, as test_hf_deepspeed.py says")
    known = {k: v for k, v in args.items() if k != "use_cpu"}
    logged, values = one(str(tmp_path), **known)
    for ours, found in processes.run(trained, str(tmp_path), kind, True, **args):
        assert len(ours) == len(logged)
        for a, b in zip(ours, logged, strict=True):
            for key in KEYS:
                assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-4), key
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


def mixed(folder, patch):
    """FSDP2 in bf16: what the trainer's policy and reference return."""
    import test_trl as single

    from fastdpo.integrations.trl import patched

    with environment("fsdp2"), patched() if patch else contextlib.nullcontext():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        trainer = single.built(
            tempfile.mkdtemp(dir=folder),
            single.model(),
            False,
            single.model(),
            per_device_train_batch_size=1,
            use_cpu=False,
            bf16=True,
        )
        trainer.train()
        ids = torch.arange(2, 40).view(2, 19)
        found = []
        for model in (trainer.model_wrapped, trainer.ref_model):
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
            found.append((out.log_probs.dtype, out.loss.dtype))
        return found, [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]


def test_nothing_is_rounded_in_mixed_precision(processes, tmp_path):
    single = (torch.float32, torch.float32)
    for dtypes, margins in processes.run(mixed, str(tmp_path), True):
        assert dtypes == [single, single]
        assert margins[0] == 0.0  # equal weights, to the bit
        assert margins[-1] != 0.0


def attached(folder):
    import test_trl as single

    from fastdpo.integrations.trl import use_fastdpo

    with environment("fsdp2"):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        trainer = single.built(
            folder, single.model(), False, single.model(), use_cpu=False, bf16=True
        )
        with pytest.raises(ValueError, match=r"trainer should be built under .*patched\(\)"):
            use_fastdpo(trainer)


def test_a_reference_that_rounds_already_is_refused(processes, tmp_path):
    processes.run(attached, str(tmp_path))
