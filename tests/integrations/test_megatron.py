"""Megatron-LM's output processors, on a stand-in with the signature of GPTModel.forward in
Megatron-Core 0.20, alone and as processes that share a vocabulary and a sequence.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastdpo.integrations.megatron import dpo_loss, token_logps
from fastdpo.loss import logits_dpo_loss
from fastdpo.parallel import SequenceParallel

EXAMPLES = str(Path(__file__).parents[2] / "examples")
B, S, V, H = 2, 6, 40, 16


def gpt(**options):
    sys.path.insert(0, EXAMPLES)
    try:
        from stand_ins import GPTModel
    finally:
        sys.path.remove(EXAMPLES)
    torch.manual_seed(3)
    return GPTModel(V, H, **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(V, (2, 2 * B, S), generator=generator)
    mask = (torch.rand(2 * B, S, generator=generator) > 0.3).float()
    ref_logps = torch.randn(2 * B, generator=generator)
    return tokens, labels, mask, ref_logps


def from_logits(model):
    """Per-token log-probabilities, the loss, and its gradients by parameter."""
    tokens, labels, mask, ref_logps = batch()
    logits = model(tokens, None, None)
    logps = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1) * mask
    targets = labels.masked_fill(mask == 0, -100)
    out = logits_dpo_loss(logits, targets, ref_logps=ref_logps, beta=0.3)
    return logps.detach(), out, gradients(model, out.loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name, atol=1e-5, rtol=1e-5)


CONTEXT = {"beta": 0.3}


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"mup_output_mult": 0.25}], ids=str)
def test_it_is_what_the_logits_give(options):
    model = gpt(**options)
    logps, expected, grads = from_logits(model)
    tokens, labels, mask, ref_logps = batch()
    given = {"labels": labels, "loss_mask": mask}
    found = model(tokens, None, None, **given, output_processor=token_logps)
    torch.testing.assert_close(found, logps)
    context = {"output_processor_context": {"ref_logps": ref_logps, **CONTEXT}}
    out = model(tokens, None, None, **given, output_processor=dpo_loss, **context)
    assert type(out) is dict  # what Megatron-LM's wrappers leave as it is
    assert list(out) == list(expected._fields)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(out[name], value, msg=name)
    same(gradients(model, out["loss"]), grads)


def test_a_reference_per_token_and_statistics():
    model = gpt()
    tokens, labels, mask, _ = batch()
    given = {"labels": labels, "loss_mask": mask}
    with torch.no_grad():
        context = {"output_processor_context": {"stats": ("entropy",), "temperature": 2.0}}
        found = model(tokens, None, None, **given, output_processor=token_logps, **context)
        logits = model(tokens, None, None)
    assert list(found) == ["logps", "entropy"]
    p = (logits / 2.0).softmax(-1)
    torch.testing.assert_close(found["entropy"], -(p * p.log()).sum(-1) * mask)
    ref_logps = model(tokens, None, None, **given, output_processor=token_logps).detach()
    context = {"output_processor_context": {"ref_logps": ref_logps}}
    out = model(tokens, None, None, **given, output_processor=dpo_loss, **context)
    assert out["loss"].item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences(padded):
    model = gpt()
    _, labels, mask, ref_logps = batch()
    if padded:  # as if each sequence's last two positions were there for alignment
        mask[:, -2:] = 0
    ends = (torch.arange(2 * B + 1) * S).int()
    ragged = torch.cat([ends[:1], ends[1:] - 2]) if padded else ends
    packed = types.SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=ragged, cu_seqlens_q_padded=ends if padded else None
    )
    hidden = torch.randn(2 * B, S, H, requires_grad=True)
    head = {"output_layer": model.output_layer, "output_weight": None}
    context = {"context": {"ref_logps": ref_logps, **CONTEXT}}
    whole = dpo_loss(
        hidden_states=hidden.transpose(0, 1), labels=labels, loss_mask=mask, **head, **context
    )
    found = dpo_loss(
        hidden_states=hidden.reshape(-1, 1, H),
        labels=labels.reshape(1, -1),
        loss_mask=mask.reshape(1, -1),
        packed_seq_params=packed,
        **head,
        **context,
    )
    torch.testing.assert_close(found["loss"], whole["loss"])
    torch.testing.assert_close(
        *(torch.autograd.grad(out["loss"], hidden)[0] for out in (found, whole))
    )


def test_the_layer_is_called_so_that_its_hooks_run():
    """Megatron-LM's distributed optimizer waits for a weight in a hook before its layer."""
    model = gpt()
    _, expected, _ = from_logits(model)
    weight = model.output_layer.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()  # not gathered yet

    def gather(module, inputs):
        weight.data.copy_(whole)

    model.output_layer.register_forward_pre_hook(gather)
    tokens, labels, mask, ref_logps = batch()
    out = model(
        tokens, None, None, labels=labels, loss_mask=mask, output_processor=dpo_loss,
        output_processor_context={"ref_logps": ref_logps, **CONTEXT},
    )  # fmt: skip
    torch.testing.assert_close(out["loss"], expected.loss)
    assert "forward" not in vars(model.output_layer)


def test_another_forward_of_the_layer_is_put_back():
    model = gpt()
    tokens, labels, mask, _ = batch()

    def others(*args, **kwargs):
        raise AssertionError("not called")

    model.output_layer.forward = others
    model(tokens, None, None, labels=labels, loss_mask=mask, output_processor=token_logps)
    assert model.output_layer.forward is others


# ---- Processes that share


class _Gather(torch.autograd.Function):
    """What Megatron-Core's gather_from_sequence_parallel_region does."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, hidden.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _megatron():
    made = types.ModuleType("megatron.core.tensor_parallel")

    def gather(hidden, tensor_parallel_output_grad=True, group=None):
        assert tensor_parallel_output_grad
        return _Gather.apply(hidden, group)

    made.gather_from_sequence_parallel_region = gather
    return dict.fromkeys(("megatron", "megatron.core", made.__name__), made)


def _tensor_parallel(sequence_parallel):
    """(logps, loss, gradient of hidden's part, gradient of the weight's rows)."""
    model = gpt()
    layer, (_, labels, mask, ref_logps) = model.output_layer, batch()
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = torch.randn(S, 2 * B, H, generator=torch.Generator().manual_seed(7))
    if sequence_parallel:
        hidden = hidden.chunk(size)[rank]
    hidden = hidden.clone().requires_grad_()
    layer.weight = torch.nn.Parameter(layer.weight.detach().chunk(size)[rank].clone())
    layer.tp_group, layer.sequence_parallel = dist.group.WORLD, sequence_parallel
    layer.output_size_per_partition = V // size
    given = {
        "hidden_states": hidden, "output_layer": layer, "output_weight": None,
        "labels": labels, "loss_mask": mask,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _megatron().items():
            patch.setitem(sys.modules, name, module)
        logps = token_logps(**given)
        out = dpo_loss(**given, context={"ref_logps": ref_logps, **CONTEXT})
        grads = torch.autograd.grad(out["loss"], [hidden, layer.weight])
    return logps.detach(), out["loss"].detach(), *grads


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallelism(processes, sequence_parallel):
    layer, (_, labels, mask, ref_logps) = gpt().output_layer, batch()
    hidden = torch.randn(S, 2 * B, H, generator=torch.Generator().manual_seed(7))
    hidden.requires_grad_()
    given = {
        "hidden_states": hidden, "output_layer": layer, "output_weight": None,
        "labels": labels, "loss_mask": mask,
    }  # fmt: skip
    logps = token_logps(**given).detach()
    out = dpo_loss(**given, context={"ref_logps": ref_logps, **CONTEXT})
    grads = torch.autograd.grad(out["loss"], [hidden, layer.weight])
    found = processes.run(_tensor_parallel, sequence_parallel)
    for own_logps, loss, *_ in found:
        torch.testing.assert_close(own_logps, logps)
        torch.testing.assert_close(loss, out["loss"].detach())
    of_hidden = [f[2] for f in found]
    if sequence_parallel:
        torch.testing.assert_close(torch.cat(of_hidden), grads[0])
    else:
        for part in of_hidden:
            torch.testing.assert_close(part, grads[0])
    torch.testing.assert_close(torch.cat([f[3] for f in found]), grads[1])


def _context_parallel():
    layer, (_, labels, mask, ref_logps) = gpt().output_layer, batch()
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = torch.randn(S, 2 * B, H, generator=torch.Generator().manual_seed(7))
    out = dpo_loss(
        hidden_states=hidden.chunk(size)[rank], output_layer=layer, output_weight=None,
        labels=labels.chunk(size, 1)[rank], loss_mask=mask.chunk(size, 1)[rank],
        config=types.SimpleNamespace(context_parallel_size=size),
        context={"ref_logps": ref_logps, "sequence_parallel": SequenceParallel.over(), **CONTEXT},
    )  # fmt: skip
    return out["loss"].detach(), *torch.autograd.grad(out["loss"], [layer.weight])


def test_context_parallelism(processes):
    layer, (_, labels, mask, ref_logps) = gpt().output_layer, batch()
    hidden = torch.randn(S, 2 * B, H, generator=torch.Generator().manual_seed(7))
    out = dpo_loss(
        hidden_states=hidden, output_layer=layer, output_weight=None, labels=labels,
        loss_mask=mask, context={"ref_logps": ref_logps, **CONTEXT},
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out["loss"], [layer.weight])
    found = processes.run(_context_parallel)
    for loss, _ in found:
        torch.testing.assert_close(loss, out["loss"].detach())
    torch.testing.assert_close(found[0][1] + found[1][1], grad)


# ---- Bad input


def refused(processor=dpo_loss, layer=None, **changes):
    _, labels, mask, _ = batch()
    model = gpt()
    for name, value in (layer or {}).items():
        setattr(model.output_layer, name, value)
    given = {
        "hidden_states": torch.randn(S, 2 * B, H), "output_layer": model.output_layer,
        "output_weight": None, "labels": labels, "loss_mask": mask,
    }  # fmt: skip
    processor(**{**given, **changes})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("labels should be given", {"labels": None}),
        ("loss_mask should be of labels' shape", {"loss_mask": torch.ones(2, 3)}),
        ("inference_context should be None", {"inference_context": object()}),
        ("output_layer should be Megatron", {"output_layer": torch.nn.Linear(H, V)}),
        ("output_layer should be with 7 rows", {"layer": {"output_size_per_partition": 7}}),
        ("scale_logits should be a multiplication", {"scale_logits": torch.tanh}),
        ("output_processor_context should be without", {"context": {"cu_seqlens": None}}),
        (
            "output_processor_context should be options",
            {"processor": token_logps, "context": {"beta": 0.1}},
        ),
        (
            "output_processor_context should be with sequence_parallel",
            {"config": types.SimpleNamespace(context_parallel_size=2)},
        ),
        (
            "config.defer_embedding_wgrad_compute should be False",
            {"config": types.SimpleNamespace(defer_embedding_wgrad_compute=True)},
        ),
    ],
)
def test_bad_input(message, changes):
    with pytest.raises(ValueError, match=message):
        refused(**changes)
