"""What training loops do around a loss: autocast, master weights, loss scaling, tied embeddings,
accumulation.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, eager_logps
from torch import nn

from fastdpo.loss import linear_dpo_loss, linear_logps

N, V, D = 40, 700, 32


class TinyLM(nn.Module):
    """Embedding, one layer, tied or own lm_head: enough for gradients to reach a weight by two
    ways.
    """

    def __init__(self, tied=True, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(V, D, dtype=dtype)
        self.layer = nn.Linear(D, D, dtype=dtype)
        self.head = nn.Linear(D, V, bias=not tied, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, ids):
        return torch.tanh(self.layer(self.embed(ids)))


def fused(model, ids, labels):
    return linear_logps(model.hidden(ids), model.head.weight, labels, bias=model.head.bias)


def eager(model, ids, labels):
    return eager_logps(model.hidden(ids), model.head.weight, labels, model.head.bias)


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, V, (2, N), generator=g)
    labels[::4] = -100
    return ids, labels


def gradients(model, logps_of, *, scale=1.0, autocast=None, batches=1):
    model = copy.deepcopy(model)
    for seed in range(batches):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = -logps_of(model, *data(seed)).mean()
        (loss * scale).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(model, **situation):
    """Gradients of every parameter: ours against fp64, with eager in the same situation as the
    baseline.
    """
    _, ours = gradients(model, fused, **situation)
    _, base = gradients(model, eager, **situation)
    situation["autocast"] = None
    _, oracle = gradients(copy.deepcopy(model).double(), eager, **situation)
    for name, want in oracle.items():
        assert ours[name].dtype == base[name].dtype
        assert_as_accurate(ours[name], base[name], want, 3, name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tied_embeddings_and_own_head(tied, dtype):
    check(TinyLM(tied, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_autocast_over_fp32_master_weights(dtype, tied):
    check(TinyLM(tied), autocast=dtype)


def test_autocast_chooses_the_dtype_of_the_product():
    hidden, weight = torch.randn(N, D), torch.randn(V, D, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logps(hidden, weight, labels)
    rounded = linear_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(ours, rounded)
    assert ours.dtype == torch.float32
    ours.sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # mixed dtypes, which are refused outside
        linear_logps(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="weight"):
        linear_logps(hidden.bfloat16(), weight, labels)


def test_gradient_accumulation():
    check(TinyLM(), batches=3)


def test_loss_scaling_keeps_small_fp16_gradients():
    """With the scale that GradScaler starts from, in fp16, as accurate as eager at the same
    scale.
    """
    check(TinyLM(False, torch.float16), scale=2.0**14)


def test_grad_scaler_steps_and_skips():
    def run(logps_of):
        torch.manual_seed(1)
        model = TinyLM(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        for step in range(5):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = -logps_of(model, *data(step)).mean()
            if step == 2:
                loss = loss * float("inf")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale(), model

    (our_scale, ours), (base_scale, base) = run(fused), run(eager)
    assert our_scale == base_scale
    for a, b in zip(ours.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)


def test_gradient_checkpointing():
    model = TinyLM()
    ids, labels = data()
    fused(model, ids, labels).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(
        lambda i: fused(model, i, labels), ids, use_reentrant=False
    ).sum().backward()
    for a, p in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_a_training_run_coincides_with_eager():
    """Ten DPO steps with AdamW: the same losses as eager PyTorch, and they fall."""

    def run(fused_loss):
        torch.manual_seed(2)
        model = TinyLM()
        reference = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(10):
            ids, labels = (t.view(4, N // 4) for t in data(step % 2))
            hidden, ref_hidden = model.hidden(ids), reference.hidden(ids)
            if fused_loss:
                loss = linear_dpo_loss(
                    hidden,
                    model.head.weight,
                    labels,
                    ref_hidden=ref_hidden,
                    ref_weight=reference.head.weight,
                ).loss
            else:
                h = eager_logps(hidden, model.head.weight, labels).sum(-1)
                h = h - eager_logps(ref_hidden, reference.head.weight, labels).sum(-1)
                loss = -F.logsigmoid(0.1 * (h[:2] - h[2:])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, base = run(True), run(False)
    assert ours == pytest.approx(base, rel=2e-4)
    assert ours[-1] < 0.5 * ours[0]
