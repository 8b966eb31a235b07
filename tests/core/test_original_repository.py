"""get_batch_logps and preference_loss: the semantics of the original DPO repository."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_as_accurate

from fastdpo.loss import get_batch_logps, preference_loss

S, T, V = 4, 9, 257


def expected_logps(logits, labels, average=False):
    """Σ_t log softmax(logits[t])[labels[t + 1]] over labels that are not −100, one token at a
    time.
    """
    rows = []
    for s in range(len(labels)):
        z = logits[s].log_softmax(-1)
        terms = [
            z[t, labels[s, t + 1]] for t in range(labels.shape[1] - 1) if labels[s, t + 1] != -100
        ]
        total = sum(terms, z.sum() * 0)
        rows.append(total / max(1, len(terms)) if average else total)
    return torch.stack(rows)


def make(dtype=torch.float32):
    logits = (2 * torch.randn(S, T, V)).to(dtype)
    labels = torch.randint(0, V, (S, T))
    labels[:, :3] = -100
    labels[1, 5:] = -100
    labels[3] = -100  # nothing carries loss
    labels[3, 0] = 7  # not even this: the first label has no logits before it
    return logits, labels


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("average", [False, True])
def test_get_batch_logps(dtype, average):
    logits, labels = make(dtype)
    before = labels.clone()

    def run(function, z):
        z = z.detach().clone().requires_grad_()
        out = function(z)
        (grad,) = torch.autograd.grad(out, z, torch.linspace(-1, 1, S, dtype=out.dtype))
        return out.detach(), grad

    ours, grad = run(lambda z: get_batch_logps(z, labels, average_log_prob=average), logits)
    base, base_grad = run(
        lambda z: expected_logps(z.float() if dtype.itemsize == 2 else z, labels, average), logits
    )
    oracle, oracle_grad = run(lambda z: expected_logps(z, labels, average), logits.double())
    assert grad.dtype == dtype
    assert ours[3] == 0
    assert (grad[3] == 0).all()
    assert torch.equal(labels, before)
    assert_as_accurate(ours, base, oracle, 2, "logps")
    assert_as_accurate(grad, base_grad, oracle_grad, 3, "grad")


def test_get_batch_logps_gradcheck():
    logits, labels = make(torch.float64)
    small = logits[..., :11].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: get_batch_logps(z, labels.clamp(max=10)), small)


def test_extreme_logits():
    logits, labels = make(torch.float32)
    logits *= 5_000
    ours = get_batch_logps(logits, labels)
    torch.testing.assert_close(
        ours, expected_logps(logits.double(), labels).float(), rtol=1e-6, atol=0.0
    )


def test_bad_logits_and_labels():
    logits, labels = make()
    for name, bad in {
        "logits": (logits[0], labels),
        "labels": (logits, labels[:, 1:]),
        "labels should be in": (logits, labels.masked_fill(labels > 0, V)),
    }.items():
        with pytest.raises(ValueError, match=name):
            get_batch_logps(*bad)


@pytest.mark.parametrize(
    "case", [{}, {"label_smoothing": 0.1}, {"ipo": True}, {"reference_free": True}], ids=str
)
def test_preference_loss(case):
    beta = 0.3
    pc, pr, rc, rr = (10 * torch.randn(5, dtype=torch.float64) for _ in range(4))
    pc.requires_grad_()
    losses, chosen, rejected = preference_loss(pc, pr, rc, rr, beta, **case)
    for i in range(5):
        h = (pc[i] - pr[i]).item() - (0.0 if case.get("reference_free") else (rc[i] - rr[i]).item())
        eps = case.get("label_smoothing", 0.0)
        if case.get("ipo"):
            want = (h - 1 / (2 * beta)) ** 2
        else:
            want = (1 - eps) * math.log1p(math.exp(-beta * h)) + eps * math.log1p(
                math.exp(beta * h)
            )
        assert losses[i].item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(chosen, beta * (pc - rc).detach())
    torch.testing.assert_close(rejected, beta * (pr - rr))
    assert losses.requires_grad
    assert not chosen.requires_grad


def test_preference_loss_bad_input():
    a = torch.zeros(3)
    with pytest.raises(ValueError, match="reference_rejected_logps"):
        preference_loss(a, a, a, torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="beta"):
        preference_loss(a, a, a, a, 0.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        preference_loss(a, a, a, a, 0.1, label_smoothing=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_preference_loss_of_an_impossible_or_a_sure_answer(dtype):
    chosen = torch.tensor([-2.0, -2.0, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-math.inf, -82.0, -2.0], dtype=dtype)
    references = torch.full((3,), -2.0, dtype=dtype)
    losses, _, _ = preference_loss(chosen, rejected, references, references, 1.0)
    (grad,) = torch.autograd.grad(losses.sum(), chosen)
    assert losses.dtype == grad.dtype == dtype
    tiny, far = math.exp(-80.0), -2.0 - chosen[2].item()
    assert losses.tolist() == pytest.approx([0.0, tiny, far], rel=1e-2, abs=0)
    assert grad.tolist() == pytest.approx([0.0, -tiny, -1.0], rel=1e-2, abs=0)
