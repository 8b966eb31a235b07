"""Instructions on integers, bits and predicates, and moves."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.ptx.machine import DTYPES, Machine, Mask, Run, builds
from benchmarks.instruments.ptx.parse import Instruction, Unsupported, split_operands


def unsigned(kind: str) -> str:
    return f"b{8 * np.dtype(DTYPES[kind]).itemsize}"


def wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def apply(m: Machine, f, kind: str, to: str, target: str, sources: list[str]) -> Run:
    """target = f(sources), all of them of one type."""
    put = m.write(target, to)
    values = [m.read(source, kind) for source in sources]

    def run(mask: Mask) -> None:
        put(f(*values), mask)

    return run


def known(instruction: Instruction, *allowed: str) -> None:
    """Every part of the opcode between its root and its type must be one of these."""
    for part in instruction.parts[1:-1]:
        if part not in allowed:
            raise Unsupported(instruction.text)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@builds("and", "or", "xor")
def logic(m: Machine, i: Instruction) -> Run:
    known(i)
    root, kind = i.parts
    f = _LOGIC[root]
    if kind != "pred":
        return apply(m, f, kind, kind, i.operands[0], i.operands[1:])
    put, a, b = m.write(i.operands[0], kind), *map(m.predicate, i.operands[1:])
    return lambda mask: put(f(a(), b()), mask)


@builds("not", "cnot")
def negation(m: Machine, i: Instruction) -> Run:
    root, kind = i.parts
    f = np.invert if root == "not" else (lambda a: a == 0)
    return apply(m, f, kind, kind, i.operands[0], i.operands[1:])


def integer_arithmetic(m: Machine, i: Instruction) -> Run:
    """add, sub, min, max, neg and abs of integers; sums wrap."""
    known(i)
    root, kind = i.parts[0], i.parts[-1]
    functions = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "neg": np.negative, "abs": np.abs,
    }  # fmt: skip
    return apply(m, functions[root], kind, kind, i.operands[0], i.operands[1:])


def product(kind: str, part: str):
    """The low or high half of a product, or all of it."""
    size = np.dtype(DTYPES[kind]).itemsize
    if part == "lo":
        return np.multiply
    if size <= 4:
        big = DTYPES[wide(kind)]
        if part == "wide":
            return lambda a, b: np.multiply(a, b, dtype=big)
        shift = 8 * size
        return lambda a, b: np.right_shift(np.multiply(a, b, dtype=big), big.type(shift))

    def high(a, b):
        exact = np.asarray(a).astype(object) * np.asarray(b).astype(object)
        return np.asarray(exact // 2**64, object).astype(DTYPES[kind])

    return high


def integer_multiply(m: Machine, i: Instruction) -> Run:
    """mul and mad with .lo, .hi or .wide."""
    root, part, kind = i.parts
    f, to = product(kind, part), wide(kind) if part == "wide" else kind
    if root == "mul":
        return apply(m, f, kind, to, i.operands[0], i.operands[1:])
    put, a, b = m.write(i.operands[0], to), *(m.read(o, kind) for o in i.operands[1:3])
    c = m.read(i.operands[3], to)
    return lambda mask: put(np.add(f(a, b), c), mask)


def integer_division(m: Machine, i: Instruction) -> Run:
    """div and rem, towards zero."""
    root, kind = i.parts

    def f(a, b):
        a, b = np.asarray(a), np.where(b == 0, 1, b).astype(DTYPES[kind])
        if kind[0] == "u":
            return a // b if root == "div" else a % b
        quotient = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
        return quotient if root == "div" else a - quotient * b

    return apply(m, f, kind, kind, i.operands[0], i.operands[1:])


@builds("rem")
def remainder(m: Machine, i: Instruction) -> Run:
    return integer_division(m, i)


@builds("shl", "shr")
def shift(m: Machine, i: Instruction) -> Run:
    """By more than the width: all zeros, or the sign."""
    root, kind = i.parts
    dtype = np.dtype(DTYPES[kind])
    width = 8 * dtype.itemsize
    put, a = m.write(i.operands[0], kind), m.read(i.operands[1], kind)
    by = m.read(i.operands[2], "u32")
    f = np.left_shift if root == "shl" else np.right_shift

    def run(mask: Mask) -> None:
        result = f(a, np.minimum(by, width - 1).astype(dtype))
        beyond = by >= width
        if np.any(beyond):
            sign = f(a, dtype.type(width - 1)) if dtype.kind == "i" else dtype.type(0)
            result = np.where(beyond, sign, result)
        put(result, mask)

    return run


@builds("shf")
def funnel_shift(m: Machine, i: Instruction) -> Run:
    _, side, mode, kind = i.parts
    if kind != "b32" or mode not in ("wrap", "clamp"):
        raise Unsupported(i.text)

    def f(low, high, by):
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
        by = by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))
        by = np.asarray(by).astype(np.uint64)
        moved = both >> by if side == "r" else (both << by) >> np.uint64(32)
        return moved.astype(np.uint32)

    return apply(m, f, "u32", "u32", i.operands[0], i.operands[1:])


@builds("bfe")
def extract(m: Machine, i: Instruction) -> Run:
    """`length` bits from `position` on, extended by their last one if signed."""
    kind = i.parts[1]
    width = int(kind[1:])
    small = np.int64

    def f(a, position, length):
        value = np.asarray(a).astype(np.uint64)
        first, count = (np.asarray(x).astype(small) & 0xFF for x in (position, length))
        last = np.minimum(first + count - 1, width - 1)
        kept = np.maximum(last - first + 1, 0)
        bits = (value >> np.minimum(first, 63).astype(np.uint64)) & ones(kept)
        if kind[0] == "s":
            sign = (value >> np.maximum(last, 0).astype(np.uint64)) & np.uint64(1)
            bits = np.where((sign != 0) & (count > 0), bits | ~ones(kept), bits)
        return bits.astype(DTYPES[bits_kind])

    bits_kind = unsigned(kind)
    put, a = m.write(i.operands[0], bits_kind), m.read(i.operands[1], bits_kind)
    position, length = (m.read(o, "u32") for o in i.operands[2:])
    return lambda mask: put(f(a, position, length), mask)


def ones(count: np.ndarray) -> np.ndarray:
    """So many set bits, from the lowest on."""
    below = (np.uint64(1) << (count % 64).astype(np.uint64)) - np.uint64(1)
    return np.where(count >= 64, ~np.uint64(0), below)


@builds("bfi")
def insert(m: Machine, i: Instruction) -> Run:
    kind = i.parts[1]
    dtype = np.dtype(DTYPES[kind])
    width = 8 * dtype.itemsize
    put, a, b = m.write(i.operands[0], kind), *(m.read(o, kind) for o in i.operands[1:3])
    position, length = (m.read(o, "u32") for o in i.operands[3:])

    def run(mask: Mask) -> None:
        first, count = (np.asarray(x).astype(np.int64) & 0xFF for x in (position, length))
        by = (first % 64).astype(np.uint64)
        field = np.where(first >= width, np.uint64(0), ones(count) << by)
        moved = np.asarray(a).astype(np.uint64) << by
        put(((np.asarray(b).astype(np.uint64) & ~field) | (moved & field)).astype(dtype), mask)

    return run


def _bits_of(x: np.ndarray) -> np.ndarray:
    """[n] -> [n, width] of zeros and ones, the lowest first."""
    x = np.atleast_1d(x)
    return np.unpackbits(x[:, None].view(np.uint8), axis=1, bitorder="little")


@builds("popc", "clz", "brev")
def count_bits(m: Machine, i: Instruction) -> Run:
    root, kind = i.parts

    def f(a):
        bits = _bits_of(a)
        if root == "popc":
            return bits.sum(1)
        if root == "clz":
            return np.where(bits.any(1), bits[:, ::-1].argmax(1), bits.shape[1])
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(DTYPES[kind])[:, 0]

    return apply(m, f, kind, kind if root == "brev" else "u32", i.operands[0], i.operands[1:])


@builds("prmt")
def permute(m: Machine, i: Instruction) -> Run:
    if i.opcode != "prmt.b32":
        raise Unsupported(i.text)

    def f(a, b, selector):
        a, b, selector = np.broadcast_arrays(*np.atleast_1d(a, b, selector))
        source = np.stack([a, b], 1).copy().view(np.uint8).astype(np.uint32)  # [n, 8]
        result = np.zeros(len(a), np.uint32)
        for byte in range(4):
            pick = (selector >> np.uint32(4 * byte)) & np.uint32(0xF)
            value = source[np.arange(len(a)), pick & np.uint32(7)]
            value = np.where(pick & np.uint32(8), np.where(value & 0x80, 0xFF, 0), value)
            result |= value.astype(np.uint32) << np.uint32(8 * byte)
        return result

    return apply(m, f, "b32", "b32", i.operands[0], i.operands[1:])


@builds("lop3")
def any_logic(m: Machine, i: Instruction) -> Run:
    table = int(i.operands[4], 0)

    def f(a, b, c):
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                terms = (v if row >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0)))
                result = result | np.bitwise_and.reduce([*np.broadcast_arrays(*terms)])
        return result

    return apply(m, f, "b32", "b32", i.operands[0], i.operands[1:4])


@builds("selp")
def select(m: Machine, i: Instruction) -> Run:
    kind = unsigned(i.parts[1]) if i.parts[1] != "pred" else "pred"
    put, a, b = m.write(i.operands[0], kind), *(_bits(m, o, i.parts[1]) for o in i.operands[1:3])
    chosen = m.predicate(i.operands[3])
    return lambda mask: put(np.where(chosen(), a, b), mask)


def _bits(m: Machine, operand: str, kind: str):
    """A source of any type as bits."""
    value = m.read(operand, kind)
    return value if kind == "pred" else value.view(DTYPES[unsigned(kind)])


@builds("mov")
def move(m: Machine, i: Instruction) -> Run:
    kind = i.parts[1]
    to, source = i.operands
    if to.startswith("{"):
        return _unpack(m, split_operands(to[1:-1]), source, kind)
    if source.startswith("{"):
        return _pack(m, to, split_operands(source[1:-1]), kind)
    if kind == "pred":
        put, value = m.write(to, kind), m.predicate(source)
        return lambda mask: put(value(), mask)
    bits = unsigned(kind)
    put, value = m.write(to, bits), _bits(m, source, kind if source[:2] in ("0f", "0d") else bits)
    return lambda mask: put(value, mask)


def _unpack(m: Machine, targets: list[str], source: str, kind: str) -> Run:
    part = f"b{int(kind[1:]) // len(targets)}"
    value = m.read(source, unsigned(kind))
    puts = [m.write(target, part) for target in targets]

    def run(mask: Mask) -> None:
        parts = np.atleast_1d(value)[:, None].copy().view(DTYPES[part])
        for n, put in enumerate(puts):
            put(parts[:, n], mask)

    return run


def _pack(m: Machine, target: str, sources: list[str], kind: str) -> Run:
    part = f"b{int(kind[1:]) // len(sources)}"
    put = m.write(target, unsigned(kind))
    values = [m.read(source, part) for source in sources]

    def run(mask: Mask) -> None:
        columns = [np.broadcast_to(value, m.threads) for value in values]
        put(np.stack(columns, 1).view(DTYPES[unsigned(kind)])[:, 0], mask)

    return run


@builds("cvta")
def generic_address(m: Machine, i: Instruction) -> Run:
    """Global addresses are generic ones; parameters and shared memory lie elsewhere."""
    from benchmarks.instruments.ptx.machine import PARAMETERS, SHARED

    base = {"global": 0, "param": PARAMETERS, "shared": SHARED}[i.parts[-2]]
    back = i.parts[1] == "to"

    def f(a):
        return a - np.uint64(base) if back else a + np.uint64(base)

    return apply(m, f, "u64", "u64", i.operands[0], i.operands[1:])
