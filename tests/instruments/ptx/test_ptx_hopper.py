"""Tensor copies, barriers in memory and wgmma, against the layouts of the PTX manual."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.instruments.ptx import floats
from benchmarks.instruments.ptx.faults import Divergence, Fault, Race
from benchmarks.instruments.ptx.hopper import Descriptor, swizzled
from benchmarks.instruments.ptx.snippets import ADDRESS, run

BAR = "tile+4088"
INIT = f"setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [{BAR}], 1; bar.sync 0;"
EXPECT = f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{BAR}], 1024;"
LOAD = "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
LOAD += "[%r3], [%rd5, {%r20, %r21}], [%r22]; "
WAIT = f"again: mbarrier.try_wait.parity.shared::cta.b64 %p3, [{BAR}], 0; @!%p3 bra again;"
STORE = "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {%r20, %r21}], [%r3];"
STORED = STORE + "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
OUT = """
    shl.b32 %r5, %r1, 4; add.s32 %r5, %r3, %r5; ld.shared.v4.b32 {%r12,%r13,%r14,%r15}, [%r5];
    st.global.v4.b32 [%rd2+2048], {%r12,%r13,%r14,%r15};
"""


def matrix(swizzle: int) -> dict[int, Descriptor]:
    """16 × 60 16-bit elements, 64 apart; blocks of 8 × 64."""
    return {0x77: Descriptor(ADDRESS, (16, 60), (64, 1), (8, 64), 2, swizzle)}


def place(x: int, y: int) -> str:
    at = f"mov.u64 %rd5, 0x77; mov.u32 %r20, {x}; mov.u32 %r21, {y};"
    return at + f"add.s32 %r22, %r3, {4088};"


def source() -> np.ndarray:
    buffer = np.zeros(4096, np.uint8)
    buffer[:2048] = np.arange(1024, dtype=np.uint16).view(np.uint8)
    return buffer


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (0, 8), (16, 4), (32, 12)])
def test_a_block_is_loaded(x, y, swizzle, seed):
    body = place(x, y) + INIT + EXPECT + LOAD + WAIT + OUT
    found = run(body, source(), threads=64, seed=seed, descriptors=matrix(swizzle))
    rows = found[2048:3072].view(np.uint16).reshape(8, 64)
    for row in range(8):
        for piece in range(8):
            at = piece ^ row if swizzle else piece
            got = rows[row, 8 * at : 8 * at + 8]
            columns = x + 8 * piece + np.arange(8)
            inside = (columns < 60) & (y + row < 16)
            assert (got == np.where(inside, 64 * (y + row) + columns, 0)).all()


def test_the_pattern_of_a_swizzle():
    assert swizzled(np.array([0x480]), 128) == [0x480 ^ 0x10]
    assert swizzled(np.array([0x390]), 128) == [0x390 ^ 0x70]
    assert swizzled(np.array([0x390]), 64) == [0x390 ^ 0x30]
    assert swizzled(np.array([0x390]), 32) == [0x390 ^ 0x10]


def test_a_load_must_be_waited_for_by_whoever_reads():
    begin = place(0, 0) + INIT + EXPECT + LOAD
    options = {"threads": 64, "descriptors": matrix(128)}
    with pytest.raises(Race, match="copy's target"):
        run(begin + OUT, source(), **options)
    with pytest.raises(Race, match="under way"):
        run(begin, source(), **options)
    first = WAIT.replace("again:", "setp.gt.u32 %p4, %r1, 31; @%p4 bra out; again:") + "out:"
    with pytest.raises(Race):  # the other warp has not
        run(begin + first + OUT, source(), **options)
    run(begin + first + "bar.sync 0;" + OUT, source(), **options)


def test_a_barrier_in_memory_counts_arrivals_and_bytes():
    options = {"threads": 64, "descriptors": matrix(0)}
    with pytest.raises(Divergence, match="wait for ever"):  # fewer bytes come
        run(place(0, 0) + INIT + EXPECT.replace("1024", "2048") + LOAD + WAIT, source(), **options)
    with pytest.raises(Divergence, match="wait for ever"):  # nobody arrives
        run(place(0, 0) + INIT + LOAD + WAIT, source(), **options)
    with pytest.raises(Fault, match="arrivals"):
        run(INIT + EXPECT + EXPECT, source(), **options)
    with pytest.raises(Fault):
        run("setp.eq.u32 %p1, %r1, 0;" + EXPECT, source(), **options)


FILL = """
    shl.b32 %r5, %r1, 4; add.s32 %r5, %r3, %r5; or.b32 %r6, %r1, 0x10000;
    st.shared.v4.b32 [%r5], {%r6,%r6,%r6,%r6}; setp.eq.u32 %p1, %r1, 0;
"""
FENCE = "fence.proxy.async.shared::cta;"


def test_a_block_is_stored_where_the_matrix_is():
    body = place(16, 12) + FILL + FENCE + "bar.sync 0;" + STORED
    found = run(body, source(), threads=64, descriptors=matrix(128)).view(np.uint16)
    expected = source().view(np.uint16)
    for row in range(4):  # of 8: the others lie below the matrix
        for column in range(44):  # of 64
            piece = (column // 8) ^ row
            value = (8 * row + piece) if column % 2 == 0 else 1
            expected[64 * (12 + row) + 16 + column] = value
    assert (found == expected).all()


def test_a_store_needs_a_fence_a_barrier_and_time():
    options = {"threads": 64, "descriptors": matrix(128)}
    with pytest.raises(Race, match="without a fence"):
        run(place(0, 0) + FILL + "bar.sync 0;" + STORED, source(), **options)
    with pytest.raises(Race):
        run(place(0, 0) + FILL + FENCE + STORED, source(), **options)
    again = "cp.async.bulk.commit_group; bar.sync 0; st.shared.u32 [%r5], %r6;"
    with pytest.raises(Race, match="copy's source"):
        run(place(0, 0) + FILL + FENCE + "bar.sync 0;" + STORE + again, source(), **options)
    again = again.replace("bar", "cp.async.bulk.wait_group.read 0; bar")
    run(place(0, 0) + FILL + FENCE + "bar.sync 0;" + STORE + again, source(), **options)


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [64, 16] and B [8, 16] of small integers, and both in shared memory's layout of 32-byte
    swizzles: rows of 32 bytes, in groups of eight.
    """
    random = np.random.default_rng(0)
    a, b = (random.integers(-4, 5, (rows, 16)).astype(np.float32) for rows in (64, 8))
    tile = np.zeros(4096, np.uint8)
    for start, matrix_ in ((0, a), (2048, b)):
        pieces = floats.to_bf16(matrix_).view(np.uint8).reshape(-1, 16)
        for n, piece in enumerate(pieces):
            at = int(swizzled(np.array([start + 16 * n]), 32)[0])
            tile[at : at + 16] = piece
    return a, b, tile


MULTIPLY = """
    shr.u32 %r7, %r3, 4; cvt.u64.u32 %rd6, %r7; or.b64 %rd6, %rd6, 0xC000001000010000;
    add.s64 %rd7, %rd6, 128;
    mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
    mov.pred %p2, -1; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd6, %rd7, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
"""  # noqa: E501
TO_SHARED = """
    shl.b32 %r5, %r1, 5; add.s32 %r5, %r3, %r5; mul.wide.u32 %rd4, %r1, 32; add.s64 %rd4, %rd1, %rd4;
    ld.global.v4.b32 {%r12,%r13,%r14,%r15}, [%rd4]; ld.global.v4.b32 {%r16,%r17,%r18,%r19}, [%rd4+16];
    st.shared.v4.b32 [%r5], {%r12,%r13,%r14,%r15}; st.shared.v4.b32 [%r5+16], {%r16,%r17,%r18,%r19};
    fence.proxy.async.shared::cta; bar.sync 0;
"""  # noqa: E501
RESULT = "st.global.v4.f32 [%rd2+4096], {%f1,%f2,%f3,%f4};"


def product(after: str) -> tuple[np.ndarray, np.ndarray]:
    """(what the instruction gives, thread by thread; what it should)"""
    a, b, tile = operands()
    buffer = np.concatenate([tile, np.zeros(4096, np.uint8)])
    found = run(TO_SHARED + MULTIPLY + after, buffer, threads=128)[4096:].view(np.float32)
    exact = a @ b.T + 1
    expected = np.empty((128, 4), np.float32)
    for thread in range(128):
        for r in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r // 2)
            expected[thread, r] = exact[row, 2 * (thread % 4) + r % 2]
    return found[:512].reshape(128, 4), expected


def test_a_product_of_matrices_in_shared_memory():
    found, expected = product("wgmma.wait_group.sync.aligned 0;" + RESULT)
    assert (found == expected).all()


def test_a_product_is_not_there_before_it_is_waited_for():
    found, _ = product(RESULT + "wgmma.wait_group.sync.aligned 0;")
    assert np.isnan(found).all()
    with pytest.raises(Race, match="copy's source"):
        product("bar.sync 0; st.shared.u32 [%r5], %r1; wgmma.wait_group.sync.aligned 0;")
