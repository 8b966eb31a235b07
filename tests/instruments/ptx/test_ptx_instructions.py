"""Single instructions of the executor against values known otherwise."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from benchmarks.instruments.ptx import floats
from benchmarks.instruments.ptx.snippets import result, run

F32, F64, U16, U32, U64, S32 = np.float32, np.float64, np.uint16, np.uint32, np.uint64, np.int32
ONE_AND_A_BIT = F32(1 + 2**-23)
CASES = [
    ("shl.b32 <d>, <a>, 32;", [U32(1)], U32(0)),
    ("shr.s32 <d>, <a>, 40;", [S32(-8)], S32(-1)),
    ("shr.u32 <d>, <a>, 40;", [U32(8)], U32(0)),
    ("shf.r.wrap.b32 <d>, <a>, <b>, 8;", [U32(0x11223344), U32(0xAABBCCDD)], U32(0xDD112233)),
    ("shf.l.clamp.b32 <d>, <a>, <b>, 8;", [U32(0x11223344), U32(0xAABBCCDD)], U32(0xBBCCDD11)),
    ("bfe.u32 <d>, <a>, 4, 8;", [U32(0x12345678)], U32(0x67)),
    ("bfe.s32 <d>, <a>, 4, 8;", [U32(0x00000F80)], S32(-8)),
    ("bfe.s32 <d>, <a>, 28, 8;", [U32(0x80000000)], S32(-8)),
    ("bfe.u32 <d>, <a>, 3, 0;", [U32(0xFFFFFFFF)], U32(0)),
    ("bfi.b32 <d>, <a>, <b>, 8, 4;", [U32(0xFF), U32(0)], U32(0xF00)),
    ("prmt.b32 <d>, <a>, <b>, 0x7610;", [U32(0x33221100), U32(0x77665544)], U32(0x77661100)),
    ("prmt.b32 <d>, <a>, <b>, 0x888b;", [U32(0x800000F0), U32(0)], U32(0xFFFFFFFF)),
    ("lop3.b32 <d>, <a>, <b>, <c>, 0x96;", [U32(12), U32(10), U32(7)], U32(12 ^ 10 ^ 7)),
    ("popc.b32 <d>, <a>;", [U32(0xF0F0)], U32(8)),
    ("clz.b32 <d>, <a>;", [U32(0x00F0)], U32(24)),
    ("clz.b32 <d>, <a>;", [U32(0)], U32(32)),
    ("brev.b32 <d>, <a>;", [U32(1)], U32(0x80000000)),
    ("mul.hi.u32 <d>, <a>, <b>;", [U32(0xFFFFFFFF)] * 2, U32(0xFFFFFFFE)),
    ("mul.hi.s32 <d>, <a>, <b>;", [S32(-2), S32(3)], S32(-1)),
    ("mul.wide.s32 <d>, <a>, <b>;", [S32(-2), S32(1 << 30)], np.int64(-(1 << 31))),
    ("mul.hi.u64 <d>, <a>, <b>;", [U64(2**63), U64(6)], U64(3)),
    ("mad.wide.u32 <d>, <a>, <b>, <c>;", [U32(2**31), U32(4), U64(5)], U64(2**33 + 5)),
    ("mad.lo.s32 <d>, <a>, <b>, <c>;", [S32(-3), S32(5), S32(1)], S32(-14)),
    ("div.s32 <d>, <a>, <b>;", [S32(-7), S32(2)], S32(-3)),
    ("rem.s32 <d>, <a>, <b>;", [S32(-7), S32(2)], S32(-1)),
    ("cvt.s64.s32 <d>, <a>;", [S32(-5)], np.int64(-5)),
    ("cvt.u64.u32 <d>, <a>;", [S32(-5)], U64(2**32 - 5)),
    ("cvt.rzi.s32.f32 <d>, <a>;", [F32(-2.9)], S32(-2)),
    ("cvt.rzi.s32.f32 <d>, <a>;", [F32(3e10)], S32(2**31 - 1)),
    ("cvt.rzi.s32.f32 <d>, <a>;", [F32("nan")], S32(0)),
    ("cvt.rn.f32.s32 <d>, <a>;", [S32(2**24 + 1)], F32(2**24)),
    ("cvt.rni.f32.f32 <d>, <a>;", [F32(2.5)], F32(2)),
    ("cvt.rn.f32.f64 <d>, <a>;", [F64(1 + 2**-24 + 2**-50)], ONE_AND_A_BIT),
    ("cvt.rn.bf16.f32 <d>, <a>;", [F32(1 + 2**-8)], U16(0x3F80)),
    ("cvt.rn.bf16.f32 <d>, <a>;", [F32(1 + 3 * 2**-8)], U16(0x3F82)),
    ("cvt.rn.bf16.f32 <d>, <a>;", [F32(3.4e38)], U16(0x7F80)),
    ("cvt.rn.f16.f32 <d>, <a>;", [F32(2**-24)], U16(1)),
    ("cvt.rn.f16.f32 <d>, <a>;", [F32(65520)], U16(0x7C00)),
    ("cvt.rn.bf16x2.f32 <d>, <a>, <b>;", [F32(1), F32(-2)], U32(0x3F80C000)),
    ("cvt.rn.f16x2.f32 <d>, <a>, <b>;", [F32(1), F32(-2)], U32(0x3C00C000)),
    ("cvt.f32.f16 <d>, <a>;", [U16(1)], F32(2**-24)),
    ("cvt.f32.bf16 <d>, <a>;", [U16(0xC000)], F32(-2)),
    ("cvt.rna.tf32.f32 <d>, <a>;", [F32(1 + 2**-11)], F32(1 + 2**-10)),
    ("add.f32 <d>, <a>, <b>;", [F32(1), F32(2**-24)], F32(1)),
    ("add.ftz.f32 <d>, <a>, <b>;", [F32(1e-40), F32(0)], F32(0)),
    ("add.f32 <d>, <a>, <b>;", [F32(1e-40), F32(0)], F32(1e-40)),
    ("max.f32 <d>, <a>, <b>;", [F32("nan"), F32(1)], F32(1)),
    ("max.f32 <d>, <a>, <b>;", [F32(-0.0), F32(0.0)], F32(0.0)),
    ("min.f32 <d>, <a>, <b>;", [F32(0.0), F32(-0.0)], F32(-0.0)),
    ("copysign.f32 <d>, <a>, <b>;", [F32(-0.0), F32(3)], F32(-3)),
    ("rcp.approx.ftz.f32 <d>, <a>;", [F32(1)], F32(1)),
    ("ex2.approx.ftz.f32 <d>, <a>;", [F32(-3)], F32(0.125)),
    ("ex2.approx.ftz.f32 <d>, <a>;", [F32(-127)], F32(0)),
    ("ex2.approx.ftz.f32 <d>, <a>;", [F32("-inf")], F32(0)),
    ("{ .reg .b32 low, high; mov.b64 {low, high}, <a>; mov.b64 <d>, {high, low}; }",
     [U64(1 << 32 | 2)], U64(2 << 32 | 1)),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "inputs", "expected"), CASES, ids=lambda v: str(v)[:60])
def test_an_instruction(instruction, inputs, expected):
    found = result(instruction, *inputs, to=type(expected))
    assert found.tobytes() == expected.tobytes(), found


def _fused(a: F32, b: F32, c: F32) -> F32:
    """The nearest fp32 of the exact number, looked for among its neighbours."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = F32(float(exact))
    around = [np.nextafter(near, F32(-math.inf)), near, np.nextafter(near, F32(math.inf))]
    gaps = [abs(Fraction(float(x)) - exact) for x in around]
    best = [x for x, gap in zip(around, gaps, strict=True) if gap == min(gaps)]
    return next((x for x in best if x.view(U32) % 2 == 0), best[0])


def test_a_fused_product_and_sum_rounds_once():
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(3000).astype(F32) for _ in range(3))
    scale = np.exp2(random.integers(-30, 30, 3000)).astype(F32)
    a, c = a * scale, np.where(random.random(3000) < 0.3, -a * b, c * scale).astype(F32)
    # Halfway between two numbers but for the smallest of terms.
    a[:2], b[:2], c[:2] = F32(1 + 2**-12), F32(1 + 2**-12), [F32(2**-80), F32(-(2**-80))]
    expected = np.array([_fused(*row) for row in zip(a, b, c, strict=True)], F32)
    assert (floats.fma32(a, b, c).view(U32) == expected.view(U32)).all()
    assert result("fma.rn.f32 <d>, <a>, <b>, <c>;", a[0], b[0], c[0], to=F32) == expected[0]


def test_a_fused_product_and_sum_in_fp64():
    x = F64(1 + 2**-52)
    assert result("fma.rn.f64 <d>, <a>, <b>, <c>;", x, x, F64(-1 - 2**-51), to=F64) == F64(2**-104)


@pytest.mark.parametrize("name", ["ex2", "rcp", "lg2"])
def test_an_approximation_errs_but_little(name):
    x = np.random.default_rng(0).uniform(0.01, 30, 4000).astype(F32)
    exact = {"ex2": np.exp2, "rcp": np.reciprocal, "lg2": np.log2}[name](x.astype(F64))
    found = getattr(floats, name)(x)
    off = np.abs(found - exact) / np.spacing(np.abs(exact).astype(F32))
    assert 0.9 < off.max() < 1.6
    assert (found.view(U32) == getattr(floats, name)(x).view(U32)).all()


@pytest.mark.parametrize(
    ("comparison", "numbers", "with_nan"),
    [("lt", True, False), ("ne", True, False), ("neu", True, True), ("geu", False, True),
     ("num", True, False), ("nan", False, True)],
)  # fmt: skip
def test_comparisons_and_nan(comparison, numbers, with_nan):
    for b, expected in ((F32(2), numbers), (F32("nan"), with_nan)):
        text = f"setp.{comparison}.f32 %p1, <a>, <b>; selp.b32 <d>, 1, 0, %p1;"
        assert bool(result(text, F32(1), b)) == expected


def _words(body: str, **options) -> np.ndarray:
    return run(body + "st.global.u32 [%rd2], %r6;", **options).view(U32)[::4]


def test_shuffles_votes_and_reductions():
    lanes = np.arange(32)
    shuffle = "shfl.sync.{} %r6, %r1, {}, -1;"
    assert (_words(shuffle.format("bfly.b32", "3, 31"))[:32] == (lanes ^ 3)).all()
    assert (_words(shuffle.format("down.b32", "3, 31"))[:32] == np.r_[lanes[3:], 29:32]).all()
    assert (_words(shuffle.format("up.b32", "3, 0"))[:32] == np.r_[0:3, lanes[:-3]]).all()
    assert (_words(shuffle.format("idx.b32", "5, 31"))[:32] == 5).all()
    halves = _words(shuffle.format("down.b32", "8, 0x100f"))[:32]  # segments of 16 lanes
    assert (halves == np.where(lanes % 16 < 8, lanes + 8, lanes)).all()
    vote = "setp.eq.u32 %p1, %r1, 37; vote.sync.{} %p2, %p1, -1; selp.b32 %r6, 1, 0, %p2;"
    assert (_words(vote.format("any.pred"), threads=64) == np.repeat([0, 1], 32)).all()
    ballot = "setp.gt.u32 %p1, %r1, 29; vote.sync.ballot.b32 %r6, %p1, -1;"
    assert (_words(ballot)[:32] == 0xC0000000).all()
    assert (_words("redux.sync.max.s32 %r6, %r1, -1;", threads=64) == np.repeat([31, 63], 32)).all()
    elect = "elect.sync %r7|%p1, -1; selp.b32 %r6, 1, 0, %p1;"
    assert (_words(elect)[:32] == (lanes == 0)).all()


def test_branches_join_and_loops_end():
    loop = "mov.u32 %r6, 0; again: add.u32 %r6, %r6, 2; setp.le.u32 %p1, %r6, %r1; @%p1 bra again;"
    assert (_words(loop)[:32] == np.arange(32) // 2 * 2 + 2).all()
    branch = "setp.lt.u32 %p1, %r1, 9; @%p1 bra one; mov.u32 %r6, 5; bra.uni two;"
    branch += "one: mov.u32 %r6, 4; two:"
    joined = branch + "shfl.sync.bfly.b32 %r6, %r6, 31, 31, -1;"
    assert (_words(joined)[:32] == np.where(np.arange(31, -1, -1) < 9, 4, 5)).all()


def test_atomics_give_every_thread_its_own_ticket():
    body = "atom.global.add.u32 %r6, [%rd1+512], 1; st.global.u32 [%rd2+4], %r6;"
    orders = []
    for seed in (0, 1, 2):
        words = run(body, seed=seed).view(U32)
        assert words[128] == 32
        orders.append(words.reshape(-1, 4)[:32, 1].tolist())
        assert sorted(orders[-1]) == list(range(32))
    assert orders[0] == sorted(orders[0])
    assert orders[1] != orders[2]


def _fragment_case(shape: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A, B, C of one tile, and the buffer of every lane's registers, from the manual's formulae."""
    depth, kind = {"bf16": (16, "bf16"), "tf32": (8, "tf32")}[shape]
    random = np.random.default_rng(1)
    a, b, c = (random.integers(-4, 5, s).astype(F32) for s in ((16, depth), (depth, 8), (16, 8)))
    buffer = np.zeros((32, 16), U32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for r in range(4):
            row, half = group + 8 * (r % 2), r // 2
            buffer[lane, 6 + r] = c[group + 8 * (r // 2), 2 * member + r % 2].view(U32)
            if kind == "bf16":
                pair = a[row, 2 * member + 8 * half :][:2]
                buffer[lane, r] = floats.to_bf16(pair).view(U32)[0]
            else:
                buffer[lane, r] = a[row, member + 4 * half].view(U32)
        for r in range(2):
            if kind == "bf16":
                pair = b[2 * member + 8 * r :, group][:2]
                buffer[lane, 4 + r] = floats.to_bf16(pair).view(U32)[0]
            else:
                buffer[lane, 4 + r] = b[member + 4 * r, group].view(U32)
    return a, b, c, buffer


@pytest.mark.parametrize("shape", ["bf16", "tf32"])
def test_a_matrix_product_with_the_fragments_of_the_manual(shape):
    a, b, c, buffer = _fragment_case(shape)
    depth = a.shape[1]
    body = """
        mul.wide.u32 %rd4, %r1, 64; add.s64 %rd4, %rd1, %rd4;
        ld.global.v4.b32 {%r8,%r9,%r10,%r11}, [%rd4];
        ld.global.v4.b32 {%r12,%r13,%r14,%r15}, [%rd4+16];
        ld.global.v2.b32 {%r16,%r17}, [%rd4+32];
    """
    kind = f"m16n8k{depth}.row.col.f32.{shape}.{shape}.f32"
    body += f"mma.sync.aligned.{kind} {{%r18,%r19,%r20,%r21}}, {{%r8,%r9,%r10,%r11}},"
    body += "{%r12,%r13}, {%r14,%r15,%r16,%r17};"
    body += "st.global.v4.b32 [%rd4+48], {%r18,%r19,%r20,%r21};"
    found = run(body, buffer.copy().view(np.uint8).ravel()).view(F32).reshape(32, 16)[:, 12:]
    product = a @ b + c
    for lane in range(32):
        group, member = divmod(lane, 4)
        for r in range(4):
            assert found[lane, r] == product[group + 8 * (r // 2), 2 * member + r % 2]


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_from_shared_memory_and_back(turned):
    matrices = np.arange(4 * 64, dtype=U16).reshape(4, 8, 8)
    buffer = np.zeros(64 * 16, np.uint8)
    buffer[:512] = matrices.view(np.uint8).ravel()
    trans = ".trans" if turned else ""
    body = f"""
        ld.global.v4.b32 {{%r8,%r9,%r10,%r11}}, [%rd2];
        shl.b32 %r5, %r1, 4; add.s32 %r5, %r3, %r5;
        st.shared.v4.b32 [%r5], {{%r8,%r9,%r10,%r11}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r12,%r13,%r14,%r15}}, [%r5];
        st.global.v4.b32 [%rd2+512], {{%r12,%r13,%r14,%r15}}; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {{%r12,%r13,%r14,%r15}}; bar.sync 0;
        ld.shared.v4.b32 {{%r16,%r17,%r18,%r19}}, [%r5];
        st.global.v4.b32 [%rd2], {{%r16,%r17,%r18,%r19}};
    """
    found = run(body, buffer.copy())
    registers = found[512:].view(U32).reshape(32, 4)
    for lane in range(32):
        for j in range(4):
            matrix = matrices[j].T if turned else matrices[j]
            pair = matrix[lane // 4, 2 * (lane % 4) :][:2]
            assert registers[lane, j] == int(pair[0]) | int(pair[1]) << 16
    assert (found[:512] == buffer[:512]).all()
