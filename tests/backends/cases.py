"""What the CUDA C++ kernels must do, on any device: the same checks run on the CPU and on a GPU.

Every check takes the backend module and tensors, computes the fp64 oracle (the torch backend) and
the fp32 eager baseline from the very same inputs, and holds the kernels to the accuracy rule.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from oracle import assert_as_accurate
from torch import Tensor

from fastdpo.backends import torch as reference
from fastdpo.backends.contract import Head

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = (
    {},
    {"scale": 0.5, "temperature": 0.7},
    {"scale": 1.5, "softcap": 20.0, "temperature": 1.3},
)
POISON = float("nan")  # in rows that should not be read: it would show in every result


def head(like: Tensor, **transform) -> Head:
    """A head whose weight nobody reads."""
    return Head(like.new_empty(1, 1), **transform)


def logits_and_labels(
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    *,
    spread: float = 3.0,
    ignored: tuple[int, ...] = (),
    row_stride: int | None = None,
    offset: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:  # [rows, vocab], [rows]
    """Random logits, `offset` elements into their storage. Ignored rows hold NaN, and as labels
    what users write there or what the public functions make of it.
    """
    row_stride = vocab if row_stride is None else row_stride
    storage = torch.full((offset + rows * row_stride + vocab,), POISON, dtype=dtype)
    logits = storage[offset:].as_strided((rows, vocab), (row_stride, 1))
    logits.copy_(torch.randn(rows, vocab) * spread)
    labels = torch.randint(0, vocab, (rows,))
    for row in ignored:
        logits[row] = POISON
        labels[row] = (-100, -1)[row % 2]
    strided = storage.to(device)[offset:].as_strided((rows, vocab), (row_stride, 1))
    return strided, labels.to(device)


def eager_logps(logits: Tensor, labels: Tensor, h: Head) -> tuple[Tensor, Tensor]:
    """The baseline: what a trainer writes, in fp32 or fp64."""
    z = logits * h.scale
    if h.softcap is not None:
        z = h.softcap * torch.tanh(z / h.softcap)
    z = z / h.temperature
    logps = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logps, z.logsumexp(-1)


def eager_gradient(logits: Tensor, labels: Tensor, h: Head, upstream: Tensor) -> Tensor:
    """∂/∂logits [N, V], by autograd."""
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(eager_logps(leaf, labels, h)[0], leaf, upstream)
    return gradient


def summed(logps: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:  # [N], [N, 2] -> [N], [N]
    return logps, lse.sum(-1)


def check_forward(backend: ModuleType, logits: Tensor, labels: Tensor, **transform) -> None:
    h = head(logits, **transform)
    ours = backend.logits_logps(logits, labels, h)
    assert ours[1].shape == (*labels.shape, 2)
    ours = summed(*ours)
    rows = labels >= 0
    for name, tensor in zip(("logps", "lse"), ours, strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.shape == labels.shape
        assert torch.equal(tensor[~rows], torch.zeros_like(tensor[~rows])), f"{name} where ignored"
    some, wanted = logits[rows], labels[rows]
    exact = eager_logps(some.double(), wanted, h)
    base = eager_logps(some.float(), wanted, h)
    for name, tensor, b, e in zip(("logps", "lse"), ours, base, exact, strict=True):
        assert_as_accurate(tensor[rows], b, e, 2, name)


def check_backward(
    backend: ModuleType,
    logits: Tensor,
    labels: Tensor,
    out: Tensor,  # [rows, vocab]; may be logits itself
    *,
    grad: Tensor | None = None,
    grad_scale: Tensor | None = None,
    **transform,
) -> None:
    h = head(logits, **transform)
    grad = torch.randn(labels.shape).to(logits.device) if grad is None else grad
    rows = labels >= 0
    some, wanted = logits[rows], labels[rows]
    upstream = grad[rows] if grad_scale is None else grad[rows] * grad_scale
    exact = eager_gradient(some.double(), wanted, h, upstream.double())
    base = eager_gradient(some.float(), wanted, h, upstream)

    _, lse = backend.logits_logps(logits, labels, h)
    backend.logits_logps_backward(grad, logits, labels, lse, h, out, grad_scale=grad_scale)
    assert torch.equal(out[~rows], torch.zeros_like(out[~rows])), "gradients where ignored"
    assert_as_accurate(out[rows], base.to(out.dtype), exact, 3, "gradient")


def check_extreme_logits(backend: ModuleType, dtype: torch.dtype, device: str = "cpu") -> None:
    vocab, big = 3001, 1e4 if dtype != torch.float16 else 6e4
    logits, labels = logits_and_labels(dtype, 8, vocab, device=device)
    logits[0], logits[1], logits[2] = big, -big, big
    logits[2, 17], labels[2] = -big, 17  # the label at probability e^-20000
    logits[3, ::2], labels[3] = -math.inf, 1
    logits[4], labels[4] = -math.inf, 5
    logits[4, 5] = 2.0  # the label is all there is
    logits[5, 100], labels[5] = big, 100
    logits[6] = 0.0
    check_forward(backend, logits, labels)
    check_backward(backend, logits, labels, torch.empty_like(logits))
    logps, _ = backend.logits_logps(logits, labels, head(logits))
    assert logps[4].item() == 0.0
    assert logps[5].item() == 0.0


def check_common_offset(backend: ModuleType, device: str = "cpu") -> None:
    """(z − max) − log Σ is exact where z − lse would lose three digits, both ways."""
    for offset in (100.0, -1e3, 1e4):
        logits = (offset + 4 * torch.randn(16, 500)).to(device)
        labels = torch.randint(0, 500, (16,)).to(device)
        ours, lse = backend.logits_logps(logits, labels, head(logits))
        wide = logits.double().requires_grad_()
        exact = wide.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        (gradient,) = torch.autograd.grad(exact.sum(), wide)
        assert (ours - exact).abs().max() < 4e-6
        out = torch.empty_like(logits)
        backend.logits_logps_backward(torch.ones_like(ours), logits, labels, lse, head(logits), out)
        assert (out - gradient).abs().max() < 1e-6


def check_infinities_and_nan(backend: ModuleType, device: str = "cpu") -> None:
    logits, labels = logits_and_labels(torch.float32, 6, 300, device=device)
    logits[0] = -math.inf
    logits[1, 7] = math.inf
    logits[2, 7], labels[2] = math.inf, 7
    logits[3, 9] = math.nan
    logits[4, labels[4]] = -math.inf
    ours = summed(*backend.logits_logps(logits, labels, head(logits)))
    exact = summed(*reference.logits_logps(logits.double(), labels, head(logits)))
    for mine, oracle in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, oracle.float(), equal_nan=True)
    capped = head(logits, softcap=5.0)
    ours = summed(*backend.logits_logps(logits, labels, capped))
    exact = summed(*reference.logits_logps(logits.double(), labels, capped))
    for mine, oracle in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, oracle.float(), equal_nan=True)


def check_labels_outside(backend: ModuleType, device: str = "cpu") -> None:
    logits, labels = logits_and_labels(torch.bfloat16, 3, 50, device=device)
    labels[1], labels[2] = 50, 1 << 40
    logps, lse = backend.logits_logps(logits, labels, head(logits))
    assert logps.isnan().tolist() == [False, True, True]
    assert lse.isfinite().all()
    # Their gradient has no label's entry.
    out = torch.empty_like(logits)
    backend.logits_logps_backward(torch.ones_like(logps), logits, labels, lse, head(logits), out)
    softmax = logits.float().softmax(-1)
    torch.testing.assert_close(out[1:], -softmax[1:].to(out.dtype), rtol=2e-2, atol=1e-6)


def check_neighbours_under_a_softcap(
    backend: ModuleType, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Small logits, alone and with a large one in every third vector."""
    vocab = 5003
    small, labels = logits_and_labels(dtype, 2, vocab, spread=0.5, device=device)
    h, mixed = head(small, softcap=10.0), small.clone()
    large = torch.arange(3, vocab, 24, device=device)
    mixed[:, large] = 9.0
    lse = torch.tensor([[10.0, 2.0]], device=device).repeat(2, 1)
    grad = torch.ones(2, device=device)
    results = []
    for logits in (small, mixed):
        check_forward(backend, logits, labels, softcap=10.0)
        check_backward(backend, logits, labels, torch.empty_like(logits), softcap=10.0)
        out = torch.empty_like(logits)
        backend.logits_logps_backward(grad, logits, labels, lse, h, out)
        out[:, large] = 0.0
        results.append(bits(out))
    assert_same_bits(*results)


def check_certain_labels(backend: ModuleType, dtype: torch.dtype, device: str = "cpu") -> None:
    """Forward and backward round a logit alike: probability 1 is exactly 1."""
    logits, labels = logits_and_labels(dtype, 64, 1, device=device)
    for transform in TRANSFORMS:
        h = head(logits, **transform)
        logps, lse = backend.logits_logps(logits, labels, h)
        out = torch.full_like(logits, POISON)
        backend.logits_logps_backward(torch.ones_like(logps), logits, labels, lse, h, out)
        assert not logps.any()
        assert not out.any()


def check_target_logits(
    backend: ModuleType,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,
    bias: Tensor | None = None,
    **transform,
) -> None:
    ours = backend.target_logits(hidden, Head(weight, bias, **transform), labels)
    results = []
    for dtype in (torch.float32, torch.float64):
        cast = Head(weight.to(dtype), None if bias is None else bias.to(dtype), **transform)
        results.append(reference.target_logits(hidden.to(dtype), cast, labels))
    base, exact = results
    assert ours.dtype == torch.float32
    # An fp32 dot's error is relative to the sum of magnitudes, not to its possibly cancelled value.
    magnitude = (hidden.double().abs() * weight.double()[labels].abs()).sum(-1)
    magnitude = magnitude * abs(transform.get("scale", 1.0)) / transform.get("temperature", 1.0)
    slack = (magnitude.max() / exact.abs().max()).clamp(min=1).item() if len(labels) else 1.0
    assert_as_accurate(ours, base, exact, 2, "target logits", slack=slack)


def sequences(
    lengths: list[int], device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:  # logps [N], offsets [2B + 1], ref [2B]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    logps = -3 * torch.rand(int(offsets[-1]))
    sums = reference.sequence_sums(logps, offsets.diff())
    ref = sums + torch.randn(len(lengths)) * 3
    return logps.to(device), offsets.to(device), ref.to(device)


def check_sequence_loss(
    backend: ModuleType,
    logps: Tensor,
    offsets: Tensor,
    ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    average: bool = False,
    pairs: str = "concatenated",
) -> None:
    options = (beta, label_smoothing, average, pairs)
    ours = backend.sequence_loss(logps, offsets, ref, *options)
    base = reference.sequence_loss(logps, offsets, ref, *options)
    exact = reference.sequence_loss(logps.double(), offsets, ref.double(), *options)
    for name, o, b, e in zip(ours._fields, ours, base, exact, strict=True):
        assert o.dtype == torch.float32
        assert_as_accurate(o, b, e, 2, name)


def fused_reference(
    logits: Tensor,  # [N, V] in fp64 or fp32
    labels: Tensor,  # [N]
    h: Head,
    offsets: Tensor,  # [2B + 1]
    ref: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    pairs: str,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [], margins [B], ∂loss/∂logits [N, V]
    """The whole loss written down again in autograd, sequence by sequence."""
    leaf = torch.where((labels >= 0).unsqueeze(1), logits, 0.0).requires_grad_()
    z = leaf * h.scale
    if h.softcap is not None:
        z = h.softcap * torch.tanh(z / h.softcap)
    logps = (z / h.temperature).log_softmax(-1)
    rewards = []
    for s, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        kept = [t for t in range(begin, end) if labels[t] >= 0]
        total = logits.new_zeros(())
        for t in kept:
            total = total + logps[t, labels[t]]
        if average and kept:
            total = total / len(kept)
        rewards.append(beta * (total - ref[s]))
    half = len(rewards) // 2
    if pairs == "concatenated":
        margins = torch.stack(rewards[:half]) - torch.stack(rewards[half:])
    else:
        margins = torch.stack(rewards[::2]) - torch.stack(rewards[1::2])
    chosen = torch.nn.functional.logsigmoid(margins)
    rejected = torch.nn.functional.logsigmoid(-margins)
    loss = -((1 - label_smoothing) * chosen + label_smoothing * rejected).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), margins.detach(), gradient


def check_fused(
    backend: ModuleType,
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    ref: Tensor,
    *,
    upstream: float = 1.0,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    average: bool = False,
    pairs: str = "concatenated",
    **transform,
) -> None:
    """Logits to loss and back, against autograd through the same formulae."""
    h = head(logits, **transform)
    options = (beta, label_smoothing, average, pairs)
    ours = backend.logits_sequence_loss(logits, labels, h, offsets, ref, *options)
    gradient = torch.full_like(logits, POISON)
    backend.logits_logps_backward(
        ours.row_coefficients, logits, labels, ours.lse, h, gradient,
        grad_scale=torch.tensor(upstream, device=logits.device),
    )  # fmt: skip
    base = fused_reference(logits.float(), labels, h, offsets, ref.float(), *options)
    exact = fused_reference(logits.double(), labels, h, offsets, ref.double(), *options)
    assert_as_accurate(ours.loss.loss, base[0], exact[0], 2, "loss")
    # A margin is a difference of sums: its roundings are relative to those.
    terms = beta * ours.loss.logps.abs().max() + ours.loss.rewards.abs().max()
    slack = (terms / exact[1].abs().max()).clamp(min=1).item()
    rewards = ours.loss.rewards
    both = rewards.view(2, -1) if pairs == "concatenated" else rewards.view(-1, 2).t()
    assert_as_accurate(both[0] - both[1], base[1], exact[1], 2, "margins", slack=slack)
    base_gradient = (base[2] * upstream).to(logits.dtype)
    assert_as_accurate(gradient, base_gradient, exact[2] * upstream, 3, "gradient")
    assert bool((ours.row_coefficients[labels < 0] == 0).all())


def bits(*results: object) -> list[Tensor]:
    """Every tensor of a result as integers, so that equality is of bits."""
    found = []
    for result in results:
        if isinstance(result, Tensor):
            kind = torch.int32 if result.element_size() == 4 else torch.int16
            found.append(result.contiguous().view(kind).clone())
        else:
            found += bits(*result)
    return found


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def far_apart(matrix: Tensor, stride: int) -> Tensor:
    """The same rows with so many elements between them: virtual memory that nobody touches."""
    rows, columns = matrix.shape
    filled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # which would fill it
    storage = torch.empty(rows * stride, dtype=matrix.dtype)
    torch.use_deterministic_algorithms(filled)
    return storage.as_strided((rows, columns), (stride, 1)).copy_(matrix)


def check_rows_beyond_two_to_the_31_elements(backend: ModuleType) -> None:
    logits = far_apart(torch.randn(2, 100).to(torch.bfloat16), (1 << 31) + 24)
    labels = torch.tensor([3, 99])
    check_forward(backend, logits, labels)
    check_backward(backend, logits, labels, logits)
