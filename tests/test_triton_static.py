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
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

pytest.importorskip("triton")

from fastdpo.backends.triton.ahead import (
    ARCHITECTURES,
    SHARED_LIMIT,
    TENSOR_CORE,
    TRL_STATS,
    TRL_STATS_CAPPED,
    Resources,
    Variant,
    exp_logits_launches,
    variants,
)
from fastdpo.backends.triton.configs import CONFIGS, pick, supported_arch
from fastdpo.backends.triton.exp_logits import STATS

ESSENTIAL = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
BULK = ("sm_90", "sm_100")  # architectures with a tensor memory accelerator and a tile for it
MAIN = ("exp_logits_tma", "exp_logits_pointers")


def _compile(arch: str, *options: str) -> list[Resources]:
    done = subprocess.run(
        [sys.executable, "-m", "fastdpo.backends.triton.ahead", "--arch", arch, *options],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Resources(**json.loads(line)) for line in done.stdout.splitlines()]


@cache
def _essential() -> dict[str, list[Resources]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ESSENTIAL, pool.map(_compile, ESSENTIAL), strict=True))


@pytest.fixture(params=ESSENTIAL)
def kernels(request) -> list[Resources]:
    return _essential()[request.param]


def one(kernels: list[Resources], kernel: str, variant: str) -> Resources:
    found = [k for k in kernels if k.kernel == kernel and k.variant == variant]
    assert len(found) == 1, f"{kernel} {variant}: {len(found)} of {sorted(map(str, kernels))}"
    return found[0]


def sound(kernels: list[Resources]) -> None:
    """What holds of every kernel that ships."""
    for k in kernels:
        assert k.spills == 0, k
        assert k.shared <= SHARED_LIMIT[k.arch], k
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
        "exp_logits_pointers", "exp_logits_raised", "reduce_sums", "target_logits_kernel",
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


def test_few_rows_are_added_in_the_same_order():
    hopper = _essential()["sm_90"]
    added_alike(one(hopper, MAIN[0], "half+out"), one(hopper, MAIN[0], "half+few+out"))
    halving = {a for a, table in CONFIGS.items() for tile in table.values() if tile.halves}
    assert halving == {"sm_90", "interpreter"}, "the architectures that the above looks at"


def added_alike(many: Resources, few: Resources) -> None:
    """Half the tile: what each warp and each of its registers holds of a row's columns is equal."""
    assert many.tile.startswith("128×256×")
    assert few.tile == many.tile.replace("128", "64", 1)
    of_a_warp, warps = zip(*(k.layout.split("warp = ") for k in (many, few)), strict=True)
    assert of_a_warp[0] == of_a_warp[1] != ""
    for bases in warps:  # warps lie along the rows: no column is another warp's
        assert re.findall(r"\[(\d+), (\d+)\]", bases)
        assert all(column == "0" for _, column in re.findall(r"\[(\d+), (\d+)\]", bases))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a not in ESSENTIAL])
def test_the_other_architectures(arch):
    sound(_compile(arch))


TRAINING = [
    "+".join(("half+out", *TRL_STATS)),
    "+".join(("half+out+softcap", *TRL_STATS_CAPPED)),
]


@pytest.mark.slow
def test_a_training_steps_statistics_on_ampere():
    sound(_compile("sm_80", "--only", *TRAINING))


@pytest.mark.slow
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
    assert (hopper["exp_logits_tma"], hopper["exp_logits_raised"]) == (4, 1)
    hopper = stages("sm_90", Variant("tf32", unaligned=True))
    assert hopper["exp_logits_pointers"] == hopper["exp_logits_raised"] == 1
    assert stages("sm_90", Variant("ieee"))["exp_logits_pointers"] == 3  # no matrix instruction
    assert stages("sm_80", Variant("tf32"))["exp_logits_pointers"] == 2  # one that needs no fence
    monkeypatch.setattr(module, "_FENCES_COPIES", True)
    assert stages("sm_90", Variant(out=True))["exp_logits_raised"] == 2


def test_every_architecture_is_described():
    assert set(ARCHITECTURES) == set(SHARED_LIMIT) == set(TENSOR_CORE)
    assert [supported_arch(a) for a in ("sm_90", "sm_87", "sm_103", "sm_121", "gfx950")] == [
        "sm_90", "sm_86", "sm_100", "sm_120", "gfx942",
    ]  # fmt: skip
    assert supported_arch("sm_75") is None
    assert supported_arch("gfx1100") is None
    with pytest.raises(ValueError, match="gfx1100"):
        pick("gfx1100", "half", False)


def test_nothing_is_compiled_by_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "fastdpo.backends.triton.ahead"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
