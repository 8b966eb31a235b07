"""A prompt and two answers from a row of preference data, in each of the ways to write it.

    prompt     chosen and rejected             the answers
    none       conversations                   what follows the messages that both begin with
    none       strings                         what follows the text that both begin with
    messages   conversations with the prompt   what follows the prompt
    messages   messages                        chosen and rejected themselves
    a string   conversations                   as without it; it should be a user's message of them
    a string   an assistant's messages         themselves, to the prompt as a user's message
    a string   strings                         chosen and rejected themselves

Pure Python on strings and dicts: nothing is read, and no tokenizer is asked.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Text = str | list[Message]

COLUMNS = ("prompt", "chosen", "rejected")
# What a message says. Two that agree in these are the same, whatever else stands beside them.
_SAYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

# How Anthropic's HH set writes that an answer begins.
_ASSISTANT = "\n\nAssistant:"


def read_row(row: Any) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected answer of a row as it was read, whose types are checked first.

    Args:
        row: a mapping with chosen and rejected, and with prompt, which may be missing or None where
            both begin with it. Messages are dicts with a string `role` and a string `content`; an
            assistant's that calls tools may have no content. Keys of messages that are None are
            left out, as Arrow adds them where other messages have such a key.

    Raises:
        ValueError: naming the column: missing, empty or of another type; or of `split_row`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with the columns {', '.join(COLUMNS)}")
    prompt, chosen, rejected = (
        _checked(row.get(name), name, optional=name == "prompt") for name in COLUMNS
    )
    return split_row(prompt, chosen, rejected)


def _checked(value: object, name: str, optional: bool) -> Any:
    if value is None:
        if not optional:
            raise ValueError(f"missing the column {name!r}")
        return None
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name!r} is empty")
        return value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name!r} should be a string or a list of messages")
    if not value:
        raise ValueError(f"{name!r} is empty")
    messages = [_checked_message(message, name) for message in value]
    if not any(_speaks(message) for message in messages):
        raise ValueError(f"{name!r} is empty")
    return messages


def _checked_message(message: object, name: str) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(role, str):
        raise ValueError(f"{name!r} should hold messages with 'role' and 'content'")
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if not (isinstance(content, str) or (content is None and calls)):
        raise ValueError(
            f"{name!r} should hold messages with 'role' and 'content', a string; got one of role "
            f"{role!r} whose 'content' is {type(content).__name__}"
        )
    return {k: v for k, v in message.items() if v is not None or k == "content"}


def _speaks(message: Message) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def split_row(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected answer, all strings or all lists of messages.

    Args:
        prompt: what both answers are to, or None where chosen and rejected begin with it. Messages
            are dicts with `role` and `content`, and are compared by what they say: these, calls of
            tools, thoughts and names.
        chosen, rejected: the better and the worse answer, or text or conversation that ends in it.

    Raises:
        ValueError: naming the column: chosen and rejected are of two kinds, are the same, have no
            beginning in common, leave nothing of one once it is taken away, do not continue with an
            assistant's message and end in one, or do not agree with the prompt.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (prompt is None or isinstance(prompt, str)):
            raise ValueError("'prompt', 'chosen' and 'rejected' should be all strings or all lists")
        _differ(chosen == rejected)
        return _split_strings(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("'prompt', 'chosen' and 'rejected' should be all strings or all lists")
    _differ(_keys(chosen) == _keys(rejected))
    if isinstance(prompt, list):
        found = _split_behind(prompt, chosen, rejected)
    else:
        found = _split_conversations(prompt, chosen, rejected)
    for name, answer in zip(("chosen", "rejected"), found[1:], strict=True):
        _check_roles(name, answer)
    return found


def _differ(same: bool) -> None:
    if same:
        raise ValueError("chosen and rejected are the same")


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    ends = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(ends, min(len(chosen), len(rejected)))]
    cut = shared.rfind(_ASSISTANT)
    cut = _word_boundary(shared, chosen, rejected) if cut < 0 else cut + len(_ASSISTANT)
    if not shared[:cut].strip():
        raise ValueError(
            "'prompt' is missing, and 'chosen' and 'rejected' should then begin with it, in the "
            "same words"
        )
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[cut:].strip():
            raise ValueError(f"{name!r} is empty behind what it has in common with the other")
    return shared[:cut], chosen[cut:], rejected[cut:]


def _word_boundary(shared: str, chosen: str, rejected: str) -> int:
    """Where to cut the shared text: at its end, or before the word that it ends in the middle of.
    A space at the cut goes to the answers, as most tokenizers have it."""
    cut = len(shared)
    following = (chosen[cut : cut + 1], rejected[cut : cut + 1])
    if any(_one_word(shared[-1:], character) for character in following):
        while cut and not shared[cut - 1].isspace() and not _wide(shared[cut - 1]):
            cut -= 1
    return cut - 1 if shared[:cut].endswith(" ") else cut


def _one_word(before: str, after: str) -> bool:
    if not before or not after or before.isspace() or after.isspace():
        return False
    return not (_wide(before) or _wide(after))


def _wide(character: str) -> bool:
    """Of a script without spaces between words."""
    return unicodedata.east_asian_width(character) in ("W", "F")


def _split_behind(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    begin = [_keys(answer)[: len(prompt)] == _keys(prompt) for answer in (chosen, rejected)]
    if all(begin):
        count = len(prompt)
        return prompt, _rest("chosen", chosen, count), _rest("rejected", rejected, count)
    if any(begin):
        name = "rejected" if begin[0] else "chosen"
        raise ValueError(f"{name!r} should begin with 'prompt', as the other answer does")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] in ("system", "user"):
            raise ValueError(
                f"'prompt' disagrees with {name!r}, which is a conversation that begins otherwise"
            )
    return prompt, chosen, rejected


def _split_conversations(
    prompt: str | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    alone = all(answer[0]["role"] == "assistant" for answer in (chosen, rejected))
    if prompt is not None and alone:
        return [{"role": "user", "content": prompt}], chosen, rejected
    both = zip(_keys(chosen), _keys(rejected), strict=False)
    count = next((i for i, (a, b) in enumerate(both) if a != b), min(len(chosen), len(rejected)))
    if count == 0:
        raise ValueError(
            "'chosen' and 'rejected' should begin with the same messages, or with an assistant's "
            "where there is a 'prompt'"
        )
    shared = chosen[:count]
    told = [m["content"].strip() for m in shared if m["role"] == "user"]
    if prompt is not None and prompt.strip() not in told:
        raise ValueError(
            "'prompt' disagrees with 'chosen' and 'rejected': it is none of the user's messages "
            "that both begin with"
        )
    return shared, _rest("chosen", chosen, count), _rest("rejected", rejected, count)


def _rest(name: str, conversation: list[Message], count: int) -> list[Message]:
    if len(conversation) == count:
        raise ValueError(f"{name!r} is empty behind the messages of the prompt")
    return conversation[count:]


def _check_roles(name: str, answer: Sequence[Message]) -> None:
    if answer[0]["role"] != "assistant":
        raise ValueError(
            f"{name!r} should go on with an assistant's message behind the messages of the prompt, "
            f"got one of role {answer[0]['role']!r}"
        )
    if answer[-1]["role"] != "assistant":
        raise ValueError(
            f"{name!r} should end in an assistant's message, got one of role {answer[-1]['role']!r}"
        )
    if not any(_speaks(m) for m in answer if m["role"] == "assistant"):
        raise ValueError(f"{name!r} is empty")


def _keys(messages: Sequence[Message]) -> list[Message]:
    return [{k: m[k] for k in _SAYS if m.get(k) is not None} for m in messages]
