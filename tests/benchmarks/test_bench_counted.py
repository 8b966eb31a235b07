"""Memory that is counted on tensors without data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.environment import environment
from benchmarks.memory import command as counted
from benchmarks.memory import shown
from benchmarks.providers import by_name
from benchmarks.report import documents
from benchmarks.scenarios import Scenario

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

ROOT = Path(__file__).parents[2]


def test_eager_is_what_its_tensors_are():
    """fp32 logits and their log-softmax at once, in a forward; the bf16 ones and a gradient of
    the fp32 ones beside both products, in a step.
    """
    (eager,) = by_name(["eager"])
    forward = Scenario("llama-3-8b", 8192, trains="forward")
    fp32 = 8192 * 128_256 * 4
    assert counted.extra_bytes(eager, forward) == pytest.approx(2 * fp32, rel=0.01)
    step = Scenario("llama-3-8b", 8192)
    assert 2 * fp32 < counted.extra_bytes(eager, step) < 3.5 * fp32


def test_masked_rows_are_left_out():
    (ours,) = by_name(["fastdpo"])
    whole = counted.extra_bytes(ours, Scenario("llama-3-8b", 8192))
    quarter = counted.extra_bytes(ours, Scenario("llama-3-8b", 8192, share=0.25))
    assert quarter < whole / 3


def test_a_peer_that_cannot_be_counted_says_why(monkeypatch):
    eager, compiled, liger = by_name(["eager", "compiled", "liger-1"])
    assert counted.row(compiled, counted.SCENARIOS[0])["status"] == "absent"
    gemma = Scenario("gemma-2-2b", 64)
    assert counted.row(liger, gemma)["status"] == "refused"

    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(eager), "token_logps", broken)
    failed = counted.row(eager, gemma)
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no such kernel")


def test_the_document_its_section_and_its_plot(tmp_path):
    scenarios = [Scenario("mistral-7b", tokens) for tokens in (4096, 8192)]
    rows = [counted.row(p, s) for s in scenarios for p in by_name(["fastdpo", "eager", "cce"])]
    doc = documents.document("counted", "Memory", environment(torch.device("cpu")), {}, rows)
    text = shown.markdown(doc)
    assert "| scenario | `fastdpo` | `eager` |" in text  # not cce, which is absent everywhere
    assert "nothing was measured" in text
    assert "needs more: nowhere here" in text
    for r in rows:
        if r["provider"] == "eager":
            r["extra_bytes"] = 1
    assert "needs more: than `eager` on mistral-7b 4k 100% head bf16" in shown.markdown(doc)
    shown.plot(doc, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_command(tmp_path):
    command = ["--head", "tiny", "--tokens", "64", "--providers", "fastdpo", "eager"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *command, "--out", tmp_path / "counted"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was measured" in " ".join(done.stdout.split())
    doc = json.loads((tmp_path / "counted.json").read_text())
    assert [r["provider"] for r in doc["results"]] == ["fastdpo", "eager"]
    assert all(r["extra_bytes"] > 0 for r in doc["results"])


def test_a_wrong_scenario_is_refused(capsys, monkeypatch):
    for wrong in (["--head", "tiny", "--tokens", "7"], ["--providers", "nobody"]):
        monkeypatch.setattr(sys, "argv", ["counted", *wrong])
        with pytest.raises(SystemExit):
            counted.main()
        assert "should be" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs PyTorch 2.13 or later")
def test_linear_cross_entropy_is_what_its_strategies_keep():
    scenario = Scenario("llama-3-8b", 8192, share=0.5)
    names = ("torch-lce", "torch-lce-chunked", "torch-lce-balanced", "torch-lce-accurate")
    rows, head = scenario.loss_tokens, 128_256 * 4096
    found = {
        p.name: counted.extra_bytes(p, scenario)
        for p in by_name([*names, "torch-lce-sum", "torch-lce-twice"])
    }
    logits = rows * 128_256 * 2
    assert 1.9 * logits < found["torch-lce"] < 2.5 * logits
    assert found["torch-lce-chunked"] < logits / 8
    # A chunk's gradient of the head in fp32; and the head itself in fp32.
    assert 4 * head < found["torch-lce-balanced"] < 4 * head + logits / 8
    assert 8 * head < found["torch-lce-accurate"] < 8 * head + logits / 8
    # The heads' gradients, of all sequences until the backward; of one, beside as many zeros, which
    # autograd makes for the gradients of these gradients and PyTorch does not read.
    assert 7.5 * 2 * head < found["torch-lce-sum"] < 8.5 * 2 * head
    assert 2 * 2 * head < found["torch-lce-twice"] < 2.1 * 2 * head


def test_a_peer_that_cannot_be_imported_here_is_absent():
    for provider in by_name(["flash-attn", "liger-sm90"]):
        assert counted.row(provider, counted.SCENARIOS[0])["status"] == "absent"
