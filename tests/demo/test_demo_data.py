"""What the demo reads: files of preference data, to the tokens it trains on."""

from __future__ import annotations

import json

import pytest
from preference_rows import HH, IMPLICIT, ULTRAFEEDBACK, assistant, user
from sampling import sampled

from fastdpo import cli
from fastdpo.demo import collate
from fastdpo.demo import model as models
from fastdpo.demo.options import InputError
from fastdpo.demo.pairs import Pair, read_pairs

BAD_ROWS = [
    ({"chosen": "yes", "rejected": "no"}, "'prompt' is missing"),
    ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are the same"),
    ({"chosen": "a b"}, "missing the column 'rejected'"),
    ("a b", "expected an object with the columns"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_row_that_cannot_be_is_refused_with_its_line_and_column(row, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*IMPLICIT, row]))
    with pytest.raises(InputError, match=f"line {len(IMPLICIT) + 1}: {message}"):
        read_pairs(path)


@pytest.mark.parametrize("rows", [HH, ULTRAFEEDBACK, IMPLICIT], ids=["hh", "ultrafeedback", "none"])
@pytest.mark.parametrize("kind", sampled(["jsonl", "parquet"], ("jsonl",)))
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
    found, same = collate.encode_all([first, explicit], tokenizer, 64)
    assert found == same
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
