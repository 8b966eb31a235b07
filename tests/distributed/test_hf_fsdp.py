"""Models whose parameters are sharded: FSDP2 in every wrapping, HSDP, FSDP1. The loss is computed
while the head's weight is gathered, and every gradient is reduced.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from sampling import sampled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, ShardingStrategy, fully_shard
from training import (
    STEPS,
    assert_right,
    batch,
    mean,
    one_process,
    our_loss,
    sgd,
    share,
    tiny,
    train,
    weights,
)

from fastdpo.integrations import hf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


# What is one unit of fully_shard beside each layer, and when it is resharded.
def root(model, mesh, **options):
    fully_shard(model, mesh=mesh, **options)


def own_unit(model, mesh, **options):
    fully_shard(model.get_output_embeddings(), mesh=mesh, **options)
    _root(model, mesh, options)


def with_norm(model, mesh, **options):
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, **options)
    _root(model, mesh, options)


def with_embedding(model, mesh, **options):
    fully_shard([model.model.embed_tokens, model.lm_head], mesh=mesh, **options)
    _root(model, mesh, options)


def _root(model, mesh, options):
    fully_shard(model, mesh=mesh, **{k: v for k, v in options.items() if k == "mp_policy"})


UNITS = {f.__name__: f for f in (root, own_unit, with_norm, with_embedding)}


def shard(model, units, mesh, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    UNITS[units](model, mesh, **options)
    return model


def pair(tied=False, frozen=False):
    model, ref = (tiny(seed, tie_word_embeddings=tied) for seed in (0, 1))
    model.get_output_embeddings().requires_grad_(not frozen)
    return model, ref.eval()


def fsdp2(
    units, tied=False, frozen=False, checkpointing=False, compiled=None, hsdp=False, **options
):
    size = dist.get_world_size()
    names = ("replicate", "shard") if hsdp else ("shard",)
    mesh = init_device_mesh("cpu", (2, size // 2) if hsdp else (size,), mesh_dim_names=names)
    model, ref = pair(tied, frozen)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if compiled:
        for layer in (*model.model.layers, *ref.model.layers):
            layer.compile(backend="aot_eager")
    for m in (model, ref):
        shard(m, units, mesh, **options)
    net = torch.compile(model, backend="aot_eager") if compiled == "whole" else model
    losses = train(net, ref)
    assert sum(p.to_local().numel() for p in ref.parameters()) < sum(
        p.numel() for p in ref.parameters()
    )
    return losses, weights(model)


CASES = {
    "root": {"units": "root"},
    "root, resharded": {"units": "root", "reshard_after_forward": True},
    "root, kept": {"units": "root", "reshard_after_forward": False},
    "own unit": {"units": "own_unit"},
    "own unit, kept": {"units": "own_unit", "reshard_after_forward": False},
    "with the norm": {"units": "with_norm"},
    "with the norm, kept": {"units": "with_norm", "reshard_after_forward": False},
    "tied": {"units": "root", "tied": True},
    "tied, one unit": {"units": "with_embedding", "tied": True},
    "frozen": {"units": "own_unit", "frozen": True},
    "frozen, root": {"units": "root", "frozen": True},
    "checkpointing": {"units": "own_unit", "checkpointing": True},
    "compiled layers": {"units": "own_unit", "compiled": "layers"},
    "compiled whole": {"units": "own_unit", "compiled": "whole"},
}


@pytest.mark.parametrize("case", sampled(CASES, ["root", "own unit", "tied, one unit"]))
def test_fully_shard(processes, case):
    options = CASES[case]
    expected = one_process(lambda: pair(options.get("tied", False), options.get("frozen", False)))
    assert_right(processes.run(fsdp2, **options), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("units", ["root", "own_unit"])
def test_replicas_that_are_sharded(four, units):
    assert_right(four.run(fsdp2, units, hsdp=True), one_process())


def accumulated(units, sync):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, ref = (shard(m, units, mesh) for m in pair())
    optimizer, losses = sgd(model), []
    for step in range(STEPS):
        mine = share(batch(step), dist.get_rank(), dist.get_world_size())
        total = torch.zeros(())
        for i in range(2):
            last = i == 1
            model.set_requires_gradient_sync(sync == "always" or last)
            if sync == "kept":
                model.set_is_last_backward(last)
                model.set_reshard_after_backward(last)
            loss = our_loss(model, share(mine, i, 2), ref) / 2
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return mean(losses), weights(model)


@pytest.mark.parametrize("units", ["root", "own_unit"])
@pytest.mark.parametrize("sync", sampled(["always", "last", "kept"], ["last"]))
def test_accumulation(processes, units, sync):
    assert_right(processes.run(accumulated, units, sync), one_process())


def fsdp1(strategy, original, tied=False, frozen=False):
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model, ref = pair(tied, frozen)
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    net, other = (
        FSDP(
            m,
            auto_wrap_policy=policy,
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=original,
            device_id=torch.device("cpu"),
        )
        for m in (model, ref)
    )
    losses = train(net, other)
    with FSDP.summon_full_params(net):
        return losses, weights(net)


@pytest.mark.parametrize(
    "strategy", sampled(["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"], ["FULL_SHARD"])
)
@pytest.mark.parametrize("original", [True, False], ids=["original", "flat"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fsdp1(processes, strategy, original):
    assert_right(processes.run(fsdp1, strategy, original), one_process())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{"tied": True}, {"frozen": True}], ids=str)
def test_fsdp1_tied_and_frozen(processes, options):
    expected = one_process(lambda: pair(**options))
    assert_right(processes.run(fsdp1, "FULL_SHARD", True, **options), expected)


def uneven(kind):
    """The second process has no label, or no pair; then its gradient is zero, and half the mean."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, ref = (shard(m, "own_unit", mesh) for m in pair())
    optimizer = sgd(model)
    for step in range(STEPS):
        mine = batch(step)
        if dist.get_rank() == 1:
            mine = {k: v[:0] for k, v in mine.items()} if kind == "no pair" else mine
            mine["labels"] = torch.full_like(mine["labels"], -100)
        our_loss(model, mine, ref).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("kind", ["no label", "no pair"])
def test_a_process_with_nothing_to_learn_from(processes, kind):
    model, ref = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        our_loss(model, batch(step), ref).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = weights(model)
    for found in processes.run(uneven, kind):
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 2e-5, name


def rounded(output_dtype=torch.bfloat16, units="own_unit", compiled=False):
    """As accelerate wraps in bf16: what leaves the model is rounded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=output_dtype
    )
    model, ref = (tiny(0, max_position_embeddings=1024) for _ in range(2))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in ref.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 2e-3)
    for m in (model, ref):
        for layer in m.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        UNITS[units](m, mesh, mp_policy=policy)
    g = torch.Generator().manual_seed(3 + dist.get_rank())
    ids = torch.randint(3, 56, (4, 700), generator=g)
    labels = ids.clone()
    labels[:, :20] = -100
    net = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(2):  # probed first, which is eager
        with torch.no_grad():
            reference = hf.sequence_logps(ref, ids, labels)
        policy_logps = hf.sequence_logps(net, ids, labels)
        assert policy_logps.dtype == torch.float32
        torch.nn.functional.logsigmoid(policy_logps - reference).sum().backward()
    return policy_logps.detach(), reference, weights_gradients(model)


def weights_gradients(model):
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_are_exact_past_a_wrapper_that_rounds(processes, compiled):
    """To the bit, and so are the gradients: as where nothing is rounded."""
    exact = processes.run(rounded, None, compiled=compiled)
    for got, expected in zip(processes.run(rounded, compiled=compiled), exact, strict=True):
        assert got[0].abs().min() > 1000  # where bf16's step is 8 or 16
        assert got[0].equal(expected[0])
        assert got[1].equal(expected[1])
        for name, gradient in expected[2].items():
            assert got[2][name].equal(gradient), name


class FullyShardedDataParallel(torch.nn.Module):
    """A stand-in that rounds what leaves it, around a model without graph breaks."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return {name: value.bfloat16() for name, value in self.module(**kwargs).items()}


def test_what_cannot_be_exact_is_refused():
    """Where the head itself is compiled, nothing can be carried beside the output."""
    model, given = tiny(0), batch(0)
    net = FullyShardedDataParallel(torch.compile(model, backend="eager", fullgraph=True))
    arguments = given["input_ids"], given["labels"], given["attention_mask"]
    expected = hf.sequence_logps(model, *arguments)
    got = hf.sequence_logps(net, *arguments)  # probed, and so eager
    assert got.equal(expected)
    with pytest.raises(ValueError, match="its wrappers round what leaves it"):
        hf.sequence_logps(net, *arguments)


def llava(seed):
    """Text alone: what counts is where accelerate puts the head, in a unit of its own."""
    import transformers
    from training import CONFIG

    torch.manual_seed(seed)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    names = {k: v for k, v in CONFIG.items() if k != "attn_implementation"}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**names), vision_config=vision, image_token_index=55
    )
    config._attn_implementation = "eager"
    return transformers.LlavaForConditionalGeneration(config)


def images(wrapped):
    model, ref = llava(0), llava(1).eval()
    for m in (model, ref):
        m.requires_grad_(False)
        m.model.language_model.requires_grad_(True)
        m.lm_head.requires_grad_(True)
    if not wrapped:
        return train(model, ref, shared=False), weights(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for m in (model, ref):
        for layer in m.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(m.lm_head, mesh=mesh)
        fully_shard(m, mesh=mesh)
    return train(model, ref), weights(model)


def test_a_vision_language_model(processes):
    assert_right(processes.run(images, True), images(False))
