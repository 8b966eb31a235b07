"""Floating point, comparisons and conversions, and what is spelled alike for integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.instruments.ptx import floats
from benchmarks.instruments.ptx.integers import (
    apply,
    integer_arithmetic,
    integer_division,
    integer_multiply,
    known,
)
from benchmarks.instruments.ptx.machine import DTYPES, Machine, Mask, Run, builds
from benchmarks.instruments.ptx.parse import Instruction, Unsupported

_BINARY: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "min": floats.minimum, "max": floats.maximum, "neg": np.negative, "abs": np.abs,
}  # fmt: skip


def is_float(kind: str) -> bool:
    return kind in ("f32", "f64")


def flushing(i: Instruction, f: Callable) -> Callable:
    """With .ftz, subnormal arguments and results are zeros."""
    if "ftz" not in i.parts[1:]:
        return f
    return lambda *values: floats.flush(f(*map(floats.flush, values)))


@builds("add", "sub", "mul", "min", "max", "neg", "abs")
def binary(m: Machine, i: Instruction) -> Run:
    root, kind = i.parts[0], i.parts[-1]
    if not is_float(kind):
        if root == "mul":
            return integer_multiply(m, i)
        return integer_arithmetic(m, i)
    known(i, "rn", "ftz", "NaN")
    f = _BINARY[root]
    if "NaN" in i.parts:
        f = {"min": np.minimum, "max": np.maximum}[root]
    return apply(m, flushing(i, f), kind, kind, i.operands[0], i.operands[1:])


@builds("fma", "mad")
def fused(m: Machine, i: Instruction) -> Run:
    kind = i.parts[-1]
    if not is_float(kind):
        return integer_multiply(m, i)
    known(i, "rn", "ftz")
    if kind == "f32":
        f = flushing(i, floats.fma32)
        return apply(m, f, kind, kind, i.operands[0], i.operands[1:])
    put, values = m.write(i.operands[0], kind), [m.read(o, kind) for o in i.operands[1:]]

    def run(mask: Mask) -> None:
        # Fractions are slow: only for the threads that are here.
        some = m.some(mask)
        result = np.zeros(m.threads)
        result[some] = floats.fma64(*(np.broadcast_to(v, m.threads)[some] for v in values))
        put(result, mask)

    return run


@builds("div")
def divide(m: Machine, i: Instruction) -> Run:
    kind = i.parts[-1]
    if not is_float(kind):
        return integer_division(m, i)
    known(i, "rn", "ftz", "full", "approx")
    return apply(m, flushing(i, np.divide), kind, kind, i.operands[0], i.operands[1:])


_APPROXIMATE = {
    "ex2.approx.ftz.f32": floats.ex2, "ex2.approx.f32": floats.ex2,
    "lg2.approx.ftz.f32": floats.lg2, "lg2.approx.f32": floats.lg2,
    "rcp.approx.ftz.f32": floats.rcp, "rsqrt.approx.ftz.f32": floats.rsqrt,
    "rcp.approx.ftz.f64": floats.rcp64,
    "sqrt.rn.f32": np.sqrt, "sqrt.rn.f64": np.sqrt, "sqrt.approx.ftz.f32": np.sqrt,
    "rcp.rn.f32": lambda x: np.float32(1) / x, "rcp.rn.f64": lambda x: 1.0 / x,
}  # fmt: skip


@builds("ex2", "lg2", "rcp", "rsqrt", "sqrt")
def special(m: Machine, i: Instruction) -> Run:
    kind = i.parts[-1]
    return apply(m, _APPROXIMATE[i.opcode], kind, kind, i.operands[0], i.operands[1:])


@builds("copysign")
def copy_sign(m: Machine, i: Instruction) -> Run:
    kind = i.parts[-1]
    return apply(m, lambda a, b: np.copysign(b, a), kind, kind, i.operands[0], i.operands[1:])


# ---- Comparisons

_COMPARE: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, kind: str) -> Callable:
    if not is_float(kind):
        return _COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        ordered = _COMPARE[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":  # false where one is NaN, unlike numpy's
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return _COMPARE[name]


def _flushed(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: f(floats.flush(a), floats.flush(b))


@builds("setp")
def compare(m: Machine, i: Instruction) -> Run:
    kind = i.parts[-1]
    names = [part for part in i.parts[1:-1] if part != "ftz"]
    f = comparison(names[0], kind)
    if "ftz" in i.parts:
        f = _flushed(f)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    targets = i.operands[0].split("|")
    puts = [m.write(target, "pred") for target in targets]
    a, b = (m.read(o, kind) for o in i.operands[1:3])
    other = m.predicate(i.operands[3]) if len(names) > 1 else None

    def run(mask: Mask) -> None:
        result = f(a, b)
        results = [result, ~result] if len(puts) > 1 else [result]
        for put, value in zip(puts, results, strict=True):
            put(value if other is None else combine[names[1]](value, other()), mask)

    return run


# ---- Conversions

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "tf32", "f32", "f64")


@builds("cvt")
def convert(m: Machine, i: Instruction) -> Run:
    to, kind = i.parts[-2:]
    modes = i.parts[1:-2]
    if to in ("f16x2", "bf16x2"):
        known(i, "rn", to)
        narrow = floats.to_f16 if to == "f16x2" else floats.to_bf16

        def pair(high, low):
            return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low)

        return apply(m, pair, "f32", "b32", i.operands[0], i.operands[1:])
    put, value = m.write(i.operands[0], to), m.read(i.operands[1], kind)
    f = _conversion(to, kind, modes)
    if f is None:
        raise Unsupported(i.text)
    return lambda mask: put(f(value), mask)


def _conversion(to: str, kind: str, modes: list[str]) -> Callable | None:
    dtype = np.dtype(DTYPES[to])
    if kind not in _FLOATS and to not in _FLOATS:
        return None if modes else (lambda a: np.asarray(a).astype(dtype))
    if kind in _FLOATS and to not in _FLOATS:
        if len(modes) != 1 or modes[0] not in _ROUND or not is_float(kind):
            return None
        return lambda a: _to_integer(_ROUND[modes[0]](a), dtype)
    if kind not in _FLOATS:
        # numpy rounds a 64-bit integer to the nearest, once.
        return (lambda a: np.asarray(a).astype(dtype)) if modes == ["rn"] and is_float(to) else None
    if to == kind and modes and modes[0] in _ROUND:
        return _ROUND[modes[0]]
    table: dict[tuple[str, ...], Callable] = {
        ("f32", "f16"): floats.from_f16, ("f32", "bf16"): floats.from_bf16,
        ("f64", "f32"): lambda a: np.asarray(a).astype(np.float64),
        ("f32", "f64", "rn"): lambda a: np.asarray(a).astype(np.float32),
        ("f16", "f32", "rn"): floats.to_f16, ("bf16", "f32", "rn"): floats.to_bf16,
        ("tf32", "f32", "rna"): floats.to_tf32,
    }  # fmt: skip
    return table.get((to, kind, *modes))


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What does not fit becomes the nearest that does, NaN zero."""
    limits = np.iinfo(dtype)
    x = np.asarray(x, np.float64)
    inside = (x >= limits.min) & (x < float(limits.max) + 1)
    whole = np.where(inside, x, 0).astype(dtype)
    ends = [dtype.type(limits.min), dtype.type(limits.max)]
    return np.where(inside, whole, np.select([x < 0, x > 0], ends, dtype.type(0)))
