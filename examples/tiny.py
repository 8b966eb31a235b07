"""What the examples train when they are given neither a model nor data: made here, offline."""

from __future__ import annotations

import json
import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANSWERS = {"two and two": "four", "red and white": "pink", "day and night": "time"}
WORDS = ["<pad>", "</s>", "what", "make", "?", "they", ".", "who", "cares", "and"]


def read_pairs(path: str | None, count: int = 64) -> list[dict[str, str]]:
    """Rows with prompt, chosen and rejected, all strings: JSON lines, or `count` made-up ones."""
    if path is not None:
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    questions = random.Random(0).choices(list(ANSWERS), k=count)
    return [
        {
            "prompt": f"what make {question} ?",
            "chosen": f" they make {ANSWERS[question]} .",
            "rejected": " who cares ?",
        }
        for question in questions
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = dict.fromkeys([*WORDS, *" ".join([*ANSWERS, *ANSWERS.values()]).split()])
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="</s>")


def model(vocab_size: int) -> LlamaForCausalLM:
    """Two layers with random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)
