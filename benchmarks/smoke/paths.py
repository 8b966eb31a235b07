"""The public functions, forward and backward, held to the accuracy rule (`benchmarks.accuracy`).

What is true is the torch backend's answer in fp64 on the CPU, which the test suite holds to eager
PyTorch; the baseline is eager PyTorch on this device in the dtype that is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import rule
from benchmarks.providers.base import no_compiler
from benchmarks.smoke.table import Absent, Found, Place, check, largest
from fastdpo.backends.contract import Head
from fastdpo.core import operator, rows
from fastdpo.core.call import Call
from fastdpo.loss import linear_dpo_loss, linear_logps, logits_dpo_loss

Tensors = dict[str, Tensor]
Results = dict[str, Tensor]

_SEQUENCES = 4
_BETA = 0.1
_STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_SCALED = {"logit_scale": 1.2, "softcap": 20.0, "temperature": 0.9}
_LOGPS = ("chosen_logps", "rejected_logps")
_STATISTIC_ERROR = 1e-3


@dataclass(frozen=True)
class Asked:
    """One way to call linear_dpo_loss."""

    dtype: torch.dtype = torch.bfloat16
    trained: tuple[str, ...] = ("hidden", "weight")
    bias: bool = False
    reference: str = "sums"  # "none", or "hidden" states of its own
    packed: bool = False
    kept: float | None = None  # share of E; None: the default
    row_index: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def _length(place: Place) -> int:
    return 64 if place.compiled else 6


def _tensors(place: Place, asked: Asked) -> tuple[Tensors, Tensor]:
    """On the CPU, fp64, with the dtype's values; and labels [4, T], some ignored."""
    generator = torch.Generator().manual_seed(2)
    length, depth, vocab = _length(place), place.depth // 2, place.vocab
    made = {
        "hidden": torch.randn(_SEQUENCES, length, depth, generator=generator),
        "weight": torch.randn(vocab, depth, generator=generator) * 2.0 / depth**0.5,
    }
    if asked.bias:
        made["bias"] = torch.randn(vocab, generator=generator)
    if asked.reference == "hidden":
        noise = torch.randn(made["hidden"].shape, generator=generator)
        made["ref_hidden"] = made["hidden"] + 0.1 * noise
    tensors = {name: t.to(asked.dtype).double() for name, t in made.items()}
    labels = torch.randint(vocab, (_SEQUENCES, length), generator=generator)
    labels[:, : length // 3] = -100
    return tensors, labels


def _leaves(tensors: Tensors, asked: Asked, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {
        name: t.to(dtype).to(device).detach().requires_grad_(name in asked.trained)
        for name, t in tensors.items()
    }


def _options(asked: Asked, leaves: Tensors, labels: Tensor) -> dict[str, Any]:
    """Of either public function."""
    options: dict[str, Any] = {"beta": _BETA, **asked.options}
    if asked.reference == "sums":
        like = leaves["hidden"]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        # About what the policy says: where it is far off, the loss is flat and so is the check.
        token = math.log(leaves["weight"].shape[0]) + 2.0
        tokens = (labels != -100).sum(1).to("cpu", wide)
        sums = -token * tokens - torch.arange(float(_SEQUENCES), dtype=wide)
        options["ref_logps"] = sums.to(like.device)
    if asked.packed:
        count = labels.shape[1]
        options["cu_seqlens"] = torch.arange(_SEQUENCES + 1).to(labels.device) * count
    return options


def _flat(asked: Asked, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (hidden.flatten(0, 1), labels.flatten()) if asked.packed else (hidden, labels)


def _linear(
    leaves: Tensors,
    labels: Tensor,
    asked: Asked,
    backend: str | None,
    function: Callable[..., Any] = linear_dpo_loss,
) -> Any:
    options = _options(asked, leaves, labels)
    if asked.reference == "hidden":
        options["ref_hidden"] = leaves["ref_hidden"]
    if asked.kept is not None:
        whole = int((labels != -100).sum()) * leaves["weight"].shape[0]
        options["workspace_bytes"] = int(asked.kept * whole * leaves["hidden"].element_size())
    if asked.row_index:
        options["row_index"] = (labels.flatten() != -100).nonzero().squeeze(1)
    hidden, labels = _flat(asked, leaves["hidden"], labels)
    bias = leaves.get("bias")
    return function(hidden, leaves["weight"], labels, bias=bias, backend=backend, **options)


def _eager(leaves: Tensors, labels: Tensor, asked: Asked) -> Any:
    """The product as models take it, in its own dtype; then fp32."""
    options = _options(asked, leaves, labels)
    options.pop("stats", None)
    head = {name: options[name] for name in _SCALED if name in options}

    def logits(hidden: Tensor) -> Tensor:
        z = torch.nn.functional.linear(hidden, leaves["weight"], leaves.get("bias"))
        return z.float()

    if asked.reference == "hidden":
        with torch.no_grad():
            mask = labels != -100
            z = _mapped(logits(leaves["ref_hidden"]), **head)
            own = z.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            options["ref_logps"] = torch.where(mask, own, 0.0)
    hidden, flat = _flat(asked, leaves["hidden"], labels)
    return logits_dpo_loss(logits(hidden), flat, backend="torch", **options)


def _mapped(
    z: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    z = z * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def _results(out: Any, leaves: Tensors, asked: Asked) -> Results:
    names = [name for name in leaves if name in asked.trained]
    gradients = torch.autograd.grad(out.loss, [leaves[name] for name in names])
    found = {
        "loss": out.loss.detach(),
        "logps": torch.cat([getattr(out, n) for n in _LOGPS]).detach(),
    }
    return found | dict(zip(names, gradients, strict=True))


def _hold(found: Found, place: Place, got: Results, base: Results, true: Results) -> None:
    """By the rule. One number may be right by luck: a loss's error is that of the log-probabilities
    times β.
    """
    slack = 1.0 if place.compiled else 2.0  # the interpreter's bf16
    of_logps = rule.sizes(base["logps"].double().cpu() - true["logps"]) if "loss" in true else {}
    for name, expected in true.items():
        factor = rule.OUTPUT if name in ("loss", "logps") else rule.GRADIENT
        mine = rule.sizes(got[name].double().cpu() - expected)
        theirs = rule.sizes(base[name].double().cpu() - expected)
        if name == "loss":
            theirs = {norm: max(size, _BETA * of_logps[norm]) for norm, size in theirs.items()}
        floor = slack * rule.floor(expected, base[name].dtype)
        for norm, size in mine.items():
            found.hold(f"{name} {norm}", size, factor * theirs[norm] + floor)


def _step(place: Place, asked: Asked, function: Callable[..., Any] = linear_dpo_loss) -> Found:
    if not place.compiled:
        place.module("triton")
    tensors, labels = _tensors(place, asked)
    (there,) = place.put(labels)
    leaves = _leaves(tensors, asked, place.device, asked.dtype)
    out = _linear(leaves, there, asked, place.backend, function)
    got = _results(out, leaves, asked)
    leaves = _leaves(tensors, asked, place.device, asked.dtype)
    base = _results(_eager(leaves, there, asked), leaves, asked)
    leaves = _leaves(tensors, asked, torch.device("cpu"), torch.float64)
    exact = _linear(leaves, labels, asked, "torch")
    found = Found()
    _hold(found, place, got, base, _results(exact, leaves, asked))
    for name in asked.options.get("stats", ()):
        mine, true = (getattr(o.tokens, name).cpu() for o in (out, exact))
        wrong = largest(mine, true)
        found.hold(name, wrong, 0.0 if name == "is_top1" else _STATISTIC_ERROR)
    return found


_FROZEN = ("hidden",)
_WAYS = {
    "trained head": Asked(),
    "trained head, nothing kept": Asked(kept=0.0),
    "trained head, half of E kept": Asked(kept=0.5),
    "frozen head, row_index": Asked(trained=_FROZEN, row_index=True),
    "fp16": Asked(dtype=torch.float16),
    "fp16, frozen head": Asked(dtype=torch.float16, trained=_FROZEN),
    "fp32": Asked(dtype=torch.float32),
    "bias, softcap, scale": Asked(bias=True, trained=("hidden", "weight", "bias"), options=_SCALED),
    "reference's hidden states": Asked(reference="hidden"),
    "packed": Asked(packed=True),
    "simpo, no reference": Asked(reference="none", options={"objective": "simpo"}),
    "apo_zero, statistics": Asked(options={"objective": "apo_zero", "stats": _STATS}),
}


def _enter(name: str, asked: Asked) -> None:
    check(f"step {name}")(lambda place: _step(place, asked))


@check("step compiled", patience=2.0)
def compiled(place: Place) -> Found:
    """torch.compile of forward and backward, in one graph."""
    reason = no_compiler(place.device)
    if reason is not None:
        raise Absent(reason)
    return _step(place, Asked(), torch.compile(linear_dpo_loss, fullgraph=True))


for _name, _asked in _WAYS.items():
    _enter(_name, _asked)


# ---- By tokens


def _by_tokens(
    place: Place,
    asked: Asked,
    ours: Callable[[Tensors, Tensor, str | None], Tensor],
    eager: Callable[[Tensors, Tensor], Tensor],
) -> Found:
    """What each function makes of leaves and labels is summed and differentiated."""
    if not place.compiled:
        place.module("triton")
    tensors, labels = _tensors(place, asked)
    if "extra" in asked.trained:
        generator = torch.Generator().manual_seed(3)
        columns = 8
        shape = (*tensors["hidden"].shape[:2], columns)
        more = torch.randn(shape, generator=generator).to(asked.dtype).double()
        tensors["hidden"] = torch.cat([tensors["hidden"], more], -1)
        extra = torch.randn(place.vocab, columns, generator=generator) / columns**0.5
        tensors["extra"] = extra.to(asked.dtype).double()

    def results(function: Callable, device: torch.device, dtype: torch.dtype) -> Results:
        leaves = _leaves(tensors, asked, device, dtype)
        values = function(leaves, labels.to(device))
        names = [name for name in leaves if name in asked.trained]
        gradients = torch.autograd.grad(values.sum(), [leaves[name] for name in names])
        return {"logps": values.detach(), **dict(zip(names, gradients, strict=True))}

    cpu = torch.device("cpu")
    true = results(lambda t, y: ours(t, y, "torch"), cpu, torch.float64)
    got = results(lambda t, y: ours(t, y, place.backend), place.device, asked.dtype)
    base = results(eager, place.device, asked.dtype)
    found = Found()
    _hold(found, place, got, base, true)
    return found


def _eager_tokens(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of all entries and of the labels, and which positions carry loss."""
    every = z.float().log_softmax(-1)
    own = every.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return every, own, labels != -100


@check("step entropy in the loss")
def entropy(place: Place) -> Found:
    def ours(leaves: Tensors, labels: Tensor, backend: str | None) -> Tensor:
        out = linear_logps(
            leaves["hidden"], leaves["weight"], labels, stats=("entropy",), backend=backend
        )
        return out.logps + 0.5 * out.entropy

    def eager(leaves: Tensors, labels: Tensor) -> Tensor:
        every, own, carries = _eager_tokens(leaves["hidden"] @ leaves["weight"].t(), labels)
        return torch.where(carries, own - 0.5 * (every.exp() * every).sum(-1), 0.0)

    return _by_tokens(place, Asked(), ours, eager)


@check("step LoRA's columns apart")
def extra(place: Place) -> Found:
    """`Head.extra`: the weight is frozen, and not copied."""

    def ours(leaves: Tensors, labels: Tensor, backend: str | None) -> Tensor:
        head = Head(leaves["weight"], extra=leaves["extra"])
        found = rows.find(labels.flatten(), -100, head.vocab_size)
        hidden = leaves["hidden"].flatten(0, 1)
        call = Call(backend=backend, compute_dtype=hidden.dtype)
        return found.at_labels(operator.token_logps(hidden, head, found, call).logps)

    def eager(leaves: Tensors, labels: Tensor) -> Tensor:
        weight = torch.cat([leaves["weight"], leaves["extra"]], 1)
        z = leaves["hidden"].flatten(0, 1) @ weight.t()
        _, own, carries = _eager_tokens(z, labels.flatten())
        return torch.where(carries, own, 0.0)

    return _by_tokens(place, Asked(trained=("hidden", "extra")), ours, eager)


# ---- Logits that exist


def _logits_loss(place: Place, backend: str, inplace: bool) -> Found:
    place.module(backend)
    asked = Asked(trained=("logits",))
    tensors, labels = _tensors(place, asked)
    z = tensors["hidden"] @ tensors["weight"].t()
    made = {**tensors, "logits": z.to(asked.dtype).double()}

    def run(leaves: Tensors, labels: Tensor, backend: str, wide: bool, **more: Any) -> Results:
        options = _options(asked, leaves, labels) | more
        z = leaves["logits"] * 1.0 if inplace else leaves["logits"]  # not a leaf's memory
        out = logits_dpo_loss(z.float() if wide else z, labels, backend=backend, **options)
        return _results(out, leaves, asked)

    leaves = _leaves(made, asked, place.device, asked.dtype)
    (there,) = place.put(labels)
    got = run(leaves, there, backend, False, inplace_backward=inplace)
    base = run(_leaves(made, asked, place.device, asked.dtype), there, "torch", True)
    exact = _leaves(made, asked, torch.device("cpu"), torch.float64)
    found = Found()
    _hold(found, place, got, base, run(exact, labels, "torch", False))
    return found


def _enter_logits(backend: str, inplace: bool) -> None:
    name = f"logits_dpo_loss {backend}{', in place' * inplace}"
    check(name)(lambda place: _logits_loss(place, backend, inplace))


for _backend in ("triton", "cuda"):
    for _inplace in (False, True):
        _enter_logits(_backend, _inplace)


# ---- What only a GPU has


def _stepping(place: Place, what: str) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """A step that waits for nothing, and the hidden states that it reads."""
    place.only_compiled(what)
    asked = Asked(row_index=True)
    tensors, labels = _tensors(place, asked)
    (there,) = place.put(labels)
    leaves = _leaves(tensors, asked, place.device, asked.dtype)
    index = (there.flatten() != -100).nonzero().squeeze(1)
    options = _options(asked, leaves, there)
    hidden, weight = leaves["hidden"], leaves["weight"]

    def step() -> list[Tensor]:
        out = linear_dpo_loss(hidden, weight, there, row_index=index, **options)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]

    return step, hidden


def _same(expected: list[Tensor], got: list[Tensor]) -> Found:
    found = Found()
    for name, a, b in zip(("loss", "hidden", "weight"), got, expected, strict=True):
        found.hold_bits(name, a, b)
    return found


@check("step waits for nothing")
def no_waiting(place: Place) -> Found:
    step, _ = _stepping(place, "waiting for it")
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    got = step()
    torch.cuda.set_sync_debug_mode("default")
    return _same(expected, got)


@check("step on another stream")
def other_stream(place: Place) -> Found:
    step, _ = _stepping(place, "a stream")
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step()
    stream.synchronize()
    return _same(expected, got)


@check("step as a CUDA graph")
def graph(place: Place) -> Found:
    """Captured on one batch and replayed on another."""
    step, hidden = _stepping(place, "a CUDA graph")
    first = hidden.detach().clone()
    with torch.no_grad():
        hidden.mul_(0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = step()
    with torch.no_grad():
        hidden.copy_(first)
    captured.replay()
    return _same(step(), got)
