"""Hugging Face architectures built from their configurations: random weights, no download."""

from __future__ import annotations

from typing import Any

import torch

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "Qwen2Config",
        {
            "vocab_size": 32_000,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    # The backbone dominates, as in models that people train.
    "llama-36m": (
        "LlamaConfig",
        {
            "vocab_size": 32_000,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 4096,
        },
    ),
    "qwen2.5-0.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
        },
    ),
    "llama-1b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
    ),
}


def vocabulary(name: str) -> int:
    return SHAPES[name][1]["vocab_size"]


def attention(layout: str, device: torch.device) -> str:
    """What a layout is run with: on a GPU blocks that nobody sees are skipped."""
    return "sdpa" if layout == "padded" or device.type == "cpu" else "flex_attention"


def build(
    name: str, device: torch.device, seed: int = 0, attention: str = "sdpa"
) -> torch.nn.Module:
    """The model in fp32, in training mode; the same weights for the same seed on every call."""
    import transformers

    config_class, options = SHAPES[name]
    config = getattr(transformers, config_class)(
        **options, pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    return model.train()
