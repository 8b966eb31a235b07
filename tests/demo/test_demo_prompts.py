"""Rows of preference data as public sets write them, to prompts and answers."""

from __future__ import annotations

import json

import pytest

from fastdpo import cli
from fastdpo.demo import collate
from fastdpo.demo import model as models
from fastdpo.demo.options import InputError
from fastdpo.demo.pairs import Pair, read_pairs
from fastdpo.demo.prompts import split_row


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
    "no rejected": ({"chosen": "a b"}, "missing the column 'rejected'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_is_refused_with_its_line_and_column(case, tmp_path):
    row, message = BAD_ROWS[case]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*IMPLICIT, row]))
    with pytest.raises(InputError, match=f"line {len(IMPLICIT) + 1}: {message}"):
        read_pairs(path)


@pytest.mark.parametrize("rows", [HH, ULTRAFEEDBACK, IMPLICIT], ids=["hh", "ultrafeedback", "none"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_demo_trains_on_it(rows, kind, tmp_path):
    path, out = tmp_path / f"pairs.{kind}", tmp_path / "out"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pairs = read_pairs(path)
    assert len(pairs) == len(rows)
    arguments = ["--data", str(path), "--output", str(out), "--steps", "1", "--sft-steps", "1"]
    assert cli.main(["demo", *arguments, "--batch-size", "2"]) == 0
    assert (out / "summary.json").is_file()


def test_a_conversation_without_a_prompt_column_is_the_same_tokens_as_with_one(tmp_path):
    """Through the tokenizer's chat template: the answers alone carry loss."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in IMPLICIT))
    (first, *_) = read_pairs(path)
    tokenizer = models.make_tokenizer(["Say yes. not no"])
    explicit = Pair([user("Say yes.")], [assistant("yes")], [assistant("not yes")])
    found = collate.encode(first, tokenizer, 64)
    assert found == collate.encode(explicit, tokenizer, 64)
    assert tokenizer.decode(found.prompt_ids) == "<|user|>Say yes.<|end|><|assistant|>"
    assert tokenizer.decode(found.chosen_ids) == "yes<|end|>"


@pytest.mark.parametrize("content", [b"PAR1 not really", None], ids=["broken", "missing"])
def test_a_parquet_file_that_cannot_be_read(content, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "pairs.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"pairs\.parquet cannot be read"):
        read_pairs(path)


def test_a_parquet_file_names_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    rows = [*HH, {"chosen": "a b", "rejected": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match=f"row {len(rows)}: missing the column 'rejected'"):
        read_pairs(path)
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    with pytest.raises(InputError, match="row 1: missing the column 'chosen'"):
        read_pairs(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow: pip install pyarrow"):
        read_pairs(tmp_path / "pairs.parquet")
