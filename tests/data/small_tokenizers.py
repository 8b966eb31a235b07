"""Tokenizers of the kinds there are, small, trained here."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
TEXTS = [
    "The sky is blue. The sky is black, not blue. Is it so? It is so, yes.",
    "Say yes. Say no. Say hello and goodbye. What color is it? red, blue, one, two",
    "Human: Hi. Assistant: I say yes. I am silent. user system assistant tool Be kind.",
] * 4
CHAT = (
    "<s>{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% if tone is defined %}tone: {{ tone }}{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}>{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}!{{ call.function | tojson }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant>{% endif %}"
)
# The same, closing a thought that a prompt has been opened with.
THINKING = CHAT.replace("assistant>{% endif %}", "assistant><think>{% endif %}")


def byte_level():
    """GPT-2's kind: no special tokens are added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, initial_alphabet=alphabet)


def beginning():
    """Llama 3's kind: a BOS before every text."""
    return _adding(byte_level(), "<s> $A")


def beginning_and_end():
    """A BOS before every text and an EOS behind it."""
    return _adding(byte_level(), "<s> $A </s>")


def metaspace():
    """Llama 2's kind: a space before every text, and a BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    return _adding(_trained(tokenizer, initial_alphabet=alphabet), "<s> $A")


def _trained(tokenizer, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, show_progress=False, **options
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = CHAT
    return fast


def _adding(fast, template):
    special = [(token, fast.convert_tokens_to_ids(token)) for token in SPECIAL]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return fast


ALL = [byte_level, beginning, beginning_and_end, metaspace]
