"""is_top1 where several logits are the largest: the label is the first of them, or it is not."""

from __future__ import annotations

import pytest
import torch
from devices import device_of, of_processes
from sampling import sampled

from fastdpo.backends import torch as torch_backend
from fastdpo.loss import linear_logps
from fastdpo.parallel import VocabParallel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 300, 100), (2, 40, 512), (20, 300, 48), (17, 65, 896), (5, 2, 64), (33, 1000, 100)]
BACKENDS = ["torch", "triton"]
# Interpreted, infinities make numpy talk.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tied(shape, dtype, copies=2, seed=0):
    """hidden, weight, bias, and the entries [n, copies] that share each row's maximum."""
    n, vocab, d = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g)
    weight, bias = 0.05 * torch.randn(vocab, d, generator=g), torch.randn(vocab, generator=g)
    # A few groups of equal entries, far apart, and for each a direction in which it is the largest.
    groups = max(1, min(n, vocab // (2 * copies)))
    entries = torch.randperm(vocab, generator=g)[: groups * copies].view(groups, copies).sort(1)[0]
    for group in entries:
        weight[group], bias[group] = weight[group[0]].clone(), bias[group[0]].clone()
    mine = entries[torch.arange(n) % groups]
    own = weight[mine[:, 0]]
    hidden += 40 * own / own.norm(dim=1, keepdim=True)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    z = hidden.double() @ weight.double().t() + bias.double()
    z.scatter_(1, mine, -torch.inf)
    largest = (hidden.double() @ weight.double().t() + bias.double()).gather(1, mine[:, :1])
    assert (largest > z.amax(1, keepdim=True) + 1e-3).all() or vocab == copies
    return hidden, weight, bias, mine


def is_top1(hidden, weight, bias, labels, *, backend, **options):
    tensors = (hidden, weight, labels, bias)
    hidden, weight, labels, bias = (
        None if t is None else t.to(device_of(backend)) for t in tensors
    )
    found = linear_logps(
        hidden, weight, labels, bias=bias, stats=("is_top1",), backend=backend, **options
    )
    return found.is_top1.cpu()


@pytest.mark.parametrize("head", [{}, {"temperature": 0.7, "logit_scale": 1.3}, {"softcap": 30.0}])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    sampled(
        [(b, t) for b in BACKENDS for t in DTYPES if (b, t) != ("triton", torch.float64)],
        [*(("torch", t) for t in DTYPES), ("triton", torch.bfloat16)],
        several=True,
    ),
    ids=str,
)
def test_equal_entries(backend, dtype, shape, head):
    slow = shape[0] * shape[1] * shape[2] > 600_000 or (shape == (5, 2, 64) and head)
    if slow and backend == "triton" and device_of(backend).type == "cpu":
        pytest.skip("too slow interpreted: `pytest -m gpu` on a machine that has one")
    for copies in (2, 3) if shape[1] > 10 and backend == "torch" else (2,):
        hidden, weight, bias, entries = tied(shape, dtype, copies)
        for place in range(copies):
            found = is_top1(hidden, weight, bias, entries[:, place], backend=backend, **head)
            assert torch.equal(found, torch.full_like(found, place == 0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(20, 9001, 896), (3, 9000, 2049)], ids=str)
def test_equal_entries_of_several_tiles(shape, threads, monkeypatch):
    """Products of several shapes, whose sums need not agree."""
    monkeypatch.setitem(torch_backend._TILE_ELEMENTS, "cpu", 1 << 15)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden, weight, bias, entries = tied(shape, torch.float32)
        for place in range(2):
            found = is_top1(hidden, weight, bias, entries[:, place], backend="torch")
            assert torch.equal(found, torch.full_like(found, place == 0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_entries_are_equal(backend):
    """Zeros in the head or in hidden, one row over and over, a saturated softcap."""
    n, vocab, d = 6, 150, 32
    labels = torch.tensor([0, 1, 149, 70, 0, 64])
    hidden, weight = torch.randn(n, d), torch.randn(1, d).expand(vocab, d).contiguous()
    saturated = torch.where(torch.arange(vocab) < 64, -1.0, 1.0).unsqueeze(1) * weight * 1e3
    large = hidden * torch.sign(hidden @ weight[0]).unsqueeze(1)
    first = torch.where(labels == 64, True, False)
    for h, w, expected, head in (
        (hidden, weight, labels == 0, {}),
        (hidden * 0, weight, labels == 0, {}),
        (hidden, weight * 0, labels == 0, {}),
        (hidden, weight * 0, labels == 0, {"softcap": 3.0}),
        (large, saturated, first, {"softcap": 2.0}),
    ):
        assert torch.equal(is_top1(h, w, None, labels, backend=backend, **head), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_argmax_of_logits_without_roundings(backend):
    """Small integers, whose sums are exact in any order: as PyTorch's own argmax has it."""
    hidden, weight = (torch.randint(-2, 3, (m, 12)).float() for m in (60, 150))
    bias = torch.randint(-1, 2, (150,)).float()
    bias[::7] = -torch.inf
    z = hidden @ weight.t() + bias
    ties = (z == z.amax(1, keepdim=True)).sum(1) > 1
    assert ties.sum() > 5
    for labels in (z.argmax(1), 149 - z.flip(1).argmax(1), torch.randint(0, 150, (60,))):
        found = is_top1(hidden, weight, bias, labels, backend=backend)
        assert torch.equal(found, z.argmax(1) == labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_can_occur(backend):
    bias = torch.full((70,), -torch.inf)
    labels = torch.tensor([0, 1, 69])
    found = is_top1(torch.randn(3, 8), torch.randn(70, 8), bias, labels, backend=backend)
    assert found.tolist() == [True, False, False]


def _shared(sizes, hidden, weight, bias, labels, backend):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    spread = VocabParallel.of(sizes)
    mine = slice(ends[spread.rank] - sizes[spread.rank], ends[spread.rank])
    return is_top1(hidden, weight[mine], bias[mine], labels, vocab_parallel=spread, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_equal_entries_of_several_processes(three, dtype, backend):
    """Ties go to the lowest entry of the whole vocabulary."""
    of_processes(backend)
    hidden, weight, bias, entries = tied((20, 300, 96), dtype, copies=3)
    for sizes in ((100, 100, 100), (7, 250, 43)):
        for place in range(3):
            found = three.run(_shared, sizes, hidden, weight, bias, entries[:, place], backend)
            for each in found:
                assert torch.equal(each, torch.full_like(each, place == 0))
