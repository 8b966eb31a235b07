"""FASTDPO_AUTOTUNE: never unasked, once, the fastest tile, the same one for few rows.

No GPU is needed: the tiles are planned for an H100 on the CPU, and a model stands for the clock.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from fastdpo.backends.contract import Head

autotune = pytest.importorskip("fastdpo.backends.triton.autotune")
configs = pytest.importorskip("fastdpo.backends.triton.configs")

CONFIGS, pick = configs.CONFIGS, configs.pick
HOPPER = autotune.Target("sm_90", 132)


def inputs(n, dtype=torch.bfloat16, softcap=None):
    return torch.zeros(n, 16, dtype=dtype), Head(torch.zeros(48, 16, dtype=dtype), softcap=softcap)


@pytest.fixture
def clock(monkeypatch):
    """Counts what is timed; the fastest is not the shipped tile, and some do not run."""
    timed = []

    def milliseconds(launch):
        a = launch.arguments
        timed.append((a["BLOCK_M"], a["BLOCK_V"], a["BLOCK_D"], launch.warps, launch.stages))
        if launch.stages == 5:
            raise autotune.triton.OutOfResources(1 << 20, 1 << 18, "shared memory")
        return 1.0 if timed[-1] == (128, 256, 128, 8, 2) else 2.0

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    monkeypatch.setattr(autotune, "compile_ahead", lambda launches: None)
    monkeypatch.setattr(autotune, "_tuned", {})
    return timed


def test_never_unasked(clock, monkeypatch):
    monkeypatch.delenv("FASTDPO_AUTOTUNE", raising=False)
    assert autotune.tile_of(*inputs(500), HOPPER) == pick("sm_90", "half", False)
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "0")
    assert autotune.tile_of(*inputs(8), HOPPER) == pick("sm_90", "half", False).few_rows()
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "1")
    assert (
        autotune.tile_of(*inputs(8), autotune.Target("interpreter", 3))
        == CONFIGS["interpreter"]["half"]
    )
    assert clock == []


def test_not_for_rows_that_take_the_plain_tile(clock, monkeypatch):
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "1")
    odd = Head(torch.zeros(48, 18, dtype=torch.bfloat16))
    autotune.tile_of(torch.zeros(500, 18, dtype=torch.bfloat16), odd, HOPPER)
    assert clock == []
    autotune.tile_of(*inputs(500), HOPPER)
    assert clock


@pytest.mark.parametrize("first", [8, 500])
def test_the_fastest_serves_every_number_of_rows(clock, monkeypatch, capfd, first):
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "1")
    autotune.tile_of(*inputs(first), HOPPER)
    tuned = len(clock)
    many, few = autotune.tile_of(*inputs(500), HOPPER), autotune.tile_of(*inputs(8), HOPPER)
    assert len(clock) == tuned > 10, "tuned once"
    assert (many.depth, many.stages) == (128, 2)
    assert few == many.few_rows()
    said = capfd.readouterr().err
    assert "OutOfResources" in said
    # Each tile as it is measured, and at the end the fastest once more.
    assert said.count(" ms, Tile(") + said.count("OutOfResources") == tuned
    line = said.strip().splitlines()[-1]
    # What is printed is a line of the table.
    assert eval(f"{{{line}}}", {"Tile": type(many)}) == {"half": many}


def test_each_kind_of_head_is_tuned_for_itself(clock, monkeypatch):
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "1")
    for options in ({}, {"softcap": 30.0}, {"dtype": torch.float32}):
        before = len(clock)
        autotune.tile_of(*inputs(500, **options), HOPPER)
        assert len(clock) > before


def test_it_says_when_nothing_runs(monkeypatch):
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_tuned", {})

    def refuse(launch):
        raise autotune.triton.OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(autotune, "_milliseconds", refuse)
    monkeypatch.setattr(autotune, "compile_ahead", lambda launches: None)
    with pytest.raises(RuntimeError, match="sm_90"):
        autotune.tile_of(*inputs(70), HOPPER)


@pytest.mark.parametrize("arch", [a for a in CONFIGS if a != "interpreter"])
def test_candidates_are_the_shipped_tile_and_its_neighbours(arch):
    for kind, shipped in CONFIGS[arch].items():
        itemsize = 2 if kind in ("half", "plain", "softcap") else 4
        assert autotune.has_room(shipped, arch, itemsize)
        found = autotune.candidates(shipped, arch, itemsize)
        assert found[0] == shipped
        assert len(set(found)) == len(found) > 10
        for tile in found:
            assert tile.descriptors == shipped.descriptors
            assert tile.flatten == shipped.flatten or tile.descriptors
            assert tile.columns % tile.chunks == 0
            # The half of 4 warps is no warpgroup: another instruction, other bits.
            assert not (tile.halves and tile.warps == 4)
            assert tile.residents == 1 or tile.descriptors
            assert autotune.has_room(tile, arch, itemsize)
        assert any(t.halves for t in found) == shipped.halves
        assert any(t.residents == 2 for t in found) == shipped.descriptors
        assert any(t.flatten != shipped.flatten for t in found) == shipped.descriptors


def test_what_has_no_room_is_not_compiled():
    hopper = pick("sm_90", "half", False)
    change = dataclasses.replace
    for tile in (
        change(hopper, stages=5),  # shared memory
        change(hopper, depth=128),
        change(hopper, chunks=1),  # the staging buffer
        change(hopper, residents=2),
        change(hopper, warps=4),  # registers
        change(hopper, rows=256, depth=32),
    ):
        assert not autotune.has_room(tile, "sm_90", 2), tile
        assert tile not in autotune.candidates(hopper, "sm_90", 2)
    assert autotune.has_room(change(hopper, depth=128, stages=2), "sm_90", 2)
    # A wavefront has 64 threads: as many numbers are half as many each.
    wide = change(pick("gfx942", "half", False), rows=256)
    assert autotune.has_room(wide, "gfx942", 2)
    assert not autotune.has_room(change(wide, stages=3), "gfx942", 2)


def test_two_programs_a_processor():
    x, head = inputs(4096)
    tile = dataclasses.replace(pick("sm_90", "half", False), rows=16, columns=16)
    labels, anchor = torch.zeros(4096, dtype=torch.int64), torch.zeros(4096)
    for residents, programs in ((1, 132), (2, 264)):
        resident = dataclasses.replace(tile, residents=residents)
        asked = autotune.Asked(x, head, labels, anchor, fixed_anchor=True)
        prepared = autotune.prepare(asked, HOPPER, resident)
        assert prepared.launches[0].grid == (programs,)


def test_the_printed_line_names_the_kind_of_head(clock, monkeypatch, capfd):
    monkeypatch.setenv("FASTDPO_AUTOTUNE", "1")
    autotune.tile_of(*inputs(500, softcap=30.0), HOPPER)
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("        'softcap': Tile(")


_COMPILED = """
import triton
from fastdpo.backends.triton import autotune
from benchmarks.instruments.ahead_of_time import Variant, _compiling_for, exp_logits_launches

right = exp_logits_launches("sm_90", Variant("tf32"))[0]
wrong = right._replace(arguments={**right.arguments, "PRECISION": "no such"})
with _compiling_for("sm_90"):
    autotune.compile_ahead([wrong, right])
    triton.runtime.jit.JITFunction._do_compile = None  # nothing is compiled from here on
    again = right.kernel.warmup(grid=right.grid, **right.arguments, **right.options)
    assert again.asm["cubin"]
    try:
        wrong.kernel.warmup(grid=wrong.grid, **wrong.arguments, **wrong.options)
    except TypeError:  # from the None that it had to call
        print("refused")
"""


def test_candidates_are_compiled_before_they_are_timed_and_failures_left_for_later():
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "refused\n", done.stderr[-3000:]
