"""The demo from its command line to a model that loads again, and what it says of bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from sampling import sampled

from fastdpo import cli
from fastdpo.demo import plot, run, synthetic

TRL_NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A shortened run: its directory."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SYNTHETIC_PAIRS", 240)
        patch.setattr(run, "LARGE_VOCABULARY", 8000)
        status = cli.main(
            ["demo", "--output", str(folder), "--sft-steps", "60", "--steps", "30", "--lr", "1e-3"]
        )
    assert status == 0
    return folder


def test_it_leaves_a_model_a_plot_and_its_metrics(finished):
    assert {path.name for path in finished.iterdir()} == {
        "metrics.jsonl",
        "model",
        "plot.png",
        "summary.json",
    }
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.parent.glob(".out*"))

    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert all(row.keys() >= TRL_NAMES for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["eval_rewards/accuracies"] > 0.8


def test_held_out_accuracy_rises_and_memory_was_measured(finished):
    summary = json.loads((finished / "summary.json").read_text())
    before, after = summary["held_out_before"], summary["held_out_after"]
    assert before["reward_accuracy"] == 0.5
    assert before["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert after["reward_accuracy"] > 0.8
    assert after["preference_accuracy"] > before["preference_accuracy"]
    assert set(after["by_flaw"]) == set(synthetic.FLAWS)
    small, large = summary["peak_step_bytes"]
    assert large["vocab_size"] == 8000
    sequences, length = 32, 30  # at least
    assert large["eager"] > 3 * 4 * sequences * length * 8000
    assert large["fastdpo"] < large["eager"] / 2
    assert small["fastdpo"] < small["eager"]


def test_the_saved_model_and_tokenizer_load_again_and_answer(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    messages = [{"role": "user", "content": "Tell me, what color is a lemon?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Tell me, what color is a lemon?<|end|><|assistant|>"
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith(text)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


def test_a_second_run_replaces_the_first_and_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SYNTHETIC_PAIRS", 40)
    monkeypatch.setattr(run, "LARGE_VOCABULARY", 2000)
    short = ["demo", "--output", str(tmp_path / "out"), "--sft-steps", "2", "--steps", "3"]
    seen = []
    for seed in (0, 0, 1):
        assert cli.main([*short, "--seed", str(seed)]) == 0
        seen.append((tmp_path / "out" / "metrics.jsonl").read_text())
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert seen[0] == seen[1] != seen[2]


PLAIN = [
    {"prompt": f"Say {word}:", "chosen": f" {word}", "rejected": f" not {word}, never"}
    for word in ("yes", "no", "hello", "goodbye", "red", "blue", "one", "two")
]
CONVERSATIONAL = [
    {
        "prompt": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": row["prompt"]},
        ],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PLAIN
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FILES = {"plain": PLAIN, "conversational": CONVERSATIONAL}
OPTIONS = [
    "--objective ipo",
    "--objective simpo --beta 2",
    "--objective exo_pair --label-smoothing 0.1",
    "--lora",
    "--dtype bfloat16",
    "--sft-steps 2 --max-length 48 --backend torch",
]


@pytest.mark.parametrize(
    "case",
    sampled(
        [(rows, options) for rows in FILES for options in OPTIONS],
        [("plain", OPTIONS[0]), ("plain", OPTIONS[5])]
        + [("conversational", options) for options in OPTIONS[1:5]],
    ),
    ids=" ".join,
)
def test_a_file_of_pairs_and_a_model_from_a_directory(finished, tmp_path, case):
    rows, options = FILES[case[0]], case[1].split()
    data, out = write(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    common = ["--data", data, "--output", str(out), "--model", str(finished / "model")]
    assert cli.main(["demo", *common, "--steps", "2", "--batch-size", "4", *options]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["options"]["data"] == data
    transformers.AutoModelForCausalLM.from_pretrained(out / "model")


def test_a_file_of_pairs_and_a_new_model(tmp_path):
    data, out = write(tmp_path / "pairs.jsonl", PLAIN), tmp_path / "out"
    arguments = ["--data", data, "--output", str(out), "--steps", "2", "--sft-steps", "2"]
    assert cli.main(["demo", *arguments]) == 0
    assert (out / "plot.png").is_file()


GOOD = json.dumps(PLAIN[0])
BAD_FILES = {
    "not json": (f"{GOOD}\n\n{{nonsense\n", "line 3: not JSON"),
    "not an object": (f"{GOOD}\n[1]\n", "line 2: expected an object"),
    "a column too few": (
        f'{GOOD}\n{{"prompt": "a", "chosen": "b"}}\n',
        "line 2: missing the column 'rejected'",
    ),
    "an empty answer": (
        '{"prompt": "a", "chosen": " ", "rejected": "c"}\n',
        "line 1: 'chosen' is empty",
    ),
    "an empty conversation": (
        '{"prompt": [], "chosen": [], "rejected": []}\n',
        "line 1: 'prompt' is empty",
    ),
    "an empty message": (
        json.dumps({**CONVERSATIONAL[0], "rejected": [{"role": "assistant", "content": ""}]}),
        "line 1: 'rejected' is empty",
    ),
    "a message without a role": (
        json.dumps({**CONVERSATIONAL[0], "chosen": [{"content": "a"}]}),
        "line 1: 'chosen' should hold messages",
    ),
    "a number": ('{"prompt": 1, "chosen": "b", "rejected": "c"}\n', "'prompt' should be a string"),
    "both kinds": (json.dumps({**CONVERSATIONAL[0], "chosen": "b"}), "all strings or all lists"),
    "equal answers": ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "are the same"),
    "one pair": (f"{GOOD}\n", "at least 2 pairs"),
    "nothing": ("", "at least 2 pairs"),
    "another encoding": (b"\xff\xfe\x00", "not UTF-8"),
}


def refused(arguments, capsys, tmp_path):
    """Runs, expects a refusal, and returns its one line."""
    before = sorted(tmp_path.iterdir())
    assert cli.main(["demo", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdpo: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    return error


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_refused_with_its_line(case, tmp_path, capsys):
    content, message = BAD_FILES[case]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(["--data", str(path)], capsys, tmp_path)
    assert message in error
    assert "pairs.jsonl" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere/pairs.jsonl"], "No such file"),
        (["--objective", "nonsense"], "--objective should be one of sigmoid"),
        (["--objective", "kto"], "--objective should be one of"),
        (["--objective", "hinge", "--label-smoothing", "0.1"], "label_smoothing"),
        (["--beta", "0"], "beta"),
        (["--beta", "nan"], "beta"),
        (["--steps", "0"], "--steps"),
        (["--sft-steps", "-1"], "--sft-steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-length", "2"], "--max-length"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--dtype", "float8"], "--dtype"),
        (["--backend", "nonsense"], "--backend"),
        (["--device", "nonsense"], "--device"),
        (["--model", "/nowhere"], "--model /nowhere cannot be loaded"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused(arguments, message, tmp_path, capsys):
    assert message in refused(arguments, capsys, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can be used here")
def test_a_backend_that_cannot_run_here_is_refused(tmp_path, capsys):
    assert "--backend cuda cannot be used here" in refused(["--backend", "cuda"], capsys, tmp_path)


def test_answers_that_truncation_leaves_nothing_of_are_refused(tmp_path, capsys):
    rows = [{**row, "prompt": "word " * 50} for row in PLAIN]
    data = write(tmp_path / "pairs.jsonl", rows)
    assert "--max-length 8 leaves 0 pairs" in refused(
        ["--data", data, "--max-length", "8"], capsys, tmp_path
    )


def test_an_output_that_is_something_else_is_not_touched(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "holds something else" in refused([], capsys, tmp_path)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_run_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(plot, "draw", fail)
    data = write(tmp_path / "pairs.jsonl", PLAIN)
    arguments = ["--data", data, "--output", str(tmp_path / "out"), "--sft-steps", "1"]
    with pytest.raises(RuntimeError, match="no ink"):
        cli.main(["demo", *arguments, "--steps", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
