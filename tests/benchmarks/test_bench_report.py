"""Documents, the pages made from them, and the plots."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import command as accuracy
from benchmarks.environment import environment
from benchmarks.loss import command as loss
from benchmarks.loss import runner
from benchmarks.measure import Deadline, Protocol
from benchmarks.providers.base import missing
from benchmarks.report import command as report
from benchmarks.report import documents, peers, readme_table
from benchmarks.scenarios import Scenario
from benchmarks.workspace import command as workspace
from benchmarks.workspace import shown
from benchmarks.workspace.limits import by_dtype

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
QUICK = Protocol(warmup=1, min_rounds=2, max_rounds=2)
SCENARIO = Scenario("tiny", 64, share=0.5, dtype="bf16", sequences=4)
NEEDS_TRL = pytest.mark.skipif(missing("trl.trainer.utils") is not None, reason="needs trl")
PEERS = ["fastdpo", "fastdpo-cuda", "eager", "trl-selective", "cce"]


def loss_document(**kwargs):
    rows = runner.run_scenario(SCENARIO, CPU, QUICK, PEERS, with_memory=False, **kwargs)
    return documents.document("loss", "The DPO loss step", environment(CPU), {}, rows)


@pytest.fixture(scope="module")
def loss_doc():
    return loss_document()


@NEEDS_TRL
def test_everybody_is_listed_and_only_the_accurate_are_timed(loss_doc):
    by = {r["provider"]: r for r in loss_doc["results"]}
    assert list(by) == ["products", *PEERS]
    assert by["cce"]["status"] == by["fastdpo-cuda"]["status"] == "absent"
    # bf16 log-probabilities are wrong by more than eager's rule allows.
    assert by["trl-selective"]["status"] == "inaccurate"
    assert "logps" in by["trl-selective"]["reason"]
    for r in by.values():
        assert ("seconds" in r) == (r["status"] == "ok"), r["provider"]
    t1 = by["products"]["t1_seconds"]
    expected = by["fastdpo"]["seconds"]["median"] / (3 * t1)
    assert by["fastdpo"]["multiple_of_floor"] == pytest.approx(expected)


def test_what_was_timed_is_a_result_though_no_time_is_left_for_its_memory(monkeypatch):
    late = Deadline(None)

    def last(*args):
        taken = measured(*args)
        monkeypatch.setattr(late, "_end", 0.0)
        return taken

    measured = runner.interleaved
    monkeypatch.setattr(runner, "interleaved", last)
    rows = runner.run_scenario(SCENARIO, CPU, QUICK, ["fastdpo", "eager"], deadline=late)
    assert late.passed
    for row in rows:
        assert row["status"] == "ok"
        assert "seconds" in row
        assert "extra_bytes" not in row


def test_a_provider_that_fails_beside_the_others_is_said_so(monkeypatch):
    def once(self, inputs):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 2:  # the check and the first run
            raise torch.OutOfMemoryError
        return step(self, inputs)

    (ours,) = runner.by_name(["fastdpo"])
    step = type(ours).step
    monkeypatch.setattr(type(ours), "step", once)
    rows = runner.run_scenario(SCENARIO, CPU, QUICK, ["fastdpo", "eager"], with_memory=False)
    by = {r["provider"]: r for r in rows}
    assert (by["fastdpo"]["status"], by["fastdpo"]["reason"]) == ("failed", "out of memory")
    assert "seconds" not in by["fastdpo"]
    assert by["eager"]["status"] == by["products"]["status"] == "ok"


def test_time_that_is_over_is_said_so():
    by = {r["provider"]: r for r in loss_document(deadline=Deadline(0.0))["results"]}
    assert by["fastdpo"]["status"] == "skipped"
    assert by["cce"]["status"] == "absent"


@NEEDS_TRL
def test_what_a_provider_raises_is_its_result(monkeypatch):
    from benchmarks.providers.eager import SelectiveLogSoftmax

    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(SelectiveLogSoftmax, "token_logps", broken)
    by = {r["provider"]: r for r in loss_document()["results"]}
    assert by["trl-selective"]["status"] == "failed"
    assert by["trl-selective"]["reason"] == "RuntimeError: no such kernel"
    assert by["fastdpo"]["status"] == "ok"


def test_documents_carry_their_origin_and_no_names_of_the_machine(loss_doc, tmp_path):
    env = loss_doc["environment"]
    assert env["hardware"]["name"]
    assert env["packages"]["torch"] == torch.__version__
    path = tmp_path / "loss.json"
    documents.save(loss_doc, path)
    assert documents.load(path) == json.loads(path.read_text())
    text = path.read_text()
    assert str(ROOT) not in text
    assert os.uname().nodename not in text


def test_documents_that_are_wrong_are_refused(loss_doc):
    for wrong in (
        {"schema": 0},
        {"kind": "speed"},
        {"environment": {}},
        {"results": [{"provider": "x"}]},
        {"results": [{"provider": "x", "status": "fast"}]},
        {"results": [{"provider": "x", "status": "absent"}]},
        {"results": [{"provider": "x", "status": "ok", "seconds": {"median": 1.0}}]},
    ):
        with pytest.raises(ValueError):
            documents.validate({**loss_doc, **wrong})


def test_documents_grow_by_scenario_and_keep_one_origin(loss_doc, tmp_path):
    path = tmp_path / "loss.json"
    other = json.loads(json.dumps(loss_doc).replace(SCENARIO.name, "another"))
    documents.save(loss_doc, path, append=True)
    documents.save(other, path, append=True)
    documents.save(other, path, append=True)
    assert len(documents.load(path)["results"]) == 2 * len(loss_doc["results"])
    assert {r["commit"] for r in documents.load(path)["results"]} == {
        documents.origin(loss_doc["environment"])
    }
    elsewhere = {**loss_doc, "environment": {**loss_doc["environment"], "hardware": {}}}
    with pytest.raises(ValueError, match="hardware"):
        documents.merged(loss_doc, elsewhere)


@NEEDS_TRL
def test_the_section_says_what_the_document_says(loss_doc):
    section = report.render({"cpu-loss": loss_doc})
    by = {r["provider"]: r for r in loss_doc["results"]}
    assert "GPU figures are still to be measured" in section
    assert f"{by['fastdpo']['multiple_of_floor']:.2f}" in section
    assert "`cce` (its kernels need a CUDA GPU)" in section
    assert "Not as accurate as eager PyTorch, so not timed: `trl-selective`" in section
    slower = json.loads(json.dumps(loss_doc))
    for r in slower["results"]:
        if r["provider"] == "fastdpo":
            r["seconds"]["median"] = 1e3
    assert "time against `eager`" in report.render({"cpu-loss": slower})


def test_the_section_goes_between_the_markers():
    page = f"a\n{report.BEGIN}\nold\n{report.END}\nz\n"
    written = report.with_section(page, "new")
    assert written == f"a\n{report.BEGIN}\nnew\n{report.END}\nz\n"
    assert report.section_of(written) == "new"
    for broken in ("a", report.BEGIN, f"{report.END}{report.BEGIN}", page + page):
        assert report.section_of(broken) is None
        with pytest.raises(ValueError, match="once each"):
            report.with_section(broken, "new")


def test_the_documented_figures_are_those_of_the_results():
    docs = documents.load_all()
    section = report.section_of(report.PAGE.read_text())
    assert section == report.render(docs), "run python -m benchmarks.report --write"
    listed = report.section_of(report.PAGE.read_text(), report.PEERS_BEGIN, report.PEERS_END)
    assert listed == peers.table(), "run python -m benchmarks.report --write"
    markers = report.HEADLINE_BEGIN, report.HEADLINE_END
    table = report.section_of(report.README.read_text(), *markers)
    assert table == readme_table.table(docs), "run python -m benchmarks.report --write"


def test_every_peer_is_listed_with_what_it_cannot_do():
    lines = peers.table().splitlines()[2:]
    assert len(lines) == len({line.split(" | ")[0] for line in lines}) > 15
    assert not any("fastdpo" in line.split(" | ")[0] for line in lines)
    assert all(len(line.strip("| ").split(" | ")) == 3 for line in lines)


def test_the_loss_table_has_the_columns_that_were_measured(loss_doc):
    section = report.render({"cpu-loss": loss_doc})
    assert "| scenario | floor | `fastdpo` | `eager` |" in section


def test_the_headline_has_every_row_and_a_peer_that_is_faster():
    docs = documents.load_all()
    rows = readme_table.table(docs).splitlines()
    assert len(rows) == 2 + len(readme_table.ROWS) == 8
    loss = docs["cpu-loss"]
    name = "llama-3-vocab-d512 512 100% head fp32"
    peers = [
        r
        for r in loss["results"]
        if r["scenario"]["name"] == name and r["status"] == "ok" and "fastdpo" not in r["provider"]
    ]
    timed = [r for r in peers if r["provider"] not in ("products", "eager")]
    fastest = min(timed, key=lambda r: r["seconds"]["median"])
    (row,) = [row for row in rows if "fp32, 512 tokens" in row]
    assert f"`{fastest['provider']}`" in row
    without = {k: d for k, d in docs.items() if k != "counted"}
    # Nothing is claimed that is not there.
    assert len(readme_table.table(without).splitlines()) == 6


def test_the_best_peer_of_the_headline_is_marked_where_it_breaks_the_rule():
    docs = documents.load_all()
    rows = [r for r in docs["counted"]["results"] if "extra_bytes" in r]
    peers = {
        r["provider"]: r["extra_bytes"]
        for r in rows
        if r["scenario"]["name"] == "llama-3-8b 8k 50% head bf16"
        and r["provider"] != "eager"
        and "fastdpo" not in r["provider"]
    }
    first, second, *_ = sorted(peers, key=lambda name: peers[name])

    def headline(**passes):
        results = [{"provider": n, "status": "ok", "passes": p} for n, p in passes.items()]
        shown = {"counted": docs["counted"], "a": {"kind": "accuracy", "results": results}}
        return readme_table.table(shown).splitlines()[2].split(" | ")[3]

    best, then = f"(`{first}`)", f"(`{second}`)"
    assert headline().endswith(best)
    assert headline(**{first: True, second: True}).endswith(best)
    both = headline(**{second: True})  # nobody has measured the first one's
    assert best in both
    assert both.endswith(then)
    marked = headline(**{first: False, second: True})
    assert f"(`{first}`, inaccurate)" in marked
    assert marked.endswith(then)


def test_every_kind_of_document_has_a_section():
    assert set(report.MARKDOWN) == set(documents.KINDS)


def test_the_accuracy_section_shows_the_longest_sequences_that_were_measured():
    shown = accuracy.measure(Scenario("tiny", 32, sequences=2), CPU, ["fastdpo", "eager"])
    late = accuracy.measure(
        Scenario("tiny", 64, sequences=2), CPU, ["fastdpo"], deadline=Deadline(0.0)
    )
    flat = accuracy.measure(
        Scenario("tiny", 64, sequences=2, peaked=False), CPU, ["fastdpo", "fastdpo-wmax"]
    )
    doc = documents.document("accuracy", "Accuracy", environment(CPU), {}, shown + late + flat)
    section = report.render({"cpu-accuracy": doc})
    assert section.count("| `fastdpo` | peaked, 16 |") == 1
    assert section.count("| `fastdpo` | flat, 32 |") == 1
    assert "fastdpo-wmax" not in section  # the loss table's providers are enough
    assert f"{shown[1]['sequence_nats']['max']:.1e}" in section


def test_kernels_section():
    row = {
        "provider": "triton",
        "status": "ok",
        "primitive": "exp_logits",
        "scenario": {"name": "exp_logits tiny"},
        "seconds": {"median": 0.002, "p20": 0.001, "p80": 0.003},
        "multiple_of_floor": 1.25,
        "bound": "products",
        "tera_operations_per_second": 512.0,
    }
    absent = {**row, "provider": "cuda", "status": "absent", "reason": "no GPU"}
    doc = documents.document("kernels", "Kernels", environment(CPU), {}, [row, absent])
    assert (
        "| exp_logits tiny | `triton` | 2 ms | 1.25 | 80% | 512 TFLOP/s | products |"
        in report.render({"cpu-kernels": doc})
    )


def test_the_workspace_sweep_and_its_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace.extra, "extra_bytes", lambda provider, inputs: 1 << 20)
    scenario = Scenario("tiny", 64, dtype="fp32", sequences=4)
    rows = workspace.measure(scenario, CPU, QUICK, fractions=(0.0, 0.5, 1.0))
    assert [r["provider"] for r in rows] == ["eager", "default", "0 of E", "0.5 of E", "1 of E"]
    assert rows[3]["workspace_bytes"] == 64 * 515 * 4 // 2
    promises = workspace.promises(rows)
    assert promises == by_dtype(rows)["fp32"]
    memory = [p for p in promises if "memory" in p["promise"]]
    assert [p["measured"] for p in memory] == [1.0, 1.0]
    assert len(promises) == 4
    assert not promises[0]["kept"]
    workspace.save_csv(rows, tmp_path / "w.csv")
    assert len((tmp_path / "w.csv").read_text().splitlines()) == 1 + len(rows)
    doc = documents.document("workspace", "Workspace", environment(CPU), {}, rows)
    shown.plot(doc, tmp_path / "w.png")
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    assert "**not kept**" in report.render({"cpu-workspace": doc})


def test_plots_of_the_loss(loss_doc, tmp_path):
    longer = json.loads(json.dumps(loss_doc).replace('"tokens": 64', '"tokens": 128'))
    doc = {**loss_doc, "results": loss_doc["results"] + longer["results"]}
    report.draw({"cpu-loss": doc}, tmp_path)
    for name in ("cpu-loss.png", "cpu-loss-tokens.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_section_shows_both_plots(loss_doc, tmp_path):
    (tmp_path / "cpu-loss.png").touch()
    assert "against tokens" not in report.render({"cpu-loss": loss_doc}, tmp_path)
    (tmp_path / "cpu-loss-tokens.png").touch()
    section = report.render({"cpu-loss": loss_doc}, tmp_path)
    assert "![The DPO loss step](../benchmarks/results/cpu-loss.png)" in section
    plot = "../benchmarks/results/cpu-loss-tokens.png"
    assert f"![The DPO loss step, against tokens]({plot})" in section


def test_suites_of_a_gpu_stop_in_time(monkeypatch, tmp_path):
    limits = []

    def deadline(seconds):
        limits.append(seconds)
        return Deadline(0.0)

    monkeypatch.setattr(loss, "Deadline", deadline)
    for arguments in (
        ["--suite", "full"],
        ["--suite", "quick"],
        ["--suite", "full", "--time-limit", "5"],
        ["--suite", "cpu"],
        ["--head", "tiny", "--tokens", "64"],
    ):
        assert not loss.run(loss.parser().parse_args(arguments))["results"]
    assert limits == [570.0, 110.0, 5.0, None, None]
