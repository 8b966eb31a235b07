"""The whole-step benchmark: its data, and loops whose losses coincide."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks.environment import environment
from benchmarks.report import command as report
from benchmarks.report import documents
from benchmarks.step import command as step
from benchmarks.step import data, loops, models, shown, worker

CPU = torch.device("cpu")
LENGTHS = data.SHAPES["ultrafeedback-like"].scaled(0.05)
REQUEST = {
    "model": "test",
    "lengths": LENGTHS.as_dict(),
    "batch_size": 2,
    "steps": 4,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    config_class, options = models.SHAPES["tiny"]
    small = {**options, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    monkeypatch.setitem(models.SHAPES, "test", (config_class, small))


def test_lengths_follow_the_stated_distribution():
    shape = data.SHAPES["hh-like"]
    examples = data.pairs(shape, 2000, vocab=1000)
    prompts = [len(e["prompt_ids"]) for e in examples]
    answers = [len(e["chosen_ids"]) - 1 for e in examples]  # EOS comes on top
    assert statistics.median(prompts) == pytest.approx(shape.prompt_median, rel=0.1)
    assert statistics.median(answers) == pytest.approx(shape.completion_median, rel=0.1)
    assert max(prompts) <= shape.prompt_most
    assert max(answers) <= shape.completion_most - 1


def test_answers_differ_in_what_they_favour():
    (example,) = data.pairs(data.Lengths(50, 0.0, 50, 400, 0.0, 500), 1, vocab=1000)
    for side, parity in (("chosen_ids", 0), ("rejected_ids", 1)):
        assert example[side][-1] == data.EOS
        tokens = torch.tensor(example[side][:-1])
        assert tokens.min() >= 2
        assert tokens.max() < 1000
        assert (tokens % 2 == parity).double().mean() > 0.7


def test_text_turns_back_into_the_same_tokens():
    pytest.importorskip("tokenizers")
    tokenizer = loops._tokenizer(300)
    (example,) = data.pairs(LENGTHS, 1, vocab=300)
    text = loops._as_text(example)
    assert tokenizer(text["prompt"])["input_ids"] == example["prompt_ids"]
    whole = text["prompt"] + text["chosen"] + tokenizer.eos_token
    assert tokenizer(whole)["input_ids"] == example["prompt_ids"] + example["chosen_ids"]


def test_loss_curves_coincide():
    names = ["fastdpo", "eager", *(n for n in loops.LOOPS if n not in ("fastdpo", "eager"))]
    names = [name for name in names if loops.absent(name) is None]
    rows = []
    for name in names:
        result = worker.run({**REQUEST, "loop": name})
        assert len(result["losses"]) == len(result["seconds"]) == REQUEST["steps"]
        assert result["peak_bytes"] > 0
        rows.append({"provider": name, **result})
    step.compare_losses(rows)
    assert rows[0]["losses"][0] == pytest.approx(0.6931472, abs=1e-6)
    assert rows[1]["losses"][-1] != rows[1]["losses"][0]  # it trains
    assert all(r["largest_loss_difference"] < 1e-4 for r in rows)
    once = {r["provider"] for r in rows if r["reference_seconds"] is not None}
    assert once == {"reference-once", "packed", "shared-prompts", "token-budget"}


def test_rows_documents_and_plot(tmp_path, monkeypatch):
    request = {**REQUEST, "model": "tiny", "loop": "fastdpo"}
    row = step.run_loop("fastdpo", request, timeout=120)
    assert row["status"] == "ok", row.get("reason")
    assert row["pairs_per_second"] > 0
    monkeypatch.setattr(loops, "absent", lambda name: "not installed: trl")
    gone = step.run_loop("trl", {**request, "loop": "trl"}, None)
    monkeypatch.undo()
    assert gone["status"] == "absent"
    failing = step.run_loop("fastdpo", {**request, "model": "nothing"}, None)
    assert failing["status"] == "failed"
    assert "nothing" in failing["reason"]
    shared = {**request, "loop": "shared-prompts"}
    rows = [row, step.run_loop("shared-prompts", shared, timeout=120)]
    baseline = {**row, "provider": "eager", "pairs_per_second": row["pairs_per_second"] / 2}
    step.compare_speed([*rows, baseline, gone])
    assert row["times_baseline"] == pytest.approx(2)
    assert baseline["times_baseline"] == 1
    how = {
        "shape": "ultrafeedback-like",
        "precision": "fp32",
        "lengths": {"mean_prompt": 1.0, "mean_completion": 2.0},
    }
    doc = documents.document(
        "step", "Step", environment(CPU), how, [baseline, *rows, gone, failing]
    )
    section = report.render({"cpu-step": doc})
    assert f"{row['pairs_per_second']:.2f}" in section
    assert "`trl` (not installed: trl)" in section
    shown.plot(doc, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
