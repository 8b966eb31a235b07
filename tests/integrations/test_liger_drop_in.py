"""FusedLinearDPOLoss against Liger-Kernel's LigerFusedLinearDPOLoss itself, and where the two
differ on purpose.
"""

from __future__ import annotations

import pytest
import torch

from fastdpo.loss import FusedLinearDPOLoss

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="needs liger-kernel")

B, T, D, V = 3, 7, 16, 131
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)


def inputs(bias=True):
    g = torch.Generator().manual_seed(3)
    x, ref_x = (torch.randn(2 * B, T, D, generator=g) for _ in range(2))
    w, ref_w = (0.3 * torch.randn(V, D, generator=g) for _ in range(2))
    b, ref_b = (torch.randn(V, generator=g) if bias else None for _ in range(2))
    target = torch.randint(0, V, (2 * B, T), generator=g)
    target[:, :2] = -100
    target[1, 5:] = -100
    return w, x, target, b, ref_x, ref_w, ref_b


def run(module, tensors, use_ref=True):
    w, x, target, b, *ref = tensors
    trained = [None if t is None else t.clone().requires_grad_() for t in (w, x, b)]
    loss, aux = module(trained[0], trained[1], target, trained[2], *(ref if use_ref else ()))
    loss.backward()
    return [loss.detach(), *(a.detach() for a in aux)], [t.grad for t in trained if t is not None]


def compare(ours, theirs):
    for group in range(2):
        for i, (a, b) in enumerate(zip(ours[group], theirs[group], strict=True)):
            torch.testing.assert_close(
                a, b, atol=2e-5, rtol=2e-5, msg=lambda m, at=(group, i): f"{at}: {m}"
            )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_loss_type(loss_type, bias):
    smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    kwargs = {"loss_type": loss_type, "label_smoothing": smoothing, "beta": 0.2}
    ours = run(FusedLinearDPOLoss(**kwargs), inputs(bias))
    theirs = run(liger.LigerFusedLinearDPOLoss(**kwargs, compiled=False), inputs(bias))
    compare(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"compute_nll_loss": True, "alpha": 0.7},
        {"average_log_prob": True},
        {"use_ref_model": False},
        {"use_ref_model": False, "loss_type": "apo_zero"},
        {"ignore_index": 5},
        {"discopop_tau": 0.2, "loss_type": "discopop"},
        {"chunk_size": 2, "compiled": False},
    ],
    ids=str,
)
def test_options(kwargs):
    use_ref = kwargs.get("use_ref_model", True)
    tensors = list(inputs())
    if "ignore_index" in kwargs:
        tensors[2] = tensors[2].masked_fill(tensors[2] == -100, kwargs["ignore_index"])
    ours = run(FusedLinearDPOLoss(**kwargs), tensors, use_ref)
    theirs = run(liger.LigerFusedLinearDPOLoss(**{**kwargs, "compiled": False}), tensors, use_ref)
    compare(ours, theirs)


def test_label_smoothing_works_with_sigmoid():
    smooth = run(FusedLinearDPOLoss(label_smoothing=0.3), inputs())[0]
    plain = run(FusedLinearDPOLoss(), inputs())[0]
    margin = plain[6] - plain[7]
    expected = -(0.7 * margin.sigmoid().log() + 0.3 * (-margin).sigmoid().log()).mean()
    torch.testing.assert_close(smooth[0], expected)
    assert not torch.allclose(smooth[0], plain[0])


def test_nothing_to_learn_is_a_margin_of_0():
    w, x, target, b, *ref = inputs()
    target = torch.full_like(target, -100)
    (loss, *_), grads = run(FusedLinearDPOLoss(compute_nll_loss=True), (w, x, target, b, *ref))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    assert all((g == 0).all() for g in grads)


def test_bad_input():
    with pytest.raises(ValueError, match="dpo2"):
        FusedLinearDPOLoss(loss_type="dpo2")
    with pytest.raises(ValueError, match="label_smoothing"):
        FusedLinearDPOLoss(loss_type="exo_pair")
    w, x, target, b, *_ = inputs()
    with pytest.raises(ValueError, match="ref_input"):
        FusedLinearDPOLoss()(w, x, target, b)
    with pytest.raises(ValueError, match="whole pairs"):
        FusedLinearDPOLoss(use_ref_model=False)(w, x[:3], target[:3], b)
