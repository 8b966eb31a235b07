"""The Triton kernels compiled ahead of time for GPUs that are not here, and what the binaries show.

Each architecture is compiled by a process of its own, since the tests' own process interprets.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache

import pytest
from sampling import sampled

pytest.importorskip("triton")

from benchmarks.instruments.ahead_of_time import (
    ARCHITECTURES,
    TENSOR_CORE,
    TRL_STATS,
    TRL_STATS_CAPPED,
    Resources,
    Variant,
    exp_logits_launches,
    variants,
)
from fastdpo.backends.triton.autotune import least_shared
from fastdpo.backends.triton.configs import (
    CONFIGS,
    SHARED_MEMORY,
    pick,
    pick_plain,
    supported_arch,
)
from fastdpo.backends.triton.exp_logits import STATS

static = pytest.importorskip("benchmarks.kernels.compiled")

ESSENTIAL = ("sm_80", "sm_90", "sm_100", "gfx942")  # sm_89 has sm_86's tile
BULK = ("sm_90", "sm_100")  # architectures with a tensor memory accelerator and a tile for it
MAIN = ("exp_logits_tma", "exp_logits_pointers")


def _compile(arch: str, *options: str) -> list[Resources]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.instruments.ahead_of_time", "--arch", arch, *options],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Resources(**json.loads(line)) for line in done.stdout.splitlines()]


@cache
def _essential(arch: str) -> list[Resources]:
    return _compile(arch)


@pytest.fixture(params=sampled(ESSENTIAL, ("sm_90",)))
def kernels(request) -> list[Resources]:
    return _essential(request.param)


def one(kernels: list[Resources], kernel: str, variant: str) -> Resources:
    found = [k for k in kernels if k.kernel == kernel and k.variant == variant]
    assert len(found) == 1, f"{kernel} {variant}: {len(found)} of {sorted(map(str, kernels))}"
    return found[0]


def sound(kernels: list[Resources], spills: int = 0) -> None:
    """What holds of every kernel that ships; `spills` where some are known."""
    for k in kernels:
        assert k.spills <= spills, k
        assert k.shared <= SHARED_MEMORY[k.arch], k
        assert k.instructions > 20, k
        if k.kernel.startswith("exp_logits") and not k.variant.startswith("ieee"):
            assert k.tensor_cores > 0, k
        if k.kernel == "exp_logits_tma":
            assert "versionMajor = 2" not in k.layout, k  # not Ampere's tensor-core instructions
            assert k.bulk_loads > 0, k
            assert (k.bulk_stores > 0) == ("out" in k.variant), k


def test_nothing_spills_and_everything_fits(kernels):
    sound(kernels)
    names = {k.kernel for k in kernels}
    arch = kernels[0].arch
    assert names >= {
        "exp_logits_pointers", "exp_logits_reanchored", "reduce_sums", "target_logits_kernel",
        "logits_logps_kernel", "logits_logps_backward_kernel", "sequence_loss_kernel",
    }  # fmt: skip
    assert ("exp_logits_tma" in names) == (arch in BULK)


def test_the_shipped_tile_is_what_was_compiled(kernels):
    arch = kernels[0].arch
    for softcap, variant in ((False, "half+out"), (True, "half+out+softcap")):
        tile = pick(arch, "half", softcap)
        main = one(kernels, MAIN[0 if tile.descriptors else 1], variant)
        assert main.tile == f"{tile.rows}×{tile.columns}×{tile.depth}"
        assert (main.warps, main.stages, main.group) == (tile.warps, tile.stages, tile.group)
        # What autotuning drops a tile for, a compiler would drop it for as well.
        assert least_shared(tile, 2) <= main.shared


def test_every_line_of_the_table_is_compiled(kernels):
    every_line_compiled(kernels)


def every_line_compiled(kernels: list[Resources]) -> None:
    arch = kernels[0].arch
    found = {(k.tile, k.warps) for k in kernels if k.kernel.startswith("exp_logits")}
    # The kinds whose plain tile is no line of the table of its own have one all the same.
    tiles = [
        *CONFIGS[arch].values(),
        *(pick_plain(arch, kind) for kind in ("half", "tf32", "ieee")),
    ]
    for tile in {*tiles, *(tile.few_rows() for tile in tiles)}:
        assert (f"{tile.rows}×{tile.columns}×{tile.depth}", tile.warps) in found, tile


def test_each_exponential_is_taken_once(kernels):
    """No tile is computed twice over, in two layouts or two versions of a loop."""
    for k in kernels:
        if k.kernel in MAIN:
            rows, columns, _ = map(int, k.tile.split("×"))
            lanes = k.warps * (64 if k.arch == "gfx942" else 32)
            per_entry = 2 if "softcap" in k.variant else 1
            assert k.exponentials == per_entry * rows * columns // lanes, k


def test_sums_are_added_alike_whether_or_not_the_exponentials_are_stored(kernels):
    """The reference's forward stores nothing, and has to agree with the policy's to the bit."""
    kernel = MAIN[0 if kernels[0].arch in BULK else 1]
    stored, bare = one(kernels, kernel, "half+out"), one(kernels, kernel, "half")
    assert (stored.tile, stored.warps, stored.layout) == (bare.tile, bare.warps, bare.layout)
    assert stored.layout


def test_few_rows_are_added_in_the_same_order(kernels):
    few_rows_added_alike(kernels)
    assert not any(tile.halves for tile in CONFIGS["sm_100"].values()), "another instruction"


def few_rows_added_alike(kernels: list[Resources]) -> None:
    arch = kernels[0].arch
    for kind in ("half", "tf32"):
        tile = CONFIGS[arch].get(kind)
        if tile is not None and tile.halves:
            kernel = MAIN[0 if tile.descriptors else 1]
            added_alike(*(one(kernels, kernel, f"{kind}{few}+out") for few in ("", "+few")))


def added_alike(many: Resources, few: Resources) -> None:
    """Half the tile: registers, lanes and warps share a row's columns in the same way."""
    rows, columns, depth = map(int, many.tile.split("×"))
    assert few.tile == f"{rows // 2}×{columns}×{depth}"
    assert (few.warps, few.stages) == (many.warps // 2, many.stages)
    assert along_columns(many.layout) == along_columns(few.layout) != []


def along_columns(layout: str) -> list[object]:
    """Of each layout of [rows, columns] what concerns the columns."""
    found: list[object] = []
    for part in layout.split("; "):
        bases = re.search(r"register = (.*), lane = (.*), warp = (.*), block = ", part)
        if bases:  # those that only move along the rows are left out
            moves = (re.findall(r"\[\d+, (\d+)\]", group) for group in bases.groups())
            found.append([[step for step in steps if step != "0"] for steps in moves])
        else:
            assert "warpsPerCTA" in part
            found.append(re.sub(r"warpsPerCTA = \[\d+, ", "warpsPerCTA = [", part))
    return found


def test_layouts_are_compared_along_columns():
    def linear(lane: str, warp: str) -> str:
        bases = f"register = [[0, 1], [8, 0]], lane = {lane}, warp = {warp}, block = []"
        return f"#ttg.linear<{{{bases}}}>"

    lane, warp = "[[0, 2], [1, 0]]", "[[0, 4], [16, 0]]"
    layout = along_columns(linear(lane, warp))
    assert layout == [[["1"], ["2"], ["4"]]]
    assert layout == along_columns(linear("[[0, 2], [4, 0]]", "[[0, 4]]"))
    assert layout != along_columns(linear(lane, "[[16, 0], [0, 8]]"))
    assert layout != along_columns(linear("[[0, 4], [1, 0]]", "[[0, 2], [16, 0]]"))
    amd = "#ttg.amd_mfma<{warpsPerCTA = [2, 4], instrShape = [32, 32, 8]}>"
    assert along_columns(amd) == along_columns(amd.replace("[2, ", "[1, "))
    assert along_columns(amd) != along_columns(amd.replace("[2, 4]", "[4, 2]"))


def test_the_documented_table_is_what_was_compiled():
    page = static.PAGE.read_text()
    version = re.search(r"What ptxas made of them under Triton (\d+\.\d+)", page)[1]
    if not pytest.importorskip("triton").__version__.startswith(f"{version}."):
        pytest.skip(f"the table is of Triton {version}")
    table = static.markdown([asdict(k) for k in _essential("sm_90")])
    assert static.in_page(page, table) == page, "python -m benchmarks.kernels --static --write"


def test_the_model_knows_every_kernel_and_the_length_of_the_epilogue():
    for k in _essential("sm_90"):
        work = static.predicted(asdict(k))
        assert work.seconds > 0
        if k.kernel == MAIN[0] and k.variant.startswith("half") and "few" not in k.variant:
            rows, columns, _ = map(int, k.tile.split("×"))
            counted = k.instructions * k.warps / (rows * columns)
            modelled = static.traffic.EPILOGUE["out" in k.variant, "softcap" in k.variant]
            assert modelled == pytest.approx(counted, rel=0.1), k


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a not in ESSENTIAL])
def test_the_other_architectures(arch):
    kernels = _compile(arch)
    sound(kernels)
    every_line_compiled(kernels)
    few_rows_added_alike(kernels)


TRAINING = [
    "+".join(("half+out", *TRL_STATS)),
    "+".join(("half+out+softcap", *TRL_STATS_CAPPED)),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_120"])
def test_a_training_steps_statistics_and_a_ragged_vocabulary_elsewhere(arch):
    few = "+".join(("half+few+out", *TRL_STATS))
    sound(_compile(arch, "--only", *TRAINING, few, "half+out+bias+ragged"))


@pytest.mark.exhaustive
def test_a_training_steps_statistics_spill_on_sm_100():
    """The one place where registers do not suffice (`configs`): a bound, so that it is known."""
    kernels = _compile("sm_100", "--only", *TRAINING)
    sound(kernels, spills=120)
    sound([k for k in kernels if k.kernel != MAIN[0]])


@pytest.mark.exhaustive
def test_statistics_ragged_vocabularies_and_fp32():
    every = "+".join(STATS)
    names = [f"half+out+{s}" for s in (*STATS, every)] + [f"half+{every}", "half+out+bias+ragged"]
    names += ["tf32+softcap", "tf32+out+softcap", "ieee+softcap", "ieee+out+softcap"]
    capped = ["half+out+softcap", "half+few+out+softcap"]
    tf32 = ["tf32+out", "tf32+few+out"]
    names += [*capped, *tf32, "half+softcap+entropy", "half+out+softcap+entropy", *TRAINING]
    found = _compile("sm_90", "--only", *names)
    sound(found)
    assert [k.variant for k in found if k.kernel == MAIN[0]] == [
        str(v) for v in variants("sm_90", True) if str(v) in names and v.kind != "ieee"
    ]
    for pair in (capped, tf32):
        added_alike(*(one(found, MAIN[0], name) for name in pair))


def test_where_a_fence_is_missing_nothing_is_copied_asynchronously(monkeypatch):
    def stages(arch: str, variant: Variant) -> dict[str, int]:
        return {n.kernel.fn.__name__: n.stages for n in exp_logits_launches(arch, variant)}

    module = importlib.import_module("fastdpo.backends.triton.exp_logits")
    monkeypatch.setattr(module, "_FENCES_COPIES", False)
    hopper = stages("sm_90", Variant(out=True))
    assert (hopper["exp_logits_tma"], hopper["exp_logits_reanchored"]) == (4, 1)
    hopper = stages("sm_90", Variant("tf32", unaligned=True))
    assert hopper["exp_logits_pointers"] == hopper["exp_logits_reanchored"] == 1
    assert stages("sm_90", Variant("ieee"))["exp_logits_pointers"] == 3  # no matrix instruction
    assert stages("sm_80", Variant("tf32"))["exp_logits_pointers"] == 2  # one that needs no fence
    monkeypatch.setattr(module, "_FENCES_COPIES", True)
    assert stages("sm_90", Variant(out=True))["exp_logits_reanchored"] == 2


def test_every_architecture_is_described():
    assert set(ARCHITECTURES) == set(SHARED_MEMORY) == set(TENSOR_CORE)
    assert [supported_arch(a) for a in ("sm_90", "sm_87", "sm_103", "sm_121", "gfx950")] == [
        "sm_90", "sm_86", "sm_100", "sm_120", "gfx942",
    ]  # fmt: skip
    assert supported_arch("sm_75") is None
    assert supported_arch("gfx1100") is None
    with pytest.raises(ValueError, match="gfx1100"):
        pick("gfx1100", "half", False)


def test_nothing_is_compiled_by_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.instruments.ahead_of_time"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
