"""docs/frontier.md and examples/frontier say what the committed records say."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from fastdpo.demo.frontier import figures, plan, results, summary
from fastdpo.demo.frontier.settings import Settings

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "frontier"
PAGE = ROOT / "docs" / "frontier.md"
BEGIN, END = "<!-- frontier:begin -->\n", "<!-- frontier:end -->"


def test_the_committed_records_are_the_full_plans():
    found = results.load(EXAMPLE / "results.json")
    assert Settings(**found.header["settings"]) == Settings()
    names = [
        plan.Run(record["method"], tuple(record["knobs"].items()), record["seed"]).name
        for record in found.records
    ]
    assert sorted(names) == sorted(run.name for run in [*plan.full_plan(), *plan.trl_plan()])
    assert (EXAMPLE / "results.json").stat().st_size < 1_500_000


def test_the_table_is_current():
    """Renew it with: python tests/demo/test_frontier_docs.py"""
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0] == summary.markdown(
        results.load(EXAMPLE / "results.json")
    )


def test_every_figure_is_there_and_shown():
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"\]\(\.\./(examples/frontier/figures/(\w+)\.png)\)", page)
    assert {name for _, name in shown} == set(figures.FIGURES)
    for path, _ in shown:
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


def test_the_figures_are_drawn_again_from_the_committed_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLE / "draw.py"), run_name="__main__")
    assert capsys.readouterr().out.split() == list(figures.FIGURES)


def test_the_code_on_the_page_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    tiny = "vocab_size=4, length=2, hidden=8, sft_steps=3, draws=8, batch=4, steps=4"
    assert "Settings(steps=300)" in code
    assert "jobs=2" in code
    monkeypatch.chdir(tmp_path)
    code = code.replace("Settings(steps=300)", f"Settings({tiny})").replace("jobs=2", "jobs=1")
    exec(compile(code, str(PAGE), "exec"), {})
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 3


SIZES = (
    "--vocab-size 50 --prompt-length 3 --answer-length 4 --hidden 16 --intermediate 32 --layers 1 "
    "--heads 2 --sft-steps 2 --branches 4 --prompts 8 --steps 2 --batch 4 --betas 0.1 1 "
    "--evaluations 1 --evaluation-answers 4 --device cpu --dtype float32"
)


def test_the_larger_version_takes_its_sizes_as_options(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.json"
    monkeypatch.setattr(sys, "argv", ["scale_up.py", "--output", str(out), *SIZES.split()])
    runpy.run_path(str(EXAMPLE / "scale_up.py"), run_name="__main__")
    record = json.loads(out.read_text())
    assert [run["beta"] for run in record["runs"]] == [0.1, 1.0]
    assert record["config"]["vocab_size"] == 50

    monkeypatch.setattr(sys, "argv", ["scale_up.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE / "scale_up.py"), run_name="__main__")
    assert "steps should be at least 1" in capsys.readouterr().err


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    table = summary.markdown(results.load(EXAMPLE / "results.json"))
    PAGE.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")
