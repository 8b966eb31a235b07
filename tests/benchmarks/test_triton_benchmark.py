"""benchmarks.kernels: what it times, what it says it is bound by, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

kernels = pytest.importorskip("benchmarks.kernels.command")
model = pytest.importorskip("benchmarks.kernels.traffic")
steps = pytest.importorskip("benchmarks.kernels.primitives")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_the_model_of_an_h200():
    product = model.exp_logits(8192, 128256, 4096, 2, "half")
    assert product.bound == "products"
    assert product.operations / model.RATES["half"] == pytest.approx(10.9e-3, rel=0.01)
    assert product.seconds == pytest.approx(11.4e-3, rel=0.01), "the epilogue is not hidden"
    capped = model.exp_logits(8192, 256000, 2304, 2, "half", kept=256000, softcap=True)
    assert capped.seconds == pytest.approx((12.2 + 2.3) * 1e-3, rel=0.01)
    # Four groups of sixteen 128-row tiles read the weight once each; 501 tiles of partial sums.
    weight, hidden, partial = 4 * 2 * 128256 * 4096, 2 * 8192 * 4096, 8 * 8192 * 501
    assert product.bytes == weight + hidden + partial
    kept = model.exp_logits(8192, 128256, 4096, 2, "half", kept=128256, quantities=3)
    assert kept.bytes == product.bytes + 2 * partial + 2 * 8192 * 128256
    assert model.logits_logps(8192, 128256, 2).seconds == pytest.approx(489e-6, rel=0.01)
    assert model.logits_logps_backward(8192, 128256, 2).bytes == 4 * 8192 * 128256
    assert model.logits_logps(8192, 128256, 2).bound == "bytes"
    assert model.sequence_loss(8192, 16).bound == "bytes"
    assert model.reduce_sums(8192, 501, 3).bytes == 12 * 8192 * 502 + 9 * 8192
    assert model.nothing_reanchored(8192, 132).bytes == 132 * 8192


def test_every_backend_that_serves_a_primitive_is_in_the_comparison():
    found = {c.name: c for c in steps.comparisons(steps.Shape("tiny", 9), DEVICE)}
    assert set(found) == {
        "exp_logits", "exp_logits with E", "target_logits", "logits_logps",
        "logits_logps_backward", "logits_sequence_loss", "sequence_loss",
    }  # fmt: skip
    for comparison in found.values():
        assert {"torch", "triton"} <= set(comparison.steps)
        peers = {"eager", "compiled"} if comparison.name.startswith("logits_") else set()
        entered = {name.removesuffix(", fused") for name in (*comparison.steps, *comparison.absent)}
        assert entered == {"torch", "triton", "cuda"} | peers
        assert all(comparison.absent.values())
        for step in (comparison.floor, *comparison.steps.values()):
            step(0)
            step(1)
    assert "cuda" in found["exp_logits"].absent


def test_it_writes_what_it_measured(tmp_path):
    out = tmp_path / "kernels.json"
    command = ["-m", "benchmarks.kernels", "--suite", "tiny", "--time-limit", "3", "--device"]
    done = subprocess.run(
        [sys.executable, *command, DEVICE.type, "--out", str(out)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    timed = [r for r in rows if r["status"] == "ok"]
    assert {r["primitive"] for r in timed} >= {"exp_logits"}
    assert {r["provider"] for r in timed} >= {"torch"}
    absent = [r for r in rows if r["status"] == "absent"]
    assert all(r["reason"] for r in absent)
    for r in timed:
        assert r["seconds"]["p20"] <= r["seconds"]["median"] <= r["seconds"]["p80"]
        ratio = r["seconds"]["median"] / r["floor_seconds"]["median"]
        assert r["multiple_of_floor"] == pytest.approx(ratio)
        assert r["predicted_seconds_h200"] > 0
