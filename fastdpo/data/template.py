"""Conversations to text, by a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .prompts import Message

# Said by `prepare` itself, or about what apply_chat_template returns.
_RESERVED = (
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
_SHOWN = 40  # characters of a text in a message


@dataclass(frozen=True)
class Template:
    """What a chat template is given beside the messages; None: the tokenizer's own."""

    chat_template: str | None = None
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def of_row(self, row: Mapping[str, Any]) -> Template:
        """With what the row says itself, in its columns `tools` and `chat_template_kwargs`.

        Raises:
            ValueError: naming the column.
        """
        tools = read_tools(row.get("tools"))
        variables = read_variables(row.get("chat_template_kwargs"))
        return Template(self.chat_template, tools or self.tools, {**self.variables, **variables})

    def render(self, tokenizer: Any, messages: list[Message], prompt: bool) -> str:
        """The text of the messages; of a prompt, with the beginning of the answer.

        Raises:
            ValueError: the template refuses the messages.
        """
        from jinja2 import TemplateError  # apply_chat_template needs it too

        try:
            return tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                chat_template=self.chat_template,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.variables,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the chat template does not take the messages: {error}") from None


def read_tools(value: Any) -> list[Any] | None:
    """A list of tools, from itself or from JSON; None where there are none.

    None of [] too: some templates announce tools as soon as there is a list.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is a string that is not JSON ({error.msg})") from None
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(tool, Mapping) or callable(tool) for tool in value
    ):
        raise ValueError("'tools' should be a list of tools (JSON schemas), or JSON of one")
    return list(value) or None


def read_variables(value: Any) -> dict[str, Any]:
    """A template's variables. Those that are None are left out, as Arrow adds them."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("'chat_template_kwargs' should be a dict of the template's variables")
    for name in value:
        if name in _RESERVED:
            raise ValueError(f"'chat_template_kwargs' should not have {name!r}, which is set here")
    return {name: variable for name, variable in value.items() if variable is not None}


def render_pair(
    tokenizer: Any,
    template: Template,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
) -> tuple[str, str, str]:
    """The texts of the prompt, as the model is asked with it, and of the two answers behind it.

    Raises:
        ValueError: there is no chat template, it does not take the messages, it writes the prompt
            otherwise once it is answered, or it writes both answers alike.
    """
    if template.chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError("'chosen' is a conversation, and the tokenizer has no chat template")
    asked = template.render(tokenizer, prompt, prompt=True)
    texts = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        whole = template.render(tokenizer, [*prompt, *answer], prompt=False)
        if not whole.startswith(asked):
            raise ValueError(_changed(name, asked, whole))
        if whole == asked:
            raise ValueError(f"{name!r} is empty, once it is through the chat template")
        texts.append(whole[len(asked) :])
    if texts[0] == texts[1]:
        raise ValueError("chosen and rejected are the same, once through the chat template")
    return asked, texts[0], texts[1]


def _changed(name: str, asked: str, whole: str) -> str:
    pairs = enumerate(zip(asked, whole, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(asked), len(whole)))
    return (
        f"the chat template changes the prompt once it is answered by {name!r}: it has "
        f"{asked[start : start + _SHOWN]!r} where the model is asked, and "
        f"{whole[start : start + _SHOWN]!r} where it has answered. Set the variables that make "
        "them agree (chat_template_kwargs), or pass another chat_template"
    )
