"""Where the gradient of materialized logits lies: in memory of its own, or over the logits where
the caller asks for it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdpo.loss import get_batch_logps, logits_dpo_loss

S, T, V = 4, 6, 37
FUNCTIONS = {
    "get_batch_logps": lambda z, labels, **kw: get_batch_logps(z, labels, **kw).sum(),
    "logits_dpo_loss": lambda z, labels, **kw: logits_dpo_loss(z, labels, **kw).loss,
}


class Producer(torch.autograd.Function):
    """Makes logits, and tells where they lay and where their gradient lies."""

    @staticmethod
    def forward(ctx, x, addresses):
        ctx.addresses = addresses
        out = x.clone()
        addresses.append(out.data_ptr())
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.addresses.append(grad.data_ptr())
        return grad.clone(), None


def data(dtype=torch.float32):
    logits = (2 * torch.randn(S, T, V)).to(dtype)
    labels = torch.randint(V, (S, T))
    labels[:, :2] = -100
    return logits, labels


def expected(function, logits, labels):
    leaf = logits.clone().requires_grad_()
    function(leaf, labels).backward()
    return leaf.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_the_gradient_lies(name, dtype, inplace):
    function, (logits, labels), addresses = FUNCTIONS[name], data(dtype), []
    right = expected(function, logits, labels)
    leaf = logits.clone().requires_grad_()
    made = Producer.apply(leaf, addresses)
    function(made, labels, inplace_backward=inplace).backward()
    assert (addresses[0] == addresses[1]) == inplace
    assert torch.equal(made, right if inplace else logits)
    assert torch.equal(leaf.grad, right)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_logits_that_others_see_are_left_alone_unless_asked(name):
    function, (logits, labels) = FUNCTIONS[name], data()
    right = expected(function, logits, labels)
    array = logits.numpy().copy()  # numpy owns this memory
    kept = array.copy()
    made = torch.from_numpy(array).requires_grad_()
    function(made.view_as(made), labels).backward()
    np.testing.assert_array_equal(array, kept)
    torch.testing.assert_close(made.grad, right)

    made = logits.clone().requires_grad_() * 1
    storage = made.untyped_storage()
    loss = function(made, labels)
    del made
    loss.backward()
    assert torch.equal(torch.empty(0).set_(storage)[: logits.numel()], logits.flatten())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_retained_graph_can_be_gone_through_again(name):
    function, (logits, labels) = FUNCTIONS[name], data()
    right = expected(function, logits, labels)
    leaf = logits.clone().requires_grad_()
    loss = function(leaf * 1, labels, inplace_backward=True)
    for _ in range(2):
        leaf.grad = None
        loss.backward(retain_graph=True)
        assert torch.equal(leaf.grad, right)
    leaf.grad = None
    loss.backward()
    assert torch.equal(leaf.grad, right)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_notices_when_somebody_needed_the_logits(name):
    function, (logits, labels) = FUNCTIONS[name], data()
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    other = made.square().sum()  # saves the logits
    function(made, labels, inplace_backward=True).backward(inputs=[made])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled(name, inplace):
    """fullgraph: the labels are checked, the rows found and the gradient computed by operators."""
    function, (logits, labels) = FUNCTIONS[name], data()

    def step(leaf, labels):
        return function(leaf * 1, labels, inplace_backward=inplace)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f in (step, compiled):
        leaf = logits.clone().requires_grad_()
        loss = f(leaf, labels)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="labels should be in"):
        compiled(logits, labels.masked_fill(labels > 0, V))


def test_opcheck():
    logits, labels = data()
    labels = labels.masked_fill(labels < 0, -1)
    transform = (1.0, None, 1.0, None)
    torch.library.opcheck(torch.ops.fastdpo.checked_labels, (labels, -1, V))
    torch.library.opcheck(torch.ops.fastdpo.logits_logps, (logits, labels, *transform))
    _, lse = torch.ops.fastdpo.logits_logps(logits, labels, *transform)
    torch.library.opcheck(
        torch.ops.fastdpo.logits_logps_backward, (torch.ones(S, T), logits, labels, lse, *transform)
    )
