"""Rows of preference data as public sets write them, to prompts and answers."""

from __future__ import annotations

import pytest
from preference_rows import HH, HH_PROMPT, IMPLICIT, TURNS, ULTRAFEEDBACK, assistant, user

from fastdpo.data.prompts import read_row, split_row


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (HH[0], HH_PROMPT.format("yes"), " I say yes", " I am silent"),
        (ULTRAFEEDBACK[0], [user("Say yes.")], [assistant("yes")], [assistant("not yes")]),
        (IMPLICIT[0], [user("Say yes.")], [assistant("yes")], [assistant("not yes")]),
        (
            {"chosen": [*TURNS, assistant("d")], "rejected": [*TURNS, assistant("e")]},
            TURNS,
            [assistant("d")],
            [assistant("e")],
        ),
        (
            {
                "prompt": TURNS,
                "chosen": [*TURNS, assistant("d"), user("e"), assistant("f")],
                "rejected": [*TURNS, assistant("d"), user("e"), assistant("g")],
            },
            TURNS,
            [assistant("d"), user("e"), assistant("f")],
            [assistant("d"), user("e"), assistant("g")],
        ),
        (
            {
                "prompt": "c",
                "chosen": [*TURNS, assistant("d")],
                "rejected": [*TURNS, assistant("e")],
            },
            TURNS,
            [assistant("d")],
            [assistant("e")],
        ),
        (
            {"prompt": "c\n", "chosen": [assistant("d")], "rejected": [assistant("e")]},
            [user("c\n")],
            [assistant("d")],
            [assistant("e")],
        ),
        (
            {"prompt": TURNS, "chosen": [assistant("d")], "rejected": [assistant("e")]},
            TURNS,
            [assistant("d")],
            [assistant("e")],
        ),
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a", " b", " c"),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            "The sky is",
            " blue.",
            " black.",
        ),
        ({"chosen": "Q: x\nA:\nyes", "rejected": "Q: x\nA:\nno"}, "Q: x\nA:\n", "yes", "no"),
        ({"chosen": "It is so.", "rejected": "It is so, no?"}, "It is", " so.", " so, no?"),
        ({"chosen": "天空是蓝色", "rejected": "天空是黑色"}, "天空是", "蓝色", "黑色"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_prompt_and_answers(row, prompt, chosen, rejected):
    found = split_row(row.get("prompt"), row["chosen"], row["rejected"])
    assert found == (prompt, chosen, rejected)


def test_messages_are_compared_by_what_they_say():
    chosen = [{**user("a"), "id": 1}, assistant("b")]
    rejected = [{**user("a"), "id": 2}, assistant("c")]
    assert split_row(None, chosen, rejected)[1:] == ([assistant("b")], [assistant("c")])


def test_it_is_what_trl_extracts():
    """Where TRL's rule does not cut a word or leave a shared beginning in an answer."""
    trl = pytest.importorskip("trl")
    rows = [
        *IMPLICIT,
        {"chosen": [*TURNS, assistant("d")], "rejected": [*TURNS, assistant("e")]},
        {"chosen": "The sky is blue.", "rejected": "The sky is gray."},
        {"chosen": "Say:\nred", "rejected": "Say:\nblue"},
    ]
    for row in rows:
        expected = trl.extract_prompt(row)
        assert split_row(None, row["chosen"], row["rejected"]) == tuple(expected.values())
    for row in ULTRAFEEDBACK:
        expected = trl.data_utils.maybe_extract_prompt(row)
        found = split_row(row["prompt"], row["chosen"], row["rejected"])
        assert found == tuple(expected[key] for key in ("prompt", "chosen", "rejected"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def calling(call, content=None):
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def test_answers_may_differ_in_the_tools_they_call_alone():
    other = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    row = {"prompt": [user("a")], "chosen": [calling(CALL)], "rejected": [calling(other)]}
    assert read_row(row) == tuple(row.values())
    spoken = {**row, "rejected": [assistant("b")]}
    assert read_row(spoken)[1:] == ([calling(CALL)], [assistant("b")])
    with pytest.raises(ValueError, match="chosen and rejected are the same"):
        read_row({**row, "rejected": [calling(CALL)]})


def test_the_keys_that_arrow_adds_to_messages_are_left_out():
    padded = [{**message, "tool_calls": None, "name": None} for message in TURNS]
    row = {"prompt": padded, "chosen": [assistant("d")], "rejected": [assistant("e")]}
    assert read_row(row) == (TURNS, [assistant("d")], [assistant("e")])


ASKED = [user("a")]
BAD_ROWS = {
    "strings with nothing in common": ({"chosen": "yes", "rejected": "no"}, "'prompt' is missing"),
    "words with a beginning in common": ({"chosen": "blue", "rejected": "black"}, "'prompt' is"),
    "only white space in common": ({"chosen": "\n\nb", "rejected": "\n\nc"}, "'prompt' is missing"),
    "conversations with nothing in common": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "'chosen' and 'rejected' should begin with the same messages",
    ),
    "answers alone": (
        {"chosen": [assistant("b")], "rejected": [assistant("d")]},
        "'chosen' and 'rejected' should begin with the same messages",
    ),
    "the same strings": ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are the same"),
    "the same conversations": (
        {"chosen": [*ASKED, assistant("b")], "rejected": [*ASKED, assistant("b")]},
        "chosen and rejected are the same",
    ),
    "a string that ends early": ({"chosen": "Say yes", "rejected": "Say yes now"}, "'chosen' is"),
    "an answer without words": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: "},
        "'rejected' is empty",
    ),
    "a conversation that ends early": (
        {"chosen": [*ASKED, assistant("b")], "rejected": ASKED},
        "'rejected' is empty",
    ),
    "a user's last word": (
        {"chosen": [*ASKED, assistant("b")], "rejected": [*ASKED, assistant("c"), user("d")]},
        "'rejected' should end in an assistant's message, got one of role 'user'",
    ),
    "a user's answer": (
        {"chosen": [*ASKED, user("b"), assistant("d")], "rejected": [*ASKED, assistant("c")]},
        "'chosen' should go on with an assistant's message",
    ),
    "another prompt": (
        {"prompt": "z", "chosen": [*ASKED, assistant("b")], "rejected": [*ASKED, assistant("c")]},
        "'prompt' disagrees with 'chosen' and 'rejected'",
    ),
    "another conversation": (
        {
            "prompt": [user("z")],
            "chosen": [*ASKED, assistant("b")],
            "rejected": [*ASKED, assistant("c")],
        },
        "'prompt' disagrees with 'chosen'",
    ),
    "the prompt in one of two": (
        {"prompt": ASKED, "chosen": [*ASKED, assistant("b")], "rejected": [assistant("c")]},
        "'rejected' should begin with 'prompt'",
    ),
    "a prompt and nothing more": (
        {"prompt": ASKED, "chosen": [*ASKED, assistant("b")], "rejected": ASKED},
        "'rejected' is empty",
    ),
    "two kinds": (
        {"chosen": "a b", "rejected": [*ASKED, assistant("b")]},
        "'prompt', 'chosen' and 'rejected' should be all strings or all lists",
    ),
    "an empty answer": (
        {"chosen": [*ASKED, assistant(" ")], "rejected": [*ASKED, assistant("b")]},
        "'chosen' is empty",
    ),
    "a tool's answer": (
        {
            "prompt": ASKED,
            "chosen": [{"role": "tool", "content": "3"}, assistant("b")],
            "rejected": [assistant("c")],
        },
        "'chosen' should go on with an assistant's message",
    ),
    "no rejected": ({"chosen": "a b"}, "missing the column 'rejected'"),
    "no chosen": ({"prompt": "a", "chosen": None, "rejected": "b"}, "missing the column 'chosen'"),
    "no row": ("a b", "expected an object with the columns prompt, chosen, rejected"),
    "a number": (
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        "'prompt' should be a string or a list of messages",
    ),
    "an empty prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
    "a prompt of no messages": (
        {"prompt": [], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "'prompt' is empty",
    ),
    "ShareGPT's names": (
        {"chosen": [{"from": "human", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]},
        "'chosen' should hold messages with 'role' and 'content'",
    ),
    "parts of a content": (
        {
            "prompt": ASKED,
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
            "rejected": [assistant("c")],
        },
        "'chosen' should hold messages with .* whose 'content' is list",
    ),
    "no content": (
        {
            "prompt": [{"role": "user"}],
            "chosen": [assistant("b")],
            "rejected": [assistant("c")],
        },
        "'prompt' should hold messages with .* whose 'content' is NoneType",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_is_refused_with_its_column(case):
    row, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        read_row(row)
