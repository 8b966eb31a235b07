"""An lm_head called with a loss to compute, in plain loops: whatever shards it gathers its weight
and reduces its gradient.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import plain_model
import pytest
import torch
import torch.distributed as dist
from plain_model import (
    BETA,
    PAIRS,
    STEPS,
    VOCAB,
    WIDTH,
    Model,
    assert_right,
    batch,
    mean,
    pairs_of,
    sgd,
    weights,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdpo.distributed
from fastdpo.loss import linear_dpo_loss, linear_logps
from fastdpo.parallel import call_head

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


def loss_at(given):
    def of(hidden, weight, bias):
        assert type(weight) in (torch.Tensor, nn.Parameter)
        assert weight.shape == (VOCAB, WIDTH)
        return linear_dpo_loss(
            hidden, weight, given["labels"], bias=bias, ref_logps=given["ref"], beta=BETA
        )

    return of


def trained(net, model, inside, optimizer=None):
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer, losses = optimizer or sgd(net), []
    for step in range(STEPS):
        given = pairs_of(batch(step), rank * PAIRS // world, (rank + 1) * PAIRS // world)
        of = loss_at(given)
        if inside:
            out = net(given["ids"], lambda head, hidden, of=of: call_head(head, of, hidden))
        else:
            model._skip_lm_head = True
            out = call_head(model.lm_head, of, net(given["ids"]))
        assert type(out).__name__ == "LinearDPOOutput"
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.detach())
    return mean(losses), weights(net)


# What is a unit of fully_shard, beside each layer and the root.
UNITS = {
    "root": lambda model: None,
    "own": lambda model: model.lm_head,
    "with norm": lambda model: [model.norm, model.lm_head],
}


def fsdp2(units, inside, bias=False, reshard=None, frozen=False):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(bias=bias)
    model.lm_head.requires_grad_(not frozen)
    options = {} if reshard is None else {"reshard_after_forward": reshard}
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    unit = UNITS[units](model)
    if unit is None:
        fully_shard(model, mesh=mesh, **options)
    else:
        fully_shard(unit, mesh=mesh, **options)
        fully_shard(model, mesh=mesh)
    return trained(model, model, inside)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
@pytest.mark.parametrize("reshard", [None, True, False], ids=str)
@pytest.mark.parametrize("units", UNITS)
def test_fully_shard(processes, units, reshard, inside):
    if units == "root" and reshard and not inside:
        pytest.skip("refused, below")
    found = processes.run(fsdp2, units, inside, reshard=reshard)
    assert_right(found, plain_model.expected())


@pytest.mark.parametrize("options", [{"bias": True}, {"frozen": True}], ids=str)
def test_a_bias_and_a_frozen_head(processes, options):
    def make():
        model = Model(bias=options.get("bias", False))
        model.lm_head.requires_grad_(not options.get("frozen"))
        return model

    assert_right(processes.run(fsdp2, "own", False, **options), plain_model.expected(make))


def resharded_root():
    model = fully_shard(Model(), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    model._skip_lm_head = True
    hidden = model(batch(0)["ids"])
    with pytest.raises(ValueError, match="lm_head should be gathered by its own call: make it a"):
        call_head(model.lm_head, loss_at(batch(0)), hidden)
    assert "forward" not in vars(model.lm_head)


def test_a_head_that_another_call_gathers(processes):
    processes.run(resharded_root)


def fsdp1(own, inside):
    model, options = Model(), {"device_id": torch.device("cpu"), "use_orig_params": True}
    if own:
        model.lm_head = FSDP(model.lm_head, **options)
    net = FSDP(model, **options)
    losses, _ = trained(net, model, inside)
    with FSDP.summon_full_params(net):
        return losses, weights(net)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("own", "inside"), [(True, False), (True, True), (False, True)])
def test_fsdp1(processes, own, inside):
    assert_right(processes.run(fsdp1, own, inside), plain_model.expected())


def ddp(inside, **flags):
    model = Model()
    return trained(DistributedDataParallel(model, **flags), model, inside)


@pytest.mark.parametrize("flags", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_ddp(processes, flags):
    assert_right(processes.run(ddp, True, **flags), plain_model.expected())
    if not flags:
        assert_right(processes.run(ddp, False), plain_model.expected())


def zero3():
    import deepspeed

    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": PAIRS // 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    losses = []
    for step in range(STEPS):
        given = pairs_of(batch(step), 2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        of = loss_at(given)
        out = engine(given["ids"], lambda head, hidden, of=of: call_head(head, of, hidden))
        engine.backward(out.loss)
        engine.step()
        losses.append(out.loss.detach())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return mean(losses), weights(model)


@pytest.mark.exhaustive  # .ci/run installs DeepSpeed for these
def test_zero3(processes):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    assert_right(processes.run(zero3), plain_model.expected())


# ---- Numbers that leave


def rounded():
    """FSDP2 rounds what a unit returns: values and gradients pass exactly."""
    mesh, bf16 = init_device_mesh("cpu", (2,)), torch.bfloat16
    found = []
    for output in (None, bf16):
        policy = MixedPrecisionPolicy(bf16, torch.float32, output_dtype=output)
        model = Model()
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(bf16, torch.float32))
        model._skip_lm_head = True
        given = batch(dist.get_rank())
        out = call_head(model.lm_head, loss_at(given), model(given["ids"]))
        assert all(value.dtype == torch.float32 for value in out)
        (out.loss * 1.2345678 + out.chosen_logps.sum() * 0.1).backward()
        grads = [p.grad.full_tensor() for p in model.parameters()]
        found.append([*(value.detach() for value in out), *grads])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert (found[0][1] != found[0][1].bfloat16()).any()  # which rounding would have shown


def test_nothing_is_rounded(processes):
    processes.run(rounded)


def reference_too():
    """Hidden states of policy and reference are both cast by the wrapper."""
    mesh, bf16 = init_device_mesh("cpu", (2,)), torch.bfloat16
    head = fully_shard(
        nn.Linear(8, 20, bias=False), mesh=mesh, mp_policy=MixedPrecisionPolicy(bf16)
    )
    hidden, labels = torch.randn(4, 3, 8, requires_grad=True), torch.randint(20, (4, 3))

    def of(hidden, ref_hidden, weight, bias):
        assert hidden.dtype == ref_hidden.dtype == weight.dtype == bf16
        return linear_dpo_loss(hidden, weight, labels, ref_hidden=ref_hidden)

    out = call_head(head, of, hidden, hidden.detach())
    out.loss.backward()
    assert out.loss.item() == torch.tensor(2.0).log().item()
    assert hidden.grad.abs().sum() > 0


def test_the_references_hidden_states(processes):
    processes.run(reference_too)


# ---- In one process


class Found(NamedTuple):
    logps: torch.Tensor
    more: dict
    nothing: None = None


def test_any_structure_comes_back():
    head, hidden = nn.Linear(8, 20), torch.randn(5, 8, requires_grad=True)
    labels = torch.randint(20, (5,))
    expected = linear_logps(hidden, head.weight, labels, bias=head.bias)

    def of(hidden, weight, bias):
        logps = linear_logps(hidden, weight, labels, bias=bias)
        return Found(logps, {"a": [logps.sum(), labels], "b": (None, logps > -1.0)})

    found = call_head(head, of, hidden)
    assert type(found) is Found
    assert torch.equal(found.logps, expected)
    assert torch.equal(found.more["a"][1], labels)
    assert found.more["b"][0] is None
    (grad,) = torch.autograd.grad(found.more["a"][0], hidden)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), hidden)[0])
    assert fastdpo.distributed.call_head is call_head
    assert torch.equal(call_head(head, lambda h, w, b: h @ w.T + b, hidden), head(hidden))


def test_a_compiled_head_and_a_forward_of_somebody_else():
    hidden = torch.randn(5, 8)
    head = nn.Linear(8, 20)
    whole = head(hidden)
    plain = copy.deepcopy(head)
    plain.compile(backend="eager")
    patched = copy.deepcopy(head)
    patched.forward = own = lambda x: x
    for given in (torch.compile(head, backend="eager"), plain, patched):
        out = call_head(given, lambda h, w, b: (h @ w.T + b,), hidden)
        torch.testing.assert_close(out[0], whole)
    assert patched.forward is own
    assert plain._compiled_call_impl is not None
    assert "forward" not in vars(head)


def test_its_hooks_are_given_tensors_and_run_once():
    head, seen = nn.Linear(8, 20), []
    head.register_forward_hook(lambda module, args, out: seen.append(out))
    call_head(head, lambda h, w, b: {"x": h.sum(), "n": None}, torch.randn(2, 8))
    ((x,),) = seen
    assert x.shape == ()


def test_it_traces_around():
    head, labels = nn.Linear(8, 20), torch.randint(20, (5,))

    @torch.compile(backend="eager")
    def step(hidden):
        return call_head(head, lambda h, w, b: linear_logps(h, w, labels, bias=b), hidden * 2)

    hidden = torch.randn(5, 8)
    expected = linear_logps(hidden * 2, head.weight, labels, bias=head.bias)
    torch.testing.assert_close(step(hidden), expected)


class Twice(nn.Linear):
    def __call__(self, hidden):
        super().__call__(hidden)
        return super().__call__(hidden)


def test_bad_input():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    head, hidden = nn.Linear(8, 20), torch.randn(2, 8)
    keeps = nn.Linear(8, 20)
    keeps.register_forward_hook(lambda module, args, out: out[0])
    first = nn.Linear(8, 20)
    first.register_forward_pre_hook(lambda module, args: args[0])

    def of(*given):
        return given[0].sum()

    for message, call in (
        ("lm_head should be a module, got Parameter", lambda: call_head(head.weight, of, hidden)),
        ("fn should be a function", lambda: call_head(head, hidden, hidden)),
        ("hidden should be tensors, got list", lambda: call_head(head, of, [hidden])),
        ("fn should be returning tensors", lambda: call_head(head, lambda h, w, b: 1.0, hidden)),
        ("lm_head should be without activation", lambda: call_head(
            checkpoint_wrapper(head), of, hidden)),
        ("lm_head should be a module with a weight", lambda: call_head(nn.ReLU(), of, hidden)),
        (r"lm_head should be gathered to a weight \[V, D\]", lambda: call_head(
            nn.LayerNorm(8), of, hidden)),
        ("lm_head should be without hooks that", lambda: call_head(keeps, of, hidden)),
        ("hidden should be left 2 tensors", lambda: call_head(first, of, hidden, hidden)),
        ("a module that calls its forward once", lambda: call_head(Twice(8, 20), of, hidden)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert "forward" not in vars(head)


def test_an_adapter_on_the_head():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 20))
    layer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])).base_model.model[0]
    with pytest.raises(ValueError, match="for adapters"):
        call_head(layer, lambda h, w, b: h.sum(), torch.randn(2, 8))
