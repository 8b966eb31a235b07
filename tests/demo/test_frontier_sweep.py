"""The sweep of `fastdpo demo --frontier`: resumed after a kill, refused where it should be, drawn
from its JSON alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sampling import sampled

from fastdpo import cli
from fastdpo.demo.frontier import command, figures, plan, results, summary, sweep
from fastdpo.demo.frontier.figures import FIGURES
from fastdpo.demo.frontier.lab import Lab
from fastdpo.demo.frontier.plan import METHODS, Run
from fastdpo.demo.frontier.settings import Settings

TINY = Settings(
    vocab_size=4,
    length=2,
    hidden=8,
    layers=1,
    sft_steps=3,
    sft_batch=8,
    draws=8,
    steps=4,
    batch=4,
    evaluations=2,
)
FEW = [*plan.truths("plain"), *plan.runs_of("dpo", 0, labels=("reward",), beta=(0.1, 1.0))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The full plan of one seed in a tiny world: its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    told = []
    ran = sweep.sweep(folder, TINY, plan.full_plan(1), progress=lambda *args: told.append(args))
    assert ran == len(plan.full_plan(1))
    assert [args[:2] for args in told] == [(k, ran) for k in range(ran + 1)]
    return folder


def test_the_plan_is_the_papers():
    names = {run.name for run in plan.full_plan()}
    for seed in range(3):
        assert {
            f"dpo-{labels}-{beta}-seed{seed}"
            for labels in plan.LABELS
            for beta in ("0.05", "0.1", "1", "5")
        } <= names
        for method in ("ppo_learned", "ppo_true"):
            assert {f"{method}-{kl}-seed{seed}" for kl in (3, 6, 9, 12)} <= names
        assert {f"unlikelihood-{a}-seed{seed}" for a in ("0.05", "0.1", "0.5", "1")} <= names
        assert f"preferred_ft-seed{seed}" in names
    everything = [*plan.full_plan(), *plan.trl_plan()]
    assert {run.method for run in everything} == set(METHODS) == set(sweep.FUNCTIONS)
    assert {run.name for run in plan.quick_plan()} < names


def test_every_run_leaves_its_record_and_its_budget(finished):
    found = results.load(finished)
    assert len(found.records) == len(plan.full_plan(1))
    assert found.seeds == 1
    for record in found.records:
        if record["method"] == "truth":
            continue
        budget, curve = record["budget"], record["curve"]
        assert curve[0]["step"] == 0
        assert curve[0]["kl"] == 0
        assert curve[-1]["step"] == TINY.steps
        steps = 2 * TINY.steps if record["method"] == "ppo_learned" else TINY.steps
        assert budget["optimizer_steps"] == steps
        assert 0 < budget["samples"] <= (2 if record["method"] == "ppo_learned" else 1) * 32
        assert budget["training_cpu_seconds"] > 0
        if "training" in record and record["method"] != "simpo":
            start = record["training"][0]
            if record["knobs"].get("objective") != "simpo":
                assert (start["margin"], start["weight"]) == (0, 0.5)


def test_a_run_is_the_same_again(finished):
    """But for the clocks."""
    run = FEW[1]
    again = sweep.rounded(sweep.run_one(Lab(TINY), run))
    first = json.loads(sweep.path_of(finished, run).read_text())
    for record in (again, first):
        record.pop("budget")
        for point in record["curve"]:
            point.pop("seconds", None), point.pop("cpu_seconds", None)
    assert json.loads(json.dumps(again)) == first


@pytest.mark.parametrize("jobs", sampled([1, 2], (1,)))
def test_a_killed_sweep_goes_on(tmp_path, jobs):
    """No run is repeated, none is lost, nothing half-written is left."""
    folder = tmp_path / "out"
    script = (
        "import sys, pathlib; sys.path[:0] = [sys.argv[1], 'tests', str(pathlib.Path.cwd())]\n"
        "from test_frontier_sweep import TINY, sweep, plan\n"
        "sweep.sweep(pathlib.Path(sys.argv[2]), TINY, plan.full_plan(1), jobs=int(sys.argv[3]))\n"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(folder), str(jobs)],
        cwd=root,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("runs/*.json"))) < 3:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("runs/*.json")}
    for path in folder.glob("runs/*.json"):
        json.loads(path.read_text())  # whole
    some = plan.full_plan(1)[: len(before) + 2]
    assert len(before) < len(plan.full_plan(1))
    ran = sweep.sweep(folder, TINY, some)
    missing = [run for run in some if f"{run.name}.json" not in before]
    assert ran == len(missing) > 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("runs/*.json")}
    assert set(after) == set(before) | {f"{run.name}.json" for run in some}
    assert {name: after[name] for name in before} == before


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(sweep.os, "replace", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        sweep.write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


def test_processes_share_the_work(tmp_path):
    assert sweep.sweep(tmp_path, TINY, FEW, jobs=2) == 3
    assert sorted(path.stem for path in tmp_path.glob("runs/*")) == sorted(r.name for r in FEW)
    assert sweep.sweep(tmp_path, TINY, FEW, jobs=2) == 0


def test_a_process_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.sys, "executable", "/bin/false")
    with pytest.raises((RuntimeError, BrokenPipeError)):
        sweep.sweep(tmp_path, TINY, FEW, jobs=2)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    sweep.sweep(tmp_path, TINY, FEW[:1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"same settings, got .* with draws 8 \(asked for: 512\)"):
        sweep.sweep(tmp_path, Settings(**{**TINY.as_dict(), "draws": 512}), FEW)
    header = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**header, "format": 0}))
    with pytest.raises(ValueError, match="format 1, got 0"):
        sweep.sweep(tmp_path, TINY, FEW)
    with pytest.raises(ValueError, match="format 1, got 0"):
        results.load(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="empty or hold a sweep"):
        sweep.sweep(tmp_path, TINY, FEW)
    with pytest.raises(ValueError, match="got the file"):
        sweep.sweep(tmp_path / "thesis.txt", TINY, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Run("dqo"), "method should be one of truth, dpo, .*, got 'dqo'"),
        (lambda: Run("dpo", (("beta", 1.0),)), r"knobs of dpo should be \(labels, beta\)"),
        (lambda: Run("dpo", (("labels", "x"), ("beta", 1.0))), "labels should be one of reward"),
        (lambda: Run("ipo", (("beta", -1.0),)), "beta should be a number"),
        (lambda: Run("preferred_ft", seed=-1), "seed should be at least 0"),
        (lambda: plan.full_plan(0), "seeds should be at least 1"),
        (lambda: plan.trl_plan(0), "seeds should be at least 1"),
        (lambda: plan.quick_plan(0), "seeds should be at least 1"),
        (lambda: plan.check_plan([]), "at least one run"),
        (lambda: plan.check_plan([FEW[0], FEW[0]]), "truth-plain twice"),
        (lambda: Settings(vocab_size=32_000), "sequences"),
        (lambda: Settings(steps=0), "steps should be an integer of at least 1"),
        (lambda: Settings(lr=0.0), "lr should be between 0 and 1"),
        (lambda: Settings(completions=1), "completions should be at least 2"),
        (lambda: Settings(hidden=33), "hidden should be a multiple of heads"),
        (lambda: Settings(draws=1, batch=8), "batch should be at most 6 pairs"),
        (lambda: Settings(steps=2), "evaluations should be at most steps"),
        (lambda: results.load(Path("/nowhere")), "path should be a sweep's folder"),
    ],
)
def test_what_cannot_be_run_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_figure_is_drawn_from_the_json_alone(finished, tmp_path):
    merged = tmp_path / "results.json"
    results.merge(results.load(finished), merged)
    found = results.load(merged)
    assert found == results.load(finished)
    assert figures.draw(found, tmp_path / "figures") == list(FIGURES)
    for name in FIGURES:
        picture = (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000


def test_figures_without_records_are_left_out(finished, tmp_path):
    found = results.load(finished)
    kept = tuple(r for r in found.records if r["method"] in ("truth", "dpo"))
    assert figures.draw(results.Results(found.header, kept), tmp_path) == ["gradient_weight"]


def test_the_table_names_what_the_kl_could_buy():
    points = [{"kl": 0.0, "reward": 1.0}, {"kl": 1.0, "reward": 2.0}, {"kl": 3.0, "reward": 3.0}]
    for kl, reward in ((0.0, 1.0), (0.5, 1.5), (2.0, 2.5), (9.0, 3.0)):
        assert summary.most_reward(points, kl) == pytest.approx(reward)


def test_the_command_line_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Settings", lambda: TINY)
    out = tmp_path / "out"
    arguments = ["demo", "--frontier", "--output", str(out), "--jobs", "1", "--seeds", "1"]
    assert cli.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {
        "figures",
        "results.json",
        "runs",
        "settings.json",
    }
    drawn = {path.stem for path in (out / "figures").iterdir()}
    assert drawn == {"frontier", "temperature", "gradient_weight"}
    assert "ppo_learned" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "0 runs in" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frontier", "--seeds", "0"], "seeds should be at least 1"),
        (["--frontier", "--jobs", "0"], "jobs should be an integer of at least 1"),
        (["--frontie"], "--frontier should be written in full"),
    ],
)
def test_the_command_line_refuses(arguments, message, tmp_path, capsys):
    assert cli.main(["demo", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_demos_other_options_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["demo", "--frontier", "--steps", "3", "--output", str(tmp_path / "out")])
    assert refused.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_trls_trainer_where_it_is_installed(tmp_path, monkeypatch):
    """RLOO under its own name: the true reward rises, on no more answers than others have."""
    pytest.importorskip("trl")
    settings = Settings(
        vocab_size=4,
        length=3,
        hidden=16,
        layers=1,
        sft_steps=50,
        draws=128,
        steps=20,
        batch=16,
        lr=3e-3,
        evaluations=1,
    )
    sweep.sweep(tmp_path, settings, plan.runs_of("rloo", 0, beta=(0.1,)))
    (record,) = results.load(tmp_path).records
    first, last = record["curve"]
    assert last["reward"] > first["reward"] + 0.1
    assert last["kl"] > 0
    assert record["budget"]["samples"] == record["budget"]["reward_calls"] == 320 <= 512

    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs trl"):
        sweep.sweep(tmp_path / "other", settings, plan.trl_plan())
    assert not (tmp_path / "other").exists()
