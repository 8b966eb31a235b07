"""verl's `linear_cross_entropy`, with the signature of its 0.8.0.dev, against logits; and the names
that `patch` replaces.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.distributed as dist

from fastdpo.integrations import verl
from fastdpo.integrations.verl import linear_cross_entropy

SHAPE, V, D = (2, 5), 40, 16


def make():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*SHAPE, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(V, SHAPE, generator=generator)


def from_logits(hidden, weight, labels, temperature):
    logps = (hidden @ weight.T / temperature).log_softmax(-1).flatten(0, 1)
    return logps.gather(-1, labels.view(-1, 1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_what_the_logits_give(temperature):
    hidden, weight, labels = make()
    expected = from_logits(hidden, weight, labels, temperature)
    found = linear_cross_entropy(hidden, weight, labels, temperature, "none", None)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.detach(), b.detach())
    upstream = torch.linspace(-1, 2, labels.numel())
    grads = torch.autograd.grad(expected[0], (hidden, weight), upstream)
    for a, b in zip(torch.autograd.grad(found[0], (hidden, weight), upstream), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_entropys_gradient():
    hidden, weight, labels = make()
    _, entropy = linear_cross_entropy(hidden, weight, labels)
    _, expected = from_logits(hidden, weight, labels, 1.0)
    grads = torch.autograd.grad(entropy.sum(), (hidden, weight))
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---- Processes that share a vocabulary


def _shared():
    hidden, weight, labels = make()
    rows = weight.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    logps, entropy = linear_cross_entropy(hidden, rows, labels, 0.7, "none", dist.group.WORLD)
    return logps.detach(), entropy.detach(), *torch.autograd.grad(logps.sum(), (hidden, rows))


def test_a_shared_vocabulary(processes):
    """Hidden's gradient stays in parts: what gathered hidden adds them up, as in verl."""
    hidden, weight, labels = make()
    expected = from_logits(hidden, weight, labels, 0.7)
    grads = torch.autograd.grad(expected[0].sum(), (hidden, weight))
    first, second = processes.run(_shared)
    for found in (first, second):
        torch.testing.assert_close(found[0], expected[0].detach())
        torch.testing.assert_close(found[1], expected[1].detach())
    torch.testing.assert_close(first[2] + second[2], grads[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([first[3], second[3]]), grads[1], atol=1e-5, rtol=1e-5)


# ---- The names


def test_patch_puts_it_where_verl_looks(monkeypatch):
    def theirs(*args):
        raise AssertionError("not called")

    names = ("verl", "verl.utils", "verl.utils.kernel", "verl.utils.kernel.linear_cross_entropy")
    for name in (*names, "verl.models.mcore.model_forward_fused", "verlangen"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    kernel = sys.modules[names[-1]]
    holders = (kernel, sys.modules["verl.models.mcore.model_forward_fused"])
    for module in (*holders, sys.modules["verlangen"]):
        module.linear_cross_entropy = theirs
    assert verl.patch(workspace_bytes=0) == sorted(m.__name__ for m in holders)
    hidden, weight, labels = make()
    for module in holders:
        logps, _ = module.linear_cross_entropy(hidden, weight, labels, 1.0, "none")
        torch.testing.assert_close(logps, from_logits(hidden, weight, labels, 1.0)[0])
    assert sys.modules["verlangen"].linear_cross_entropy is theirs


def test_without_verl_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError):
        verl.patch()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("reduction should be 'none'", lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "mean")),
        ("labels should be of 10 entries", lambda h, w, y: linear_cross_entropy(h, w, y[0])),
        ("temperature should be", lambda h, w, y: linear_cross_entropy(h, w, y, 0.0)),
        (r"labels should be in \[0, 40\)", lambda h, w, y: linear_cross_entropy(h, w, y - 100)),
        ("options should be among", lambda h, w, y: verl.patch(chunk_size=1)),
        ("backend should be", lambda h, w, y: verl.patch(backend="none")),
    ],
)
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message):
        call(*make())
