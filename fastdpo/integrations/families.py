"""What each family of Hugging Face models does between its hidden states and its logits.

Most families compute `logits = lm_head(hidden)` and need no entry. The others are listed here, by
the name of the model's class; a subclass inherits its parent's entry. An entry that is missing or
out of date does no silent harm: `fastdpo.integrations.probe` compares every model's own logits with
ours once.

A model of one's own is taught to fastdpo by adding its entry: `FAMILIES["MyForCausalLM"] = lambda
model: HeadRule(scale=model.config.my_scale)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeadRule:
    """softcap(scale · lm_head(hidden_scale · hidden)), and of it the first vocab_size entries."""

    scale: float = 1.0
    softcap: float | None = None
    hidden_scale: float = 1.0
    vocab_size: int | None = None


PLAIN = HeadRule()


def _text_config(model: Any) -> Any:
    """The configuration of the language model, which a multimodal one keeps inside its own."""
    return model.config.get_text_config()


def _softcap(model: Any) -> HeadRule:
    return HeadRule(softcap=_text_config(model).final_logit_softcapping)


def _divided(model: Any) -> HeadRule:
    return HeadRule(scale=1.0 / _text_config(model).logits_scaling)


def _cohere(model: Any) -> HeadRule:
    return HeadRule(scale=1.0 if model.logit_scale is None else float(model.logit_scale))


def _hyperclovax(model: Any) -> HeadRule:
    return HeadRule(scale=float(_text_config(model).logits_scaling))


def _falcon_h1(model: Any) -> HeadRule:
    return HeadRule(scale=float(model.model.lm_head_multiplier))


def _minicpm3(model: Any) -> HeadRule:
    return HeadRule(hidden_scale=1.0 / model.config.logits_scaling)


def _recurrent_gemma(model: Any) -> HeadRule:
    return HeadRule(softcap=model.config.logits_soft_cap)


def _xlstm(model: Any) -> HeadRule:
    return HeadRule(softcap=model.config.output_logit_soft_cap)


def _inkling(model: Any) -> HeadRule:
    return HeadRule(vocab_size=_text_config(model).unpadded_vocab_size)


def _inkling2(model: Any) -> HeadRule:
    config = _text_config(model)
    return HeadRule(softcap=config.final_logit_softcapping, vocab_size=config.unpadded_vocab_size)


def _mistral_large4(model: Any) -> HeadRule:
    return HeadRule(softcap=model.final_logit_softcapping)


def _paligemma(model: Any) -> HeadRule:
    return HeadRule(softcap=getattr(_text_config(model), "final_logit_softcapping", None))


def _muse(model: Any) -> HeadRule:
    config = _text_config(model)
    return HeadRule(scale=float(config.output_multiplier), softcap=config.final_logit_softcapping)


FAMILIES: dict[str, Callable[[Any], HeadRule]] = {
    # softcap(lm_head(h)), with cap · tanh(· / cap)
    "BeamForCausalLM": _softcap,
    "Gemma2ForCausalLM": _softcap,
    "Gemma3ForCausalLM": _softcap,
    "Gemma3nForCausalLM": _softcap,
    "Gemma3nForConditionalGeneration": _softcap,
    "Gemma4ForCausalLM": _softcap,
    "Gemma4ForConditionalGeneration": _softcap,
    "Gemma4UnifiedForCausalLM": _softcap,
    "Gemma4UnifiedForConditionalGeneration": _softcap,
    "NanoChatForCausalLM": _softcap,
    "VaultGemmaForCausalLM": _softcap,
    "RecurrentGemmaForCausalLM": _recurrent_gemma,
    "xLSTMForCausalLM": _xlstm,
    "MistralLarge4ForConditionalGeneration": _mistral_large4,
    "PaliGemmaForConditionalGeneration": _paligemma,
    # lm_head(h) / logits_scaling
    "GraniteForCausalLM": _divided,
    "GraniteSWAForCausalLM": _divided,
    "GraniteMoeForCausalLM": _divided,
    "GraniteMoeSWAForCausalLM": _divided,
    "GraniteMoeHybridForCausalLM": _divided,
    "GraniteMoeSharedForCausalLM": _divided,
    "Granite4VisionForConditionalGeneration": _divided,
    "GraniteDoclingForConditionalGeneration": _divided,
    # lm_head(h) · scale
    "CohereForCausalLM": _cohere,
    "Cohere2ForCausalLM": _cohere,
    "Cohere2MoeForCausalLM": _cohere,
    "CohereCompassForCausalLM": _cohere,
    "CohereCompassForConditionalGeneration": _cohere,
    "HyperCLOVAXForCausalLM": _hyperclovax,
    "HyperCLOVAXVisionV2ForConditionalGeneration": _hyperclovax,
    "FalconH1ForCausalLM": _falcon_h1,
    # softcap(lm_head(h) · output_multiplier)
    "MuseGlimmerForConditionalGeneration": _muse,
    "MuseSparkForConditionalGeneration": _muse,
    # lm_head(h / logits_scaling)
    "MiniCPM3ForCausalLM": _minicpm3,
    # the vocabulary's padding is cut off
    "InklingForCausalLM": _inkling,
    "InklingForConditionalGeneration": _inkling,
    "Inkling2ForCausalLM": _inkling2,
    "Inkling2ForConditionalGeneration": _inkling2,
}


def head_rule(model: Any) -> HeadRule:
    """The rule of an unwrapped causal language model; PLAIN where its family has no entry."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__](model)
    return PLAIN
