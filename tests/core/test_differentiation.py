"""What autograd may ask of a loss: one derivative, and no batches of upstream gradients; and calls
on tensors that have shapes and no data.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import functional

from fastdpo.loss import (
    FusedLinearDPOLoss,
    get_batch_logps,
    linear_dpo_loss,
    linear_logps,
    logits_dpo_loss,
)

S, T, D, V = 4, 5, 6, 11
SECOND = "cannot be differentiated again"
BATCHED = "several upstream gradients at once"


def data(dtype=torch.float64):
    x = torch.randn(S, T, 3, dtype=dtype)
    theta = torch.randn(3, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype)
    labels = torch.randint(V, (S, T))
    labels[:, 0] = -100
    return x, theta, weight, labels


def losses(trained=False, **options):
    """Each public function as a function of theta, on which the hidden states depend and not as a
    leaf; where `trained`, the head's weight does as well.
    """
    x, theta, weight, labels = data()

    def hidden(t):
        return torch.tanh(x @ t)

    def head(t):
        return weight + t.sum() if trained else weight

    liger = FusedLinearDPOLoss(use_ref_model=False, loss_type="simpo")
    return theta, {
        "linear_logps": lambda t: linear_logps(hidden(t), head(t), labels, **options).sum(),
        "linear_dpo_loss": lambda t: linear_dpo_loss(hidden(t), head(t), labels, **options).loss,
        "ipo": lambda t: linear_dpo_loss(hidden(t), head(t), labels, objective="ipo").loss,
        "liger": lambda t: liger(head(t), hidden(t), labels)[0],
        "logits_dpo_loss": lambda t: logits_dpo_loss(hidden(t) @ head(t).t(), labels).loss,
        "get_batch_logps": lambda t: get_batch_logps(hidden(t) @ head(t).t(), labels).sum(),
    }


NAMES = list(losses()[1])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_whatever_way_it_is_asked_for(name, trained):
    theta, functions = losses(trained)
    f = functions[name]
    v = torch.randn_like(theta)

    def product(**options):
        (g,) = torch.autograd.grad(f(theta), theta, create_graph=True)
        return torch.autograd.grad((g * v).sum(), theta, **options)

    def penalty():
        (g,) = torch.autograd.grad(f(theta), theta, create_graph=True)
        (g.square().sum()).backward(inputs=[theta])

    for ask in (
        product,
        lambda: product(allow_unused=True),
        lambda: product(materialize_grads=True),
        penalty,
        lambda: f(theta).backward(create_graph=True),
        lambda: f(theta).square().backward(create_graph=True),
        lambda: functional.hessian(f, theta),
        lambda: functional.hvp(f, theta, v),
        lambda: functional.vhp(f, theta, v),
        lambda: functional.jvp(f, theta, v),
    ):
        with pytest.raises(RuntimeError, match=SECOND):
            ask()
    assert functional.jacobian(f, theta).isfinite().all()  # once is what it is for


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_batches_of_upstream_gradients_are_refused(name, trained):
    theta, functions = losses(trained)
    f = functions[name]
    with pytest.raises(RuntimeError, match=BATCHED):
        functional.jacobian(f, theta, vectorize=True)
    loss = f(theta)
    with pytest.raises(RuntimeError, match=BATCHED):
        torch.autograd.grad(loss, theta, torch.ones(2).to(loss), is_grads_batched=True)


def no_data(kind):
    """Where tensors have shapes alone."""
    return torch.device("meta") if kind == "meta" else FakeTensorMode()


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_without_data_have_results_without_data(kind, trained, dtype):
    """As eager cross-entropy has: what memory estimators run."""
    with no_data(kind):
        hidden = torch.empty(S, T, D, dtype=dtype, requires_grad=True)
        weight = torch.empty(V, D, dtype=dtype, requires_grad=trained)
        labels = torch.empty(S, T, dtype=torch.int64)
        made = hidden * 1
        out = linear_dpo_loss(made, weight, labels, ref_hidden=hidden.detach())
        tokens = linear_logps(made, weight, labels, stats=("entropy", "is_top1"))
        logits = (hidden @ weight.t()).float()
        of_logits = logits_dpo_loss(logits, labels, ref_logps=torch.empty(S))
        sums = get_batch_logps(logits, labels, average_log_prob=True)
        loss = out.loss + tokens.logps.sum() + of_logits.loss + sums.sum()
        loss.backward()
    assert loss.shape == ()
    assert out.chosen_logps.shape == of_logits.rejected_logps.shape == (S // 2,)
    assert tokens.entropy.shape == tokens.is_top1.shape == (S, T)
    assert tokens.is_top1.dtype == torch.bool
    assert hidden.grad.shape == hidden.shape
    assert hidden.grad.dtype == dtype
    assert (weight.grad is not None) == trained


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_packed_and_known_rows_without_data(kind):
    with no_data(kind):
        hidden = torch.empty(S * T, D, requires_grad=True)
        labels, weight = torch.empty(S * T, dtype=torch.int64), torch.empty(V, D)
        ends = torch.empty(S + 1, dtype=torch.int32)
        rows = torch.empty(7, dtype=torch.int64)
        out = linear_dpo_loss(hidden, weight, labels, cu_seqlens=ends, row_index=rows, bias=None)
        out.loss.backward()
        assert logits_dpo_loss(hidden @ weight.t(), labels, cu_seqlens=ends).loss.shape == ()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("first", ["inference", "checkpoint"])
@pytest.mark.parametrize("function", [get_batch_logps, logits_dpo_loss])
def test_the_first_call_may_be_anywhere(function, first):
    """In a process of its own each would be the first call: nothing is measured on the way."""
    logits, labels = torch.randn(S, T, V), torch.randint(V, (S, T))
    head = nn.Linear(V, V)

    def loss(z):
        out = function(head(z), labels)
        return out.sum() if isinstance(out, torch.Tensor) else out.loss

    expected = loss(logits)
    if first == "inference":
        with torch.inference_mode():
            assert torch.equal(loss(logits), expected)
        return
    expected.backward()
    grad, head.weight.grad = head.weight.grad, None
    torch.utils.checkpoint.checkpoint(loss, logits, use_reentrant=False).backward()
    torch.testing.assert_close(head.weight.grad, grad)


BAD = {
    "no hidden size": (torch.zeros(3, 0), torch.zeros(4, 0), r"weight should be .* D > 0"),
    "float8": (
        torch.zeros(3, 4).to(torch.float8_e4m3fn),
        torch.zeros(4, 4).to(torch.float8_e4m3fn),
        r"hidden should be of a floating-point dtype among \['float32'",
    ),
    "float8 weight": (
        torch.zeros(3, 4),
        torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "weight should be of a floating-point dtype among",
    ),
    "sparse hidden": (torch.zeros(3, 4).to_sparse(), torch.zeros(4, 4), "hidden should be a dense"),
    "sparse weight": (torch.zeros(3, 4), torch.eye(4).to_sparse(), "weight should be a dense"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_computed_in(case):
    hidden, weight, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_logps(hidden, weight, torch.zeros(3, dtype=torch.int64))
    if "weight" in case:
        bias = weight[0] if weight.layout == torch.strided else torch.zeros(4).to_sparse()
        with pytest.raises(ValueError, match=message.replace("weight", "bias")):
            linear_logps(hidden, torch.zeros(4, 4), torch.zeros(3, dtype=torch.int64), bias=bias)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3, 4).to(torch.float8_e5m2), "logits should be of a floating-point dtype"),
        (torch.zeros(2, 3, 4).to_sparse(), "logits should be a dense"),
    ],
)
def test_logits_that_are_not_computed_in(logits, message):
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        get_batch_logps(logits, labels)
    with pytest.raises(ValueError, match=message):
        logits_dpo_loss(logits, labels)


@pytest.mark.parametrize("value", [2**64 - 100, 2**63, 2**63 - 1])
def test_an_unsigned_label_does_not_wrap_round_to_what_is_ignored(value):
    labels = torch.tensor([[1, value], [0, 2]], dtype=torch.uint64)
    with pytest.raises(ValueError, match=r"labels should be in \[0, 11\)"):
        linear_logps(torch.randn(2, 2, D), torch.randn(V, D), labels)
    with pytest.raises(ValueError, match=r"labels should be in \[0, 11\)"):
        get_batch_logps(torch.randn(2, 2, V), labels)


def test_unsigned_labels():
    labels = torch.tensor([1, 10], dtype=torch.uint64)
    hidden, weight = torch.randn(2, D), torch.randn(V, D)
    assert torch.equal(
        linear_logps(hidden, weight, labels), linear_logps(hidden, weight, labels.long())
    )
