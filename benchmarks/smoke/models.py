"""From a Hugging Face model to the loss, on padded, packed and shared-prompt rows.

What is true is a model on padded rows in fp32 with the torch backend; the baseline is that under
autocast.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import rule
from benchmarks.smoke.table import Absent, Found, Place, check

_PAIRS = ((6, 5, 3), (20, 7, 60), (9, 100, 4), (4, 4, 4))  # tokens of prompt, chosen, rejected
_BETA = 0.1


def _model(place: Place, attention: str) -> nn.Module:
    import transformers

    heads, width = (4, 64) if place.compiled else (2, 16)
    config = transformers.LlamaConfig(
        vocab_size=place.vocab,
        hidden_size=heads * width,
        intermediate_size=2 * heads * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).eval().to(place.device)


def _pairs(place: Place) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(2, place.vocab, (count,), generator=generator).tolist()

    cut = 1 if place.compiled else 4
    return [
        {"prompt_ids": ids(p), "chosen_ids": ids(-(-c // cut)), "rejected_ids": ids(-(-r // cut))}
        for p, c, r in _PAIRS
    ]


def _results(
    place: Place, layout: str, attention: str, backend: str | None, autocast: bool
) -> dict[str, Tensor]:
    from fastdpo.data import PairCollator
    from fastdpo.integrations import hf

    model = _model(place, attention)
    batch = PairCollator(0, layout, attention=attention)(_pairs(place))
    there = {k: v.to(place.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with torch.autocast(place.device.type, torch.bfloat16, enabled=autocast):
        out = hf.dpo_loss(model, there, reference_free=True, beta=_BETA, backend=backend)
    out.loss.backward()
    logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logps": logps, **gradients}


def _model_loss(place: Place, layout: str) -> Found:
    if importlib.util.find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    if not place.compiled:
        place.module("triton")
    # FlexAttention has no backward on a CPU.
    flex = place.compiled and layout != "padded"
    attention = "flex_attention" if flex else "sdpa"
    got = _results(place, layout, attention, place.backend, True)
    base = _results(place, "padded", "sdpa", "torch", True)
    true = _results(place, "padded", "sdpa", "torch", False)
    found = Found(words=attention)
    if got.keys() != true.keys():
        raise RuntimeError(f"gradients of {sorted(got.keys() ^ true.keys())} alone")
    for name, expected in true.items():
        factor = rule.OUTPUT if name == "logps" else rule.GRADIENT
        mine, theirs = (rule.sizes(t[name].double() - expected.double()) for t in (got, base))
        floor = rule.floor(expected, torch.bfloat16)
        short = name.removeprefix("model.").removesuffix(".weight")
        found.hold(short, mine["rms"], factor * theirs["rms"] + floor)
    return found


# Compiled by PyTorch on a GPU: the block mask, FlexAttention and its backward.
@check("model packed", patience=2.0)
def packed(place: Place) -> Found:
    return _model_loss(place, "packed")


@check("model shared prompts", patience=2.0)
def shared_prompts(place: Place) -> Found:
    return _model_loss(place, "shared_prompts")


@check("model padded")
def padded(place: Place) -> Found:
    return _model_loss(place, "padded")
