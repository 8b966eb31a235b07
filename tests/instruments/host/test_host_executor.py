"""The stand-in runtime itself: it must notice what it is there to notice."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.instruments.host import backend, build

RACE, SYNCHRONISED, UNINITIALISED, ORDERED, DIVERGENT, DIVERGENT_SHUFFLE, SHUFFLE, BEYOND = range(8)
LAUNCH_FAILURE = 719


def run(host, which, seed=0):
    values = (ctypes.c_uint * 192)()
    with host.schedule(seed):
        error = host.steer.host_cuda_run_faulty(which, values)
    return error, list(values)


def test_a_race_shows_as_other_bits(host):
    results = {tuple(run(host, RACE, seed)[1]) for seed in range(4)}
    assert len(results) == 4
    results = {tuple(run(host, SYNCHRONISED, seed)[1]) for seed in range(4)}
    assert results == {tuple([*range(2, 65), 1] * 3)}


def test_the_order_of_blocks_shows(host):
    assert len({run(host, ORDERED, seed)[1][0] for seed in range(8)}) > 1


def test_shared_memory_is_poisoned_before_each_block(host):
    error, values = run(host, UNINITIALISED)
    assert error == 0
    assert values == [0] * 64 + [0xFFFFFFFF] * 128


def test_divergent_barriers_and_shuffles_fail_the_launch(host, capfd):
    assert run(host, DIVERGENT)[0] == LAUNCH_FAILURE
    assert "32 at a block's barrier, 0 at a warp's, 32 have left" in capfd.readouterr().err
    assert run(host, DIVERGENT_SHUFFLE)[0] == LAUNCH_FAILURE
    # And the executor is as good as new.
    assert run(host, SYNCHRONISED)[0] == 0


def test_shuffles(host):
    warp = [*range(2, 32), 31, 31]
    expected = (warp + [lane + 32 for lane in warp]) * 3
    for seed in range(4):
        assert run(host, SHUFFLE, seed) == (0, expected)


@pytest.mark.skipif(
    os.environ.get(backend.SANITIZE_VARIABLE) != "1", reason="only the sanitizers can see it"
)
def test_the_sanitizer_sees_past_the_end_of_shared_memory():
    code = (
        "from benchmarks.instruments.host import backend, build; import ctypes;"
        "host = backend.Host(build.build(sanitize=True));"
        f"host.steer.host_cuda_run_faulty({BEYOND}, (ctypes.c_uint * 192)())"
    )
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **build.sanitizer_environment(), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "beyond_shared_kernel" in done.stderr


def test_16_bit_conversions_are_pytorchs(host):
    steer = host.steer
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    halves = patterns.view(torch.float16).float().tolist()
    for bits, value in enumerate(halves):
        mine = steer.host_cuda_half_to_float(bits)
        assert mine == value or (mine != mine and value != value)
    # Between two halves, at the midpoints, and around them.
    finite = patterns.view(torch.float16)
    finite = finite[finite.isfinite()].float()
    values = torch.cat([finite[::17], torch.nextafter(finite[::17], torch.tensor(torch.inf))])
    middle = (finite[:-1:13] + finite[1::13]) / 2
    values = torch.cat([values, middle, torch.tensor([65519.0, 65520.0, 1e6, 1e-9, -1e-9, -0.0])])
    values = torch.cat([values, torch.randn(2000) * 1e-5, torch.randn(2000) * 100])
    for to, convert in (
        (torch.float16, steer.host_cuda_float_to_half),
        (torch.bfloat16, steer.host_cuda_float_to_bfloat16),
    ):
        expected = (values.to(to).view(torch.int16).int() & 0xFFFF).tolist()
        assert [convert(value) for value in values.tolist()] == expected
    assert (
        torch.tensor([steer.host_cuda_float_to_half(float("nan"))])
        .to(torch.int16)
        .view(torch.float16)
        .isnan()
    )
