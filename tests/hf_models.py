"""Tiny, randomly initialised models of many families, and what their own logits say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

VOCAB = 53  # no multiple of anything

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights: logits of a trained model's size, where a softcap shows.
    "initializer_range": 0.4,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}
_FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "head_dim": 8,
}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}

_INKLING = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "rel_extent": 16,
}

# Class name without "ForCausalLM" or "LMHeadModel" -> configuration.
FAMILIES: dict[str, dict] = {
    "Llama": _COMMON,
    "Mistral": _COMMON,
    "Qwen2": {**_COMMON, "tie_word_embeddings": True},
    "Qwen3": {**_COMMON, "head_dim": 8},
    "Phi3": _COMMON,
    "Mixtral": {**_COMMON, "num_local_experts": 4},
    "Olmoe": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "GPTNeoX": _COMMON,
    "StableLm": _COMMON,
    "OPT": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "init_std": 0.4,
        "pad_token_id": 0,
    },
    "GPT2": _GPT,
    # a bias in the head
    "Phi": _COMMON,
    "GPTJ": {**_GPT, "rotary_dim": 8},
    "CodeGen": {**_GPT, "rotary_dim": 8},
    # a scale
    "Cohere": {**_COMMON, "logit_scale": 0.3},
    "Granite": {**_COMMON, "logits_scaling": 3.0},
    "GraniteMoe": {**_COMMON, "logits_scaling": 3.0, "num_local_experts": 4},
    "HyperCLOVAX": {**_COMMON, "logits_scaling": 0.7},
    "FalconH1": {**_COMMON, **_FALCON_H1, "lm_head_multiplier": 0.4},
    # a softcap
    "Gemma2": {**_COMMON, "head_dim": 8, "final_logit_softcapping": 4.0},
    "Gemma3": {**_COMMON, "head_dim": 8, "final_logit_softcapping": 4.0},
    "NanoChat": {**_COMMON, "head_dim": 8, "final_logit_softcapping": 4.0},
    # a scale of the hidden states
    "MiniCPM3": {**_COMMON, **_MLA, "dim_model_base": 16},
    # a vocabulary cut short
    "Inkling": {**_COMMON, **_INKLING, "unpadded_vocab_size": VOCAB - 3},
    # a transform before the head, which get_output_embeddings looks behind
    "ModernBertDecoder": {**_COMMON, "global_attn_every_n_layers": 1},
    "Mamba": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "pad_token_id": 0,
    },
}


def build(family: str, **overrides) -> nn.Module:
    """A model of the family in fp32, dropout off, gradients on."""
    import transformers

    torch.manual_seed(0)
    names = [f"{family}ForCausalLM", f"{family}LMHeadModel"]
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not found:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    cls = found[0]
    model = cls(cls.config_class(**{**FAMILIES[family], **overrides})).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)  # zero by default, where it could not be missed
    return model


def batch(
    sequences: int = 4,
    length: int = 11,
    padding: str = "right",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, labels [S, T]: ragged sequences, prompts of their own length."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 50, (sequences, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for s in range(sequences):
        pad, prompt = s % 4, 2 + s % 3
        rows = slice(length - pad, length) if padding == "right" else slice(0, pad)
        start = 0 if padding == "right" else pad
        attention_mask[s, rows] = 0
        input_ids[s, rows] = 0
        labels[s, rows] = -100
        labels[s, start : start + prompt] = -100
    return input_ids, attention_mask, labels


def eager_token_logps(model: nn.Module, input_ids: Tensor, labels: Tensor, **kwargs) -> Tensor:
    """[S, T] of the model's own logits: column t is about token t, 0 where it carries no loss."""
    logits = model(input_ids=input_ids, **kwargs).logits[:, :-1].float()
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return nn.functional.pad(logps * (targets != -100), (1, 0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 2e-5 of the largest entry of each parameter's gradient (fp32, sums in another order)."""
    assert got.keys() == expected.keys()
    floor = 1e-6 * max(float(g.abs().max()) for g in expected.values())
    for name, reference in expected.items():
        limit = 2e-5 * float(reference.abs().max()) + floor
        assert (got[name] - reference).abs().max() <= limit, name
