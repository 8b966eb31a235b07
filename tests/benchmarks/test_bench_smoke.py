"""benchmarks.smoke: it tells a right kernel from one that is wrong, fails or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")

from benchmarks.instruments.fake_gpu import DEVICE, FakeGPU
from benchmarks.smoke import clock, command, one, process, table, times
from fastdpo.backends.triton import autotune
from fastdpo.backends.triton.configs import CONFIGS

ROOT = Path(__file__).parents[2]
CASES = [
    f"case {name}"
    for name in ("right", "slightly wrong", "not a number", "fails", "dies", "absent")
]


def smoke(out, *arguments):
    """Its rows by name, its exit status and what it printed."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.smoke", str(out), *arguments, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    written = out / "smoke.json"
    rows = json.loads(written.read_text()) if written.exists() else []
    return {row.get("check", row.get("time")): row for row in rows}, done


@pytest.mark.slow
def test_what_is_wrong_fails_or_is_absent(tmp_path):
    arguments = (
        "300",
        "--no-times",
        "--jobs",
        "2",
        "--checks-from",
        "smoke_cases",
        "--check",
        *CASES,
    )
    rows, done = smoke(tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    assert {name.removeprefix("case "): row["verdict"] for name, row in rows.items()} == {
        "right": "ok",
        "slightly wrong": "WRONG",
        "not a number": "WRONG",
        "fails": "FAILED",
        "dies": "FAILED",
        "absent": "absent",
    }
    for name, row in rows.items():
        assert f"{row['verdict']:7} {name}" in done.stdout
        assert row["words"]
    wrong = rows["case slightly wrong"]
    assert 10 < wrong["error_over_allowed"] < 100
    assert wrong["words"].startswith("gradient"), "the worst of its errors first"
    assert rows["case not a number"]["error_over_allowed"] is None
    assert "no_such_name" in rows["case fails"]["words"]
    assert "Traceback" in rows["case fails"]["stderr"]
    assert "SIGSEGV" in rows["case dies"]["words"]
    assert "smoke_cases.py" in rows["case dies"]["stderr"], "where it was"
    assert rows["case absent"]["words"] == "nobody has it"


@pytest.mark.slow
def test_what_hangs_is_ended_and_says_where_it_was(tmp_path):
    begin = time.monotonic()
    arguments = ("300", "--no-times", "--limit", "12", "--checks-from", "smoke_cases")
    rows, done = smoke(tmp_path, *arguments, "--check", "case hangs")
    assert done.returncode == 1
    assert 12 <= time.monotonic() - begin < 60
    row = rows["case hangs"]
    assert row["verdict"] == "HUNG"
    assert "smoke_cases.py" in row["stderr"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_kernels_and_paths_are_right(tmp_path):
    """A few of them, by the command; `test_every_check` has all of them without it."""
    names = ("exp_logits bf16 with E", "step frozen head, row_index", "sequence_loss triton")
    rows, done = smoke(tmp_path, "300", "--no-times", "--check", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: row["verdict"] for name, row in rows.items()} == dict.fromkeys(names, "ok")


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, smoke itself runs")
@pytest.mark.parametrize("name", table.load())
def test_every_check(name):
    row = one.answer(name, torch.device("cpu"))
    if row["verdict"] != "ok":
        assert row["verdict"] == "absent", row
        assert "CUDA" in row["words"]


@pytest.mark.exhaustive
def test_a_run_with_its_times(tmp_path):
    names = ("machine", "pytorch", "logits cuda fp32", "model packed")
    rows, done = smoke(tmp_path, "900", "--limit", "120", "--jobs", "2", "--check", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert [verdicts.pop(name) for name in names] == ["ok", "ok", "absent", "ok"]
    assert set(verdicts.values()) == {"ok"}
    assert {"mm", "exp_logits with E", "exp_logits without E", "mm dW", "copy"} <= set(verdicts)


@pytest.mark.exhaustive
def test_where_time_is_short_nothing_is_begun(tmp_path):
    rows, done = smoke(tmp_path, "0", "--check", "pytorch")
    assert done.returncode == 0
    assert [row["verdict"] for row in rows.values()] == ["skipped", "skipped"]
    rows, done = smoke(tmp_path / "other", "1", "--check", "no such check")
    assert done.returncode == 2
    assert "pytorch" in done.stderr


def test_each_line_is_written_before_the_next(tmp_path, capsys):
    report = command.Report(tmp_path)
    row = {"check": "a", "verdict": "ok", "seconds": 1.0, "words": "S 1e-6 of 1e-4"}
    report.add(row)
    assert json.loads((tmp_path / "smoke.json").read_text()) == [row]
    seconds = {"median": 2e-3}
    slow = {"time": "mm", "verdict": "ok", "seconds": seconds, "mhz": 1755.0, "watts": 650.0}
    report.add({**slow, "tera_operations_per_second": 700.0})
    report.add({**slow, "time": "b", "floor": "mm", "multiple_of_floor": 1.12})
    report.add({"time": "c", "verdict": "HUNG", "words": "killed"})
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first.split() == ["ok", "a", "1.0", "s", "S", "1e-6", "of", "1e-4"]
    assert "2.000 ms    700.00 TFLOP/s  1755 MHz, 650 W" in second
    assert "1.120 × mm" in third
    assert fourth.startswith("HUNG")
    assert report.bad == ["c"]
    assert len(json.loads((tmp_path / "smoke.json").read_text())) == 4


def test_errors_beside_what_is_allowed():
    nan, inf = float("nan"), float("inf")
    assert table.Error("a", 1e-3, 1e-2).share == pytest.approx(0.1)
    assert table.Error("a", 0.0, 0.0).share == 0.0
    assert table.Error("a", 1.0, 0.0).share == table.Error("a", nan, 1.0).share == inf
    found = table.Found()
    found.hold("small", 1e-6, 1e-4)
    found.hold_bits("same", torch.tensor([1.0, nan]), torch.tensor([1.0, nan]))
    assert found.worst == pytest.approx(0.01)
    found.hold_bits("other", torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]))
    assert found.worst == inf
    assert str(found).startswith("other")


class Properties:
    multi_processor_count, L2_cache_size = 132, 50 << 20


@pytest.fixture
def gpu(monkeypatch):
    """The path that CUDA tensors take, with the Triton kernels interpreted."""
    if torch.cuda.is_available():
        pytest.skip("of machines without a GPU: where there is one, smoke itself runs")
    for name in ("synchronize", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    with FakeGPU() as fake:
        yield fake


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch", {"mm fp32 bfloat16", "mm fp32 out= float16", "addmm", "addmm fp32"}),
        ("step trained head, nothing kept", {"hidden max", "weight rms", "loss max"}),
        ("step waits for nothing", {"hidden: other bits"}),
    ],
)
def test_the_path_of_a_gpu(gpu, name, said):
    found = table.load()[name].run(table.Place(DEVICE, 20, 300, 48))
    assert said <= {error.name for error in found.errors}
    assert found.worst <= 1.0, str(found)


@pytest.mark.exhaustive
def test_what_is_timed_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setitem(times._SIZES, "cuda", (32, 515, 48))
    monkeypatch.setattr(times, "tiles", lambda shipped, arch: {"": shipped})
    compiled, launched = [], []
    monkeypatch.setattr(autotune, "compile_ahead", compiled.extend)
    monkeypatch.setattr(times, "launch", lambda launches, device: launched.extend(launches))
    batch, names = times.Batch.make(DEVICE), []
    for part in (times.products, times.exponentials, times.gradients, times.steps):
        for timed in part(batch):
            assert timed.operations > 0
            assert timed.floor in (None, *names)
            names.append(timed.name)
            for i in range(2):
                timed.step(i)
    assert len(set(names)) == len(names) == 11
    with_and_without = [one.arguments["out"] is not None for one in compiled]
    assert with_and_without == [True, False]
    hidden = [one.arguments["hidden"].base for one in launched]
    assert hidden[0] is not hidden[1], "the batches in turn"
    assert len(launched) == 4
    assert {"mm dx, fp32, two blocks", "addmm dW, lifted"} <= set(names)


def test_no_check_is_entered_twice():
    (name,) = list(table.load())[:1]
    with pytest.raises(ValueError, match=name):
        table.check(name)(lambda place: table.Found())


@pytest.mark.parametrize(
    ("kind", "verdict", "words"),
    [("silent", "HUNG", "without a word"), ("raises", "FAILED", "no more"), ("ends", "ok", "")],
)
def test_the_times_of_a_process_that_ends_badly_are_kept(monkeypatch, kind, verdict, words):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    monkeypatch.setenv("PYTHONPATH", path)
    rows, begin = [], time.monotonic()
    run = process.Command("smoke_times", (kind,), interpreted=True, threads=1)
    silence = 4.0 if kind == "silent" else 60.0
    found = process.streamed(run, silence, begin + 100.0, rows.append)
    assert rows == [{"time": "first", "verdict": "ok"}]
    assert found["verdict"] == verdict
    assert words in found["words"]
    assert ("Traceback" in found.get("stderr", "")) == (kind == "raises")


def test_an_error_in_one_line():
    cuda = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with X")
    assert (
        process.said(cuda) == "RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    compiler = ValueError("at 3:4:\n    x = y\n        ^\nno y\n")
    assert process.said(compiler) == "ValueError: at 3:4: … no y"
    assert process.said(KeyError()) == "KeyError: "


def test_the_clock_is_read_while_something_runs():
    read = clock.Clock(on_gpu=False)
    for now, line in ((1.0, "1755, 650.5"), (2.0, "1500, 700"), (3.0, "1980, 90"), (2.5, "[N/A]")):
        read.take(line, now)
    assert read.between(0.5, 2.5) == {"mhz": 1627.5, "watts": 700.0}
    assert read.between(5.0, 6.0) == {}


@pytest.mark.parametrize("arch", [a for a in CONFIGS if a != "interpreter"])
def test_the_tiles_that_are_timed_have_room(arch):
    shipped = CONFIGS[arch]["half"]
    tiles = times.tiles(shipped, arch)
    assert tiles[""] == shipped
    assert len(set(tiles.values())) == len(tiles) > 2
    assert all(autotune.has_room(tile, arch, 2) for tile in tiles.values())
    assert ("two residents" in tiles) == shipped.descriptors
    if arch == "sm_90":
        assert {"two chunks", "three stages", "not flattened"} <= set(tiles)
