"""A tokenizer and a causal language model: made here, small, or loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .options import InputError, Options

# What a conversation looks like to a tokenizer that is made here.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The same to a model that was loaded with no template of its own. The space stands before what is
# said, not behind the role: there it would be half of the answer's first token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] or '' }}"
    "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% else %}{{ '\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
_END = "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_PAD = "<|pad|>"
_VOCAB_SIZE = 2048


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer trained on the texts at hand, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[_PAD, _END, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=list(_ROLES),
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any, max_length: int, vocab_size: int | None = None) -> nn.Module:
    """A Llama of about a million parameters with random weights.

    Two layers are what it takes to look a subject up in the prompt; more of them learn it later.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max(256, max_length),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )


def load(name: str) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, from a directory or by name.

    Raises:
        InputError: it cannot be loaded, or is no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model {name} cannot be loaded: {reason}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"--model {name}: its tokenizer has neither a padding nor an end token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer but the head.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs peft: pip install peft") from None
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """The model with its adapters, where there are any, merged into its weights: to be saved."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def quiet_libraries(options: Options) -> None:
    """The demo has a progress bar of its own, and says what matters itself."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.set_seed(options.seed)
