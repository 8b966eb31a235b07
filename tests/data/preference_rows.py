"""Rows of preference data as public sets write them."""

from __future__ import annotations


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
WORDS = ("yes", "no", "hello", "goodbye", "red", "blue", "one", "two")
HH_PROMPT = "\n\nHuman: Hi.\n\nAssistant: Hi!\n\nHuman: Say {}.\n\nAssistant:"
HH = [
    {
        "chosen": HH_PROMPT.format(word) + f" I say {word}",
        "rejected": HH_PROMPT.format(word) + " I am silent",
    }
    for word in WORDS
]
ULTRAFEEDBACK = [
    {
        "prompt": f"Say {word}.",
        "prompt_id": "f0e37e9f",
        "chosen": [user(f"Say {word}."), assistant(word)],
        "rejected": [user(f"Say {word}."), assistant(f"not {word}")],
        "messages": [user(f"Say {word}."), assistant(word)],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    for word in WORDS
]
IMPLICIT = [
    {key: row[key] for key in ("chosen", "rejected", "score_chosen")} for row in ULTRAFEEDBACK
]
TURNS = [SYSTEM, user("a"), assistant("b"), user("c")]
