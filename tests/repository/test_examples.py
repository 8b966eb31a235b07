"""The examples run as they are, offline, on a tiny model made by them and on one that is loaded."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lora": ("peft",),
    "trl_trainer": ("trl", "datasets"),
    "cached_reference": ("datasets",),
    "axolotl_dpo": ("trl", "datasets"),
    "fast_trainer": ("trl", "datasets"),
}
NAMES = (
    "plain_loop",
    "lora",
    "trl_trainer",
    "original_repository",
    "shared_prompts",
    "packed",
    "fast_trainer",
    "kto",
    "cached_reference",
)
FIRST_LOSS = {"kto": 0.5}  # of equal models; else ln 2
STACKS = ("megatron_lm", "verl_actor", "llama_factory", "axolotl_dpo", "torchtitan_loss")


def run(name, monkeypatch, capsys, *arguments):
    """Runs the script as `python examples/NAME.py` would; its losses, step by step."""
    for needed in NEEDS.get(name, ()):
        pytest.importorskip(needed, reason=f"needs {needed}")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = re.findall(
        r"^step (\d+)  loss ([\d.]+)  accuracy ([\d.]+)$", capsys.readouterr().out, re.M
    )
    assert [int(step) for step, *_ in printed] == list(range(1, len(printed) + 1))
    return [float(loss) for _, loss, _ in printed]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, monkeypatch, capsys, tmp_path):
    losses = run(name, monkeypatch, capsys, "--output", tmp_path / "out")
    assert len(losses) == 20
    first = FIRST_LOSS.get(name, 0.6931)  # the policy is its reference
    assert losses[0] == first
    assert losses[-1] < first - 0.09


@pytest.mark.parametrize("name", STACKS)
def test_on_the_stand_in_of_a_stack(name, monkeypatch, capsys):
    losses = run(name, monkeypatch, capsys)
    assert len(losses) == 20
    assert losses[0] == 0.6931
    assert losses[-1] < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_with_a_model_and_data_of_ones_own(name, monkeypatch, capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny

    tokenizer = tiny.tokenizer()
    given = tmp_path / "model"
    tiny.model(len(tokenizer)).save_pretrained(given)
    tokenizer.save_pretrained(given)
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny.read_pairs(None, 5)) + "\n")
    out = tmp_path / "out"
    arguments = ("--model", given, "--data", data, "--output", out, "--steps", 3, "--lr", 1e-2)
    losses = run(name, monkeypatch, capsys, *arguments)
    first = FIRST_LOSS.get(name, 0.6931)
    assert losses[0] == first
    assert losses[-1] < first - 0.001
    saved = AutoModelForCausalLM.from_pretrained(out)  # an adapter is found beside its base
    assert saved.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 80


def test_every_example_is_run():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {*NAMES, *STACKS, "tiny", "stand_ins"}
