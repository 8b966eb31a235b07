"""What the public functions over materialized logits must do, on any device and backend."""

from __future__ import annotations

import torch
from oracle import assert_as_accurate

from fastdpo.loss import linear_dpo_loss, logits_dpo_loss

HEAD = {"logit_scale": 1.3, "softcap": 9.0, "temperature": 0.8}
B, T, V = 2, 9, 301


def data(dtype, device="cpu"):
    """logits [2B, T, V], labels [2B, T] with prompts and padding, reference per sequence and per
    token.
    """
    g = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(2 * B, T, V, generator=g)).to(dtype)
    labels = torch.randint(0, V, (2 * B, T), generator=g)
    for s in range(2 * B):
        labels[s, : 1 + s % 3] = -100
        labels[s, T - s % 2 :] = -100
    ref = -6 * torch.rand(2 * B, T, generator=g)
    found = (logits, labels, (ref * (labels != -100)).sum(-1), ref)
    return tuple(t.to(device) for t in found)


def check_logits_dpo_loss(dtype, packed, reference, *, device="cpu", **options):
    """Against linear_dpo_loss in fp64, whose hidden states are the logits and whose head is 1; with
    the gradient of what is logged, too.
    """
    logits, labels, sums, tokens = data(dtype, device)
    if options.get("average_log_prob"):
        sums = sums / (labels != -100).sum(-1)
    ref = {"sequences": sums, "tokens": tokens, "none": None}[reference]
    layout = {}
    if packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        ref = ref.flatten() if reference == "tokens" else ref
        layout["cu_seqlens"] = torch.arange(0, 2 * B * T + 1, T, device=device)

    def run(function, dtype, **more):
        z = logits.to(dtype).requires_grad_()
        r = None if ref is None else ref.double() if dtype == torch.float64 else ref
        out = function(z, labels=labels, ref_logps=r, **HEAD, **layout, **options, **more)
        objective = out.loss + 0.01 * out.chosen_logps.sum()
        (grad,) = torch.autograd.grad(objective, z)
        return [t.detach() for t in out], grad

    one = torch.eye(V, dtype=torch.float64, device=device)
    exact, exact_grad = run(linear_dpo_loss, torch.float64, weight=one, backend="torch")
    base, base_grad = run(linear_dpo_loss, torch.float32, weight=one.float(), backend="torch")
    ours, grad = run(logits_dpo_loss, dtype)
    for a, b, c in zip(ours, base, exact, strict=True):
        assert_as_accurate(a, b, c, 2, "output", slack=4.0)
    assert grad.dtype == dtype
    assert_as_accurate(grad, base_grad.to(dtype), exact_grad, 3, "gradient")
