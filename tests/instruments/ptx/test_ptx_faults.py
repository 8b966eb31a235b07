"""Planted faults: each must be found, and its correct neighbour must pass."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.instruments.ptx.faults import (
    Divergence,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
)
from benchmarks.instruments.ptx.memory import Allocation, Global
from benchmarks.instruments.ptx.parse import Unsupported
from benchmarks.instruments.ptx.snippets import run

BARRIER = "bar.sync 0;"
NEIGHBOUR = "xor.b32 %r5, %r2, 4; add.s32 %r5, %r3, %r5;"  # the next thread's word of the tile
OTHER_WARP = "xor.b32 %r5, %r2, 128; add.s32 %r5, %r3, %r5;"


def exchange(between: str, to: str = NEIGHBOUR) -> str:
    return f"{to} st.shared.u32 [%r4], %r1; {between} ld.shared.u32 %r6, [%r5];"


def test_a_read_without_a_barrier_is_a_race():
    run(exchange(BARRIER))
    with pytest.raises(Race, match=r"ld\.shared"):
        run(exchange(""))


def test_a_warp_barrier_orders_its_warp_alone():
    run(exchange("bar.warp.sync -1;"), threads=64)
    run(exchange(BARRIER, OTHER_WARP), threads=64)
    with pytest.raises(Race):
        run(exchange("bar.warp.sync -1;", OTHER_WARP), threads=64)


def test_a_shuffle_orders_no_memory():
    with pytest.raises(Race):
        run(exchange("shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;"))


def test_a_write_after_a_read_needs_a_barrier():
    body = exchange(BARRIER) + "{} st.shared.u32 [%r4], %r6;"
    run(body.format(BARRIER))
    with pytest.raises(Race, match=r"st\.shared"):
        run(body.format(""))
    # Everyone has read the same word, the last of them in another warp.
    body = f"st.shared.u32 [%r4], %r1; {BARRIER} ld.shared.u32 %r6, [tile]; {{}}"
    body += "setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [tile], %r1;"
    run(body.format(BARRIER), threads=64)
    with pytest.raises(Race, match=r"st\.shared"):
        run(body.format(""), threads=64)


def test_two_values_at_one_place_are_a_race():
    run("st.shared.u32 [tile], 7;")
    with pytest.raises(Race, match="at once"):
        run("st.shared.u32 [tile], %r1;")


def test_a_barrier_of_some_threads_orders_those():
    """Each pair of warps has a barrier of its own."""
    body = "shr.u32 %r7, %r1, 6; add.s32 %r7, %r7, 1;" + exchange("bar.sync %r7, 64;", "{}")
    body = body.replace("bar.sync %r7, 64;", """
        setp.eq.u32 %p2, %r7, 1; @%p2 bra first; bar.sync 2, 64; bra.uni joined;
        first: bar.sync 1, 64; joined:""")  # fmt: skip
    run(body.format(OTHER_WARP), threads=128)
    with pytest.raises(Race):
        run(body.format("xor.b32 %r5, %r2, 256; add.s32 %r5, %r3, %r5;"), threads=128)


def test_shared_memory_holds_nothing_at_first():
    with pytest.raises(Uninitialised):
        run("ld.shared.u32 %r6, [%r4];")
    with pytest.raises(Uninitialised):  # one byte of the word is missing
        run("st.shared.b8 [%r4], %r1; ld.shared.u32 %r6, [%r4];")


def test_shared_memory_ends():
    run("st.shared.u32 [tile+4092], 1;")
    for address in ("tile+4096", "tile+-4"):
        with pytest.raises(OutOfBounds):
            run(f"st.shared.u32 [{address}], 1;")


@pytest.mark.parametrize(
    ("access", "fault"),
    [
        ("ld.global.u32 %r6, [%rd1+1020];", None),
        ("ld.global.u32 %r6, [%rd1+1024];", OutOfBounds),
        ("ld.global.u32 %r6, [%rd1+-4];", OutOfBounds),
        ("ld.global.v4.u32 {%r6,%r7,%r8,%r9}, [%rd1+1012];", Misaligned),
        ("ld.global.u64 %rd6, [%rd1+4];", Misaligned),
        ("ld.global.u64 %rd6, [%rd1+1024];", OutOfBounds),
        ("ld.shared.v2.u32 {%r6,%r7}, [tile+4];", Misaligned),
    ],
)
def test_accesses_to_global_memory(access, fault):
    if fault is None:
        run(access)
    else:
        with pytest.raises(fault, match=r"ld\.\w+"):
            run(access)


def test_a_guarded_access_is_checked_where_it_happens():
    guard = "setp.lt.u32 %p1, %r1, 4; "
    run(guard + "@%p1 ld.global.u32 %r6, [%rd2];", np.zeros(64, np.uint8))
    with pytest.raises(OutOfBounds, match="thread 4"):
        run(guard + "@!%p1 ld.global.u32 %r6, [%rd2];", np.zeros(64, np.uint8))


def test_what_a_kernel_has_not_written_may_not_be_read():
    read = "ld.global.u32 %r6, [%rd2];"
    run("st.global.u32 [%rd2], %r1;" + read, unwritten=True)
    with pytest.raises(Uninitialised):
        run(read, unwritten=True)


def test_global_memory_is_watched_for_races_too():
    run("ld.global.u32 %r6, [%rd2]; st.global.u32 [%rd2], %r6;")
    with pytest.raises(Race):
        run("st.global.u32 [%rd2], %r1; ld.global.u32 %r6, [%rd1];")
    with pytest.raises(Race):
        run("ld.global.u32 %r6, [%rd1]; st.global.u32 [%rd2], %r6;")
    with pytest.raises(Race):  # nothing orders blocks
        run("st.global.u32 [%rd2], %r1; bar.sync 0;", blocks=2)


def test_allocations_may_not_overlap():
    bytes_ = np.zeros(64, np.uint8)
    two = [Allocation(start, bytes_, watched=False) for start in (0x10000, 0x10020)]
    with pytest.raises(ValueError, match="overlap"):
        Global(two)


def test_an_asynchronous_copy_arrives_when_it_is_waited_for():
    buffer = np.arange(1024).astype(np.uint8)
    start = "shl.b32 %r5, %r1, 4; add.s32 %r5, %r3, %r5;"
    start += "cp.async.cg.shared.global [%r5], [%rd2], 16; cp.async.commit_group;"
    read = "ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd2+4], %r6;"
    found = run(start + "cp.async.wait_group 0;" + read, buffer.copy()).reshape(-1, 16)
    assert (found[:32, 4:8] == buffer.reshape(-1, 16)[:32, :4]).all()
    with pytest.raises(Race):
        run(start + read, buffer.copy())
    with pytest.raises(Race):  # the only group may still be on its way
        run(start + "cp.async.wait_group 1;" + read, buffer.copy())
    with pytest.raises(Race):  # waiting is for one's own copies
        run(start + "cp.async.wait_group 0; ld.shared.u32 %r6, [tile];", buffer.copy())
    run(start + "cp.async.wait_group 0; bar.sync 0; ld.shared.u32 %r6, [tile];", buffer.copy())


def test_absent_threads():
    half = "setp.lt.u32 %p1, %r1, 16; @%p1 bra away; {} away:"
    with pytest.raises(Divergence):
        run(half.format("bar.sync 0;"))
    with pytest.raises(Divergence):
        run(half.format("shfl.sync.down.b32 %r6, %r1, 1, 31, -1;"))
    run(half.format("shfl.sync.down.b32 %r6, %r1, 1, 31, 0xffff0000;"))
    with pytest.raises(Divergence, match="wait for ever"):
        run("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", threads=64)


def test_unknown_instructions_are_refused():
    for text in (
        "tanh.approx.f32 %f1, %f2;",
        "mul.rz.f32 %f1, %f2, %f3;",
        "ld.const.u32 %r6, [%rd1];",
    ):
        with pytest.raises(Unsupported):
            run(text)
