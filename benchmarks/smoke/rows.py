"""What reads logits that exist, and the loss on sequences: both backends against fp64."""

from __future__ import annotations

import torch

from benchmarks.smoke.table import Found, Place, check, largest, relative
from fastdpo.backends import torch as oracle
from fastdpo.backends.contract import LogitMap, SequenceLoss

_ROWS = 64
_MAPS = {"": LogitMap(), " softcap": LogitMap(1.5, 20.0, 1.3)}
_ERROR = 2e-5  # of a log-probability, absolute; of what is stored, relative
_LOSS = (0.1, 0.1, True, "interleaved")  # beta, label_smoothing, average, pairs


def _there_and_back(place: Place, backend: str, dtype: torch.dtype, odd: bool) -> Found:
    """Every eighth row carries no loss: it holds NaN, is not read, and gets zeros."""
    module, found = place.module(backend), Found()
    vocab = place.vocab + odd
    for name, logit_map in _MAPS.items():
        logits = (3.0 * torch.randn(_ROWS, vocab)).to(dtype).to(place.device)
        labels = torch.randint(vocab, (_ROWS,), device=place.device)
        logits[::8], labels[::8] = float("nan"), -100
        grad = torch.randn(_ROWS, device=place.device)
        logps, lse = module.logits_logps(logits, labels, logit_map)
        out = torch.full_like(logits, float("nan"))
        module.logits_logps_backward(grad, logits, labels, lse, logit_map, out)
        wide = logits.double()
        true_logps, true_lse = oracle.logits_logps(wide, labels, logit_map)
        expected = torch.empty_like(wide)
        oracle.logits_logps_backward(grad.double(), wide, labels, true_lse, logit_map, expected)
        found.hold(f"logps{name}", largest(logps, true_logps), _ERROR)
        found.hold(f"lse{name}", largest(lse.sum(1), true_lse.sum(1)), _ERROR)
        found.hold(f"gradient{name}", relative(out, expected), _ERROR + place.rounding(dtype))
        module.logits_logps_backward(grad, logits, labels, lse, logit_map, logits)
        found.hold_bits(f"in place{name}", logits, out)
        if backend == "cuda":
            logits.copy_(wide)
            again = module.logits_logps(logits, labels, logit_map, second_launch=True)
            found.hold_bits(f"second launch{name}", again[0], logps)
    return found


def _enter(backend: str, dtype: torch.dtype, odd: bool) -> None:
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    name = f"logits {backend} {kind}{', odd V' * odd}"
    check(name)(lambda place: _there_and_back(place, backend, dtype, odd))


for _backend in ("triton", "cuda"):
    for _dtype in (torch.bfloat16, torch.float16, torch.float32):
        _enter(_backend, _dtype, False)
    _enter(_backend, torch.bfloat16, True)


def _hold_loss(found: Found, got: SequenceLoss, expected: SequenceLoss) -> None:
    for name, mine, true in zip(SequenceLoss._fields, got, expected, strict=True):
        found.hold(name, relative(mine, true), _ERROR)


def _sequence_loss(place: Place, backend: str) -> Found:
    module, found = place.module(backend), Found()
    logps = -torch.rand(1000, device=place.device)
    offsets = torch.tensor([0, 300, 300, 650, 1000], device=place.device)
    ref = -200.0 * torch.rand(4, device=place.device)
    for options in (_LOSS, (0.1, 0.0, False, "concatenated")):
        expected = oracle.sequence_loss(logps.double(), offsets, ref.double(), *options)
        _hold_loss(found, module.sequence_loss(logps, offsets, ref, *options), expected)
    return found


@check("sequence_loss triton")
def sequence_loss_triton(place: Place) -> Found:
    return _sequence_loss(place, "triton")


@check("sequence_loss cuda")
def sequence_loss_cuda(place: Place) -> Found:
    return _sequence_loss(place, "cuda")


@check("logits_sequence_loss cuda")
def logits_sequence_loss(place: Place) -> Found:
    """Logits to the loss in one sequence of launches."""
    module, found = place.module("cuda"), Found()
    logits = (3.0 * torch.randn(_ROWS, place.vocab)).bfloat16().to(place.device)
    labels = torch.randint(place.vocab, (_ROWS,), device=place.device)
    offsets = torch.linspace(0, _ROWS, 5, device=place.device).long()
    ref = -10.0 * torch.rand(4, device=place.device)
    got = module.logits_sequence_loss(logits, labels, LogitMap(), offsets, ref, *_LOSS)
    logps, _ = oracle.logits_logps(logits.double(), labels, LogitMap())
    found.hold("logps", largest(got.logps, logps), _ERROR)
    _hold_loss(found, got.loss, oracle.sequence_loss(logps, offsets, ref.double(), *_LOSS))
    return found
