"""What a reference's log-probabilities depend on, as values that can be written down and compared.

Hashes are XXH3's of 128 bits: against mistakes, not against malice.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..integrations.packing import attention_of
from ..integrations.reference import BASE
from ..integrations.unwrap import causal_lm, peft_model
from .collator import PairCollator

Key = dict[str, Any]  # as JSON has it: strings, numbers, None, and dicts of these

HASHES = ("weights", "tokenizer", "data", "batches")
_SHOWN = 12  # of a hash's 32 digits
_BLOCK = 1 << 26  # bytes that are brought from a GPU at once
# What a configuration says beside the function that the model is: where it came from, what a
# forward returns, and the tokens of generation, which trainers set.
_NO_FUNCTION = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("attn_implementation", "_attn_implementation", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "output_router_logits"),
    *("router_aux_loss_coef", "id2label", "label2id", "problem_type"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
)


def model_parts(model: nn.Module, ref_adapter: str | None, autocast: torch.dtype | None) -> Key:
    """Of the reference that the model is under `ref_adapter` (None: it is no PEFT model)."""
    lm = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    autocast = effective_autocast(device, autocast)
    library: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    config = lm.config.to_dict()
    return {
        "model": type(lm).__name__,
        "config": {k: _plain(v) for k, v in sorted(config.items()) if k not in _NO_FUNCTION},
        "weights": weights_hash(model, ref_adapter),
        "adapter": _adapter_config(model, ref_adapter),
        "dtype": _name(lm.dtype),
        "autocast": None if autocast is None else _name(autocast),
        "float32_products": library.matmul.fp32_precision,
        "attention": attention_of(lm),
    }


def collator_parts(collator: PairCollator) -> Key:
    """The layout, and where it truncates."""
    return {
        "layout": collator.layout,
        "max_length": collator.max_length,
        "truncation_mode": collator.truncation_mode,
        "collator.attention": collator.attention,
        "pad_to_multiple_of": collator.pad_to_multiple_of,
    }


def version_part() -> Key:
    return {"fastdpo": __version__}


def effective_autocast(device: torch.device, given: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the products: the one that is given, or of the `torch.autocast` around us."""
    if given is None and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return given


# ---- Hashes


def weights_hash(model: nn.Module, ref_adapter: str | None) -> str:
    """Of the tensors that the reference is made of, by name: names, dtypes, shapes, bytes.

    The model without its adapters has the hash of the model before it had any.
    """
    digest = _digest()
    for name, tensor in sorted(_tensors(model, ref_adapter), key=lambda item: item[0]):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _tensors(model: nn.Module, ref_adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    peft = peft_model(model)
    prefix = getattr(getattr(peft, "base_model", None), "prefix", None)
    for path, tensor in causal_lm(model).state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        names = path.split(".")
        if peft is not None:
            of = _adapter_of(names, list(peft.peft_config), prefix)
            if of is not None:
                if of == ref_adapter:  # whatever it is called
                    yield "adapter." + ".".join(n for n in names if n != of), tensor
                continue
        # What PEFT and torch.compile put between a module and what was there before.
        between = ("base_layer", "original_module", "_orig_mod")
        yield ".".join(n for n in names if n not in between), tensor
    prompts = getattr(peft, "prompt_encoder", None)
    if prompts is not None and ref_adapter in prompts:
        for name, tensor in prompts[ref_adapter].state_dict().items():
            yield f"adapter.prompt_encoder.{name}", tensor


def _adapter_of(names: Sequence[str], adapters: Sequence[str], prefix: str | None) -> str | None:
    """The adapter that a tensor belongs to; None of one that the model had before."""
    for i, name in enumerate(names[:-1]):
        own = name == "modules_to_save" or (prefix and name.startswith(prefix))
        if own and names[i + 1] in adapters:
            return names[i + 1]
    return None


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach()
    if tensor.is_meta:
        raise ValueError(f"model should be loaded, got {name!r} on the meta device")
    if hasattr(tensor, "__tensor_flatten__"):  # quantized, or a DTensor
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{part}", getattr(tensor, part))
        return
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.contiguous().flatten().view(torch.uint8)
    for block in flat.split(_BLOCK):
        digest.update(block.cpu().numpy())


class DataHash:
    """Over the ids of all examples, as they are after truncation."""

    def __init__(self) -> None:
        self._digest = _digest()

    def add(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        for ids in (prompt, *answers):
            self._digest.update(array("q", (len(ids), *ids)).tobytes())

    def part(self) -> Key:
        return {"data": self._digest.hexdigest()}


def data_part(examples: Sequence[Mapping[str, Any]], collator: PairCollator) -> Key:
    found = DataHash()
    for i in range(len(examples)):
        found.add(*collator._cut(i, examples[i]))
    return found.part()


def tokenizer_part(tokenizer: Any | None) -> Key:
    """Of what it makes of text: not of padding and truncation, which every call sets."""
    if tokenizer is None:
        return {"tokenizer": None}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        state = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}
    whole = [state, special, getattr(tokenizer, "chat_template", None)]
    return {"tokenizer": _hashed(whole)}


def batches_part(batches: Iterable[Sequence[int]]) -> Key:
    return {"batches": _hashed([list(batch) for batch in batches])}


def _hashed(value: Any) -> str:
    digest = _digest()
    digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _digest() -> Any:
    import xxhash  # which datasets needs

    return xxhash.xxh3_128()


# ---- What can be shown


def _adapter_config(model: nn.Module, ref_adapter: str | None) -> Key | None:
    """Without what no number depends on: its name, where it came from, how it was initialised."""
    peft = peft_model(model)
    if peft is None or ref_adapter in (None, BASE):
        return None
    own = peft.peft_config[ref_adapter].to_dict()
    ignored = (
        *("base_model_name_or_path", "inference_mode", "revision", "peft_version"),
        *("auto_mapping", "init_lora_weights"),
    )
    return {k: _plain(v) for k, v in sorted(own.items()) if k not in ignored}


def _plain(value: Any) -> Any:
    """As it is when it has been through JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=str)}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differences(there: Key, here: Key) -> list[str]:
    """Every part that is not the same, with both values. Of a configuration only what both have:
    another version of a library knows other entries."""
    found = []
    for part, value in here.items():
        stored = there.get(part)
        if isinstance(value, dict) and isinstance(stored, dict):
            both = {k: v for k, v in value.items() if k in stored}
            found += [f"{part}.{line}" for line in differences(stored, both)]
        elif stored != value:
            found.append(f"{part}: {_shown(part, stored)} there, {_shown(part, value)} here")
    return found


def _shown(part: str, value: Any) -> str:
    if isinstance(value, dict):
        return "an adapter" if part == "adapter" else "several"
    if value is None:
        return "none"
    return value[:_SHOWN] + "…" if part in HASHES else str(value)
