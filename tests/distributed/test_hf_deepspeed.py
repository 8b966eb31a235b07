"""DeepSpeed's ZeRO, on CPUs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from training import (
    RATE,
    STEPS,
    assert_right,
    batch,
    mean,
    one_process,
    our_loss,
    share,
    tiny,
)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs"),
    pytest.mark.exhaustive,  # .ci/run installs DeepSpeed for these
]
pytest.importorskip(
    "deepspeed",
    reason="needs deepspeed (pip install --no-deps --no-build-isolation deepspeed, and what it "
    "imports: hjson py-cpuinfo msgpack einops pydantic)",
)


def frozen(model):
    model.get_output_embeddings().requires_grad_(False)


FAMILIES = {"Llama": {}, "Gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0}}


def pair(family="Llama", tied=False, freeze=False):
    options = {**FAMILIES[family], "tie_word_embeddings": tied}
    model, ref = (tiny(seed, family, **options) for seed in (0, 1))
    if freeze:
        frozen(model)
    return model, ref.eval()


def zero(stage, **options):
    import deepspeed

    model, ref = pair(**options)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4 * dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if stage == 3:
        reference, *_ = deepspeed.initialize(model=ref, config=config)
    else:
        reference = ref
    losses, caches = [], []
    layer = model.model.layers[0].self_attn
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    for step in range(STEPS):
        mine = share(batch(step), dist.get_rank(), dist.get_world_size())
        loss = our_loss(engine, mine, reference)
        assert loss.dtype == torch.float32
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    hook.remove()
    assert caches
    assert all(cache is None for cache in caches)  # nobody would read them
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return mean(losses), values


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_stages(processes, stage, family):
    assert_right(processes.run(zero, stage, family=family), one_process(lambda: pair(family)))


@pytest.mark.parametrize("options", [{"tied": True}, {"freeze": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_stage_3_tied_and_frozen(processes, options):
    assert_right(processes.run(zero, 3, **options), one_process(lambda: pair(**options)))
