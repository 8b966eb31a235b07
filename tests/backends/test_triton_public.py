"""The public functions with backend="triton", forward and backward, against eager PyTorch.

Without a GPU the kernels run in Triton's interpreter. It rounds to bf16 by cutting off, a bias of
half an ulp that the compiled kernels do not have, so the floor of the accuracy rule is doubled
there for what goes through E in bf16.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from oracle import assert_as_accurate, eager_logits, eager_logps
from sampling import sampled
from test_linear_logps import HEADS, check, far_labels, make

from fastdpo.backends import select
from fastdpo.backends.select import BackendUnavailable
from fastdpo.loss import get_batch_logps, linear_dpo_loss, linear_logps

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiled, they are tests of the GPU as well. Interpreted, infinities make numpy talk.
pytestmark = (
    pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.filterwarnings("ignore::RuntimeWarning")
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ALL = (True, True, True)


def checked(tensors, trained=ALL, slack=1.0, **options):
    hidden, weight, bias, labels = (None if t is None else t.to(DEVICE) for t in tensors)
    slack *= 2.0 if DEVICE == "cpu" and hidden.dtype == torch.bfloat16 else 1.0
    upstream = torch.linspace(-1, 2, labels.numel(), device=DEVICE)
    return check(
        hidden, weight, bias, labels, trained, upstream, slack=slack, backend="triton", **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_and_gradients(dtype, head):
    options = dict(HEADS[head])
    tensors = make(20, 301, 48, dtype, bias=options.pop("bias", False))
    checked(tensors, head=options)


@pytest.mark.parametrize("workspace", [0, 25_000, 1 << 30])
@pytest.mark.parametrize(
    ("dtype", "softcap"),
    sampled(
        [(dtype, softcap) for dtype in DTYPES for softcap in (None, 4.0)],
        [(torch.float32, 4.0), (torch.bfloat16, None), (torch.float16, 4.0)],
        several=True,
    ),
    ids=str,
)
def test_workspace(dtype, softcap, workspace):
    """Nothing of E kept, 512 columns of it, all."""
    tensors = make(23, 900, 24, dtype, bias=True, ignored=0.2)
    checked(tensors, head={"softcap": softcap}, workspace_bytes=workspace)


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("dtype", sampled(DTYPES[1:], (torch.bfloat16,)), ids=str)
def test_frozen_parts(dtype, trained):
    checked(make(18, 260, 40, dtype, bias=True), trained, head={"softcap": 4.0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unlikely_and_certain_labels(dtype):
    hidden, weight, _, labels = make(12, 300, 48, dtype, ignored=0.0, spread=0.05)
    bias = torch.zeros(300)
    labels[:] = torch.arange(12)
    bias[:4], bias[4:8] = -200.0, 60.0
    checked((hidden, weight, bias.to(dtype), labels), workspace_bytes=0)
    checked((hidden, weight, bias.to(dtype), labels), head={"softcap": 30.0})


@pytest.mark.parametrize(
    ("dtype", "size", "gap"),
    sampled(
        [(t, *far) for t in DTYPES[:2] for far in ((130, 70), (1300, 70), (13_000, 1000))],
        [(DTYPES[0], 130, 70), (DTYPES[1], 1300, 70), (DTYPES[1], 13_000, 1000)],
        several=True,
    ),
    ids=str,
)
def test_e_computed_again_is_what_was_summed(dtype, size, gap):
    """Flagged rows too, whose kernels have tiles of their own. (Where a few rows share an error of
    one rounding of 1,300, the baseline's may happen to be small.)
    """
    checked(far_labels(20, 640, 96, size, gap, dtype), slack=10.0, workspace_bytes=0)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    for ignored in (0.0, 2.0):
        checked(make(n, 130, 16, torch.bfloat16, bias=True, ignored=ignored))


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_statistics(dtype, softcap):
    hidden, weight, bias, labels = make(20, 300, 48, dtype, bias=True)
    hidden, weight, bias, labels = (t.to(DEVICE) for t in (hidden, weight, bias, labels))
    head = {"softcap": softcap, "logit_scale": 1.2, "temperature": 0.9}
    got = linear_logps(hidden, weight, labels, bias=bias, stats=STATS, backend="triton", **head)

    def eager(dtype):
        z = eager_logits(*(t.to(dtype) for t in (hidden, weight, bias)), **head)
        log_p = z.log_softmax(-1)
        found = {
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
            "mean_logits": z.mean(-1),
        }
        carries = labels != -100
        top = z.argmax(-1) == labels
        return {k: torch.where(carries, v, 0.0) for k, v in found.items()}, carries & top

    (base, _), (oracle, top) = eager(torch.float32), eager(torch.float64)
    for name in STATS[:3]:
        assert_as_accurate(getattr(got, name), base[name], oracle[name], 2, name, slack=2.0)
    assert torch.equal(got.is_top1, top)


def pairs(dtype, device=DEVICE):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 9, 48, generator=g).to(dtype).to(device)
    ref = torch.randn(4, 9, 48, generator=g).to(dtype).to(device)
    weight = (0.3 * torch.randn(301, 48, generator=g)).to(dtype).to(device)
    labels = torch.randint(0, 301, (4, 9), generator=g)
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return hidden, weight, labels.to(device), ref


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss(dtype, frozen):
    hidden, weight, labels, ref = pairs(dtype)
    options = {"beta": 0.3, "label_smoothing": 0.1, "ref_hidden": ref}

    def run(tensors, function):
        h, w, r = (t.detach().requires_grad_() for t in tensors)
        w = w.detach() if frozen else w
        loss = function(h, w, r.detach())
        return loss.detach(), torch.autograd.grad(loss, (h,) if frozen else (h, w))

    def eager(h, w, r):
        a, b = eager_logps(h, w, labels).sum(-1), eager_logps(r, w.detach(), labels).sum(-1)
        rewards = 0.3 * (a - b)
        margins = rewards[:2] - rewards[2:]
        logsigmoid = torch.nn.functional.logsigmoid
        return -(0.9 * logsigmoid(margins) + 0.1 * logsigmoid(-margins)).mean()

    def ours(h, w, r):
        return linear_dpo_loss(
            h, w, labels, backend="triton", ref_weight=w.detach(), **(options | {"ref_hidden": r})
        ).loss

    tensors = (hidden, weight, ref)
    (loss, grads), (base, base_grads) = run(tensors, ours), run(tensors, eager)
    oracle, oracle_grads = run([t.double() for t in tensors], eager)
    assert_as_accurate(loss, base, oracle, 2, "loss", slack=30.0)
    for name, a, b, c in zip(("hidden", "weight"), grads, base_grads, oracle_grads, strict=False):
        assert_as_accurate(a, b, c, 3, f"grad {name}", slack=2.0)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_policy_and_reference_give_ln_2_to_the_bit(dtype, average):
    hidden, weight, labels, _ = pairs(dtype)
    hidden.requires_grad_()
    for trained in (False, True):
        out = linear_dpo_loss(
            hidden, weight.requires_grad_(trained), labels, ref_hidden=hidden.detach(),
            ref_weight=weight.detach(), backend="triton", average_log_prob=average,
        )  # fmt: skip
        assert out.loss.item() == torch.tensor(2.0).log().item()
        assert (out.chosen_rewards == 0).all()


def strided(t):
    """The same values, every second of a longer vector."""
    return t.repeat_interleave(2)[::2]


def expanded(t):
    """One value, read everywhere."""
    return t[:1].expand(t.shape)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lie", [strided, expanded])
def test_vectors_of_any_stride(lie, backend):
    """Labels, bias, the reference's log-probabilities and upstream gradients."""
    tensors = make(20, 301, 48, torch.float32, bias=True, ignored=0.0)
    hidden, weight, bias, labels = (t.to(DEVICE) for t in tensors)
    upstream = lie(torch.linspace(-1, 2, 20, device=DEVICE))
    for workspace in (0, None):
        check(
            hidden, weight, lie(bias), lie(labels), ALL, upstream, head={"softcap": 5.0},
            backend=backend, workspace_bytes=workspace,
        )  # fmt: skip

    hidden, weight, labels, _ = pairs(torch.float32)
    packed, ends = hidden.flatten(0, 1), torch.arange(0, 37, 9, device=DEVICE)
    ref_logps = torch.linspace(-50, -60, 4, device=DEVICE)
    losses = [
        linear_dpo_loss(
            packed, weight, of(labels.flatten().clamp(min=0)), cu_seqlens=of_ends(ends),
            ref_logps=of(ref_logps), backend=backend, average_log_prob=average,
        ).loss
        for average in (False, True)
        for of, of_ends in ((lie, strided), (lambda t: lie(t).contiguous(), torch.clone))
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_materialized_logits(dtype, average, monkeypatch):
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "triton")
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(4, 9, 301, generator=g)).to(dtype).to(DEVICE)
    labels = torch.randint(0, 301, (4, 9), generator=g).to(DEVICE)
    labels[:, :4] = -100

    def run(dtype, ours=False):
        z = logits.detach().to(dtype).requires_grad_()
        if ours:
            out = get_batch_logps(z, labels, average_log_prob=average)
        else:
            shifted, y = z[:, :-1], labels[:, 1:]
            wide = shifted if dtype == torch.float64 else shifted.float()
            mask = y != -100
            logps = wide.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            out = (logps * mask).sum(-1) / (mask.sum(-1) if average else 1)
        upstream = torch.tensor([1.0, -2.0, 0.5, 0.0], device=DEVICE).to(out.dtype)
        return out.detach(), torch.autograd.grad(out, z, upstream)[0]

    (ours, grad), (base, base_grad) = run(dtype, ours=True), run(dtype)
    oracle, oracle_grad = run(torch.float64)
    assert_as_accurate(ours, base, oracle, 2, "logps")
    assert_as_accurate(grad, base_grad, oracle_grad, 3, "gradient")
    assert (grad[:, -1] == 0).all()


def test_the_gradient_over_the_logits_is_an_operator_of_its_own(monkeypatch):
    """One that writes to an argument may not be given it as another argument, too."""
    from fastdpo.backends.triton import ops

    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delattr(ops, "logits_logps_backward")
    leaf = torch.randn(4, 9, 301, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 301, (4, 9), device=DEVICE)
    get_batch_logps(leaf * 1.0, labels, inplace_backward=True).sum().backward()
    found, leaf.grad = leaf.grad, None
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "torch")
    get_batch_logps(leaf * 1.0, labels).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_fp64_is_refused_with_the_reason():
    tensors = make(4, 50, 16, torch.float64)
    hidden, weight, _, labels = (None if t is None else t.to(DEVICE) for t in tensors)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot run exp_logits.*float64"):
        linear_logps(hidden, weight, labels, backend="triton")


def test_the_environment_variable_is_honoured(monkeypatch):
    hidden, weight, labels, ref = pairs(torch.bfloat16)
    by_argument = linear_dpo_loss(hidden, weight, labels, ref_hidden=ref, backend="triton")
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "triton")
    for name in ("exp_logits", "target_logits", "logits_logps", "sequence_loss"):
        assert select.primitive(name, hidden).__name__ == "fastdpo.backends.triton"
    by_environment = linear_dpo_loss(hidden, weight, labels, ref_hidden=ref)
    assert torch.equal(by_argument.loss, by_environment.loss)
    # The argument comes first.
    assert select.primitive("exp_logits", hidden, "torch").__name__ == "fastdpo.backends.torch"


def test_without_a_gpu_or_the_interpreter_it_says_why():
    code = (
        "import torch; from fastdpo.backends import triton\n"
        "torch.cuda.is_available = lambda: False\n"
        "print(*triton.available(), *triton.supports(torch.device('cpu'), torch.float32))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("False") == 2
    assert "no GPU" in done.stdout
    assert "not on cpu" in done.stdout
