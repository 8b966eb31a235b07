"""torch.compile(fullgraph=True) of a training step: no graph break, and the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from sampling import sampled
from torch import nn

from fastdpo.core import checks
from fastdpo.core.call import Call
from fastdpo.loss import FusedLinearDPOLoss, linear_dpo_loss, linear_logps

B, T, D, V = 2, 6, 16, 211


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, ref = torch.randn(2, 2 * B, T, D, generator=g)
    labels = torch.randint(0, V, (2 * B, T), generator=g)
    labels[:, : 1 + seed] = -100
    labels[1, 4:] = -100
    return hidden, ref, labels


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compare(function, module, inputs, backend="aot_eager"):
    """Outputs and parameter gradients of the compiled and of the eager function."""
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        m = copy.deepcopy(module)
        out = f(m, *inputs)
        out[0].sum().backward()
        results.append([*(t.detach() for t in out), *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


OPTIONS = {
    "sigmoid": {},
    "smoothing": {"label_smoothing": 0.1, "average_log_prob": True},
    "ipo": {"objective": "ipo"},
    "simpo": {"objective": "simpo"},
    "mpo": {"objective": {"sigmoid": 0.8, "sft": 0.2}},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.5},
    "no workspace": {"workspace_bytes": 0},
    "half a workspace": {"workspace_bytes": 3000},
}


@pytest.mark.parametrize(
    ("name", "frozen"),
    sampled(
        [(name, frozen) for name in OPTIONS for frozen in (True, False)],
        [*((name, False) for name in OPTIONS), ("sigmoid", True), ("half a workspace", True)],
        several=True,
    ),
)
def test_a_step_compiles_whole(name, frozen):
    hidden, ref, labels = data()
    options = OPTIONS[name]
    module = nn.ModuleDict({"layer": nn.Linear(D, D), "head": nn.Linear(D, V)})
    module["head"].requires_grad_(not frozen)

    def step(m, hidden, ref, labels):
        return linear_dpo_loss(
            torch.tanh(m["layer"](hidden)),
            m["head"].weight,
            labels,
            bias=m["head"].bias,
            ref_hidden=None if name == "simpo" else ref,
            **options,
        )

    if frozen:
        for p in module["head"].parameters():
            p.requires_grad_(False)

        def trainable(m, *inputs):
            return step(m, *inputs)

        results = []
        for f in (trainable, torch.compile(trainable, fullgraph=True, backend="aot_eager")):
            m = copy.deepcopy(module)
            out = f(m, hidden, ref, labels)
            out[0].backward()
            results.append([*(t.detach() for t in out), m["layer"].weight.grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    else:
        compare(step, module, (hidden, ref, labels))


@pytest.mark.parametrize("objective", ["sigmoid", "plackett_luce", "kto"])
def test_under_a_default_device(objective):
    """A mode that intercepts functions: methods that PyTorch wrote in Python do not trace there."""
    hidden, ref, labels = data()
    module = nn.Linear(D, V)
    options = {
        "kto": {"desirable": torch.tensor([True, False, True, False]), "kl": 0.0},
        "plackett_luce": {"num_candidates": 4},
    }

    def step(m, hidden, ref, labels):
        return linear_dpo_loss(
            hidden,
            m.weight,
            labels,
            bias=m.bias,
            ref_hidden=ref,
            objective=objective,
            **options.get(objective, {}),
        )

    torch.set_default_device("cpu")
    try:
        compare(step, module, (hidden, ref, labels))
    finally:
        torch.set_default_device(None)


def test_through_inductor():
    hidden, ref, labels = data()
    module = nn.ModuleDict({"layer": nn.Linear(D, D), "head": nn.Linear(D, V)})

    def step(m, hidden, ref, labels):
        h = torch.tanh(m["layer"](hidden))
        return linear_dpo_loss(h, m["head"].weight, labels, bias=m["head"].bias, ref_hidden=ref)

    compare(step, module, (hidden, ref, labels), backend="inductor")


def test_packed_and_row_index():
    hidden, _, labels = data()
    ends = torch.arange(0, 2 * B * T + 1, T, dtype=torch.int32)
    index = (labels.flatten() != -100).nonzero().squeeze(1)
    module = nn.Linear(D, V)

    def step(m, hidden, labels, ends, index):
        return linear_dpo_loss(
            hidden, m.weight, labels, bias=m.bias, cu_seqlens=ends, row_index=index
        )

    compare(step, module, (hidden.flatten(0, 1), labels.flatten(), ends, index))


def test_statistics_and_liger():
    hidden, ref, labels = data()
    module = nn.Linear(D, V)

    def logps(m, hidden, labels):
        out = linear_logps(
            hidden, m.weight, labels, bias=m.bias, stats=("entropy", "is_top1", "mean_logits")
        )
        return out.logps, out.entropy, out.is_top1.float(), out.mean_logits

    compare(logps, module, (hidden, labels))
    liger = FusedLinearDPOLoss(compute_nll_loss=True)

    def step(m, hidden, ref, labels):
        loss, aux = liger(m.weight, hidden, labels, m.bias, ref, m.weight.detach())
        return loss, *aux

    compare(step, module, (hidden, ref, labels))


def test_one_graph_serves_other_labels_and_lengths():
    module = nn.Linear(D, V)

    def step(hidden, labels):
        return linear_dpo_loss(hidden, module.weight, labels, bias=module.bias).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, length in ((0, T), (1, T), (2, T - 1)):
        hidden, _, labels = data(seed)
        hidden, labels = hidden[:, :length], labels[:, :length]
        torch.testing.assert_close(compiled(hidden, labels), step(hidden, labels))


def test_autocast_and_no_grad():
    hidden, _, labels = data()
    module = nn.Linear(D, V)

    def step(m, hidden, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_dpo_loss(hidden, m.weight, labels, bias=m.bias)

    compare(step, module, (hidden, labels))
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(module, hidden, labels).loss, step(module, hidden, labels).loss
        )


def test_bad_labels_are_refused_when_the_graph_runs():
    hidden, _, labels = data()
    module = nn.Linear(D, V)

    def step(hidden, labels):
        return linear_logps(hidden, module.weight, labels, bias=module.bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(hidden, labels)
    with pytest.raises(ValueError, match="labels should be in"):
        compiled(hidden, labels.masked_fill(labels > 0, V))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"average_log_prob": True}, {"ld_alpha": 0.5}], ids=str)
def test_a_reference_per_token_says_anything_where_nothing_carries_loss(options, given):
    hidden, _, labels = data()
    weight, ref = torch.randn(V, D), -5 * torch.rand(labels.shape)
    ref[labels == -100] = torch.nan
    index = (labels.flatten() != -100).nonzero().squeeze(1)[: -2 if given else None]

    def step(hidden, weight, labels, ref, index):
        row_index = index if given else None
        return linear_dpo_loss(
            hidden, weight, labels, ref_logps=ref, row_index=row_index, **options
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = hidden, weight, labels, ref, index
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    assert step(*inputs).isfinite()


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_are_found_once(frozen, monkeypatch):
    """For policy, reference and backward: on a GPU that is what a step waits for."""
    hidden, ref, labels = data()
    module = nn.Linear(D, V).requires_grad_(not frozen)
    layer = nn.Linear(D, D)
    calls = []
    look = checks.label_values
    monkeypatch.setattr(checks, "label_values", lambda *a: calls.append(a) or look(*a))

    def step(hidden, ref, labels):
        h = torch.tanh(layer(hidden))
        return linear_dpo_loss(h, module.weight, labels, bias=module.bias, ref_hidden=ref).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(hidden, ref, labels).backward()
    calls.clear()
    compiled(hidden, ref, labels).backward()
    assert len(calls) == 1


def test_bad_arguments_are_refused_while_tracing():
    hidden, _, labels = data()
    weight = torch.randn(V, D)
    compiled = torch.compile(linear_dpo_loss, backend="aot_eager")
    with pytest.raises(Exception, match="pairs should be one of"):
        compiled(hidden, weight, labels, pairs="zipped")


def test_opcheck():
    hidden, _, labels = data()
    weight, bias = torch.randn(V, D, requires_grad=True), torch.randn(V, requires_grad=True)
    flat, y = hidden.flatten(0, 1).requires_grad_(), labels.flatten()
    index = (y != -100).nonzero().squeeze(1)
    for given in (None, index):
        torch.library.opcheck(torch.ops.fastdpo.rows, (y, -100, V, given))
    head = (y, index, torch.tensor(len(index)), 1.0, None, 1.0)
    # Not test_aot_dispatch_dynamic: it would compare what lies in the outputs' unused parts.
    whole, frozen, apart = (True, True, True), (True, False, False), (True, False, False, True)
    for stats, trained in ((("entropy",), whole), ((), frozen), ((), apart)):
        w, b = (weight, bias) if trained[1] else (weight.detach(), None)
        w, extra = (w[:, 3:].contiguous(), w[:, :3].contiguous()) if trained == apart else (w, None)
        torch.library.opcheck(
            torch.ops.fastdpo.token_logps,
            (flat.detach(), w.detach(), b, extra, *head, Call(stats).to_text(), list(trained)),
            test_utils=("test_schema", "test_faketensor"),
        )
