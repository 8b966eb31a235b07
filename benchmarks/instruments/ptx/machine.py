"""Runs a kernel's PTX: a grid's blocks one after another, a block's threads side by side.

Every register is one numpy array over the threads of a block. Threads that stand at the same
instruction execute it together; of several groups the one furthest back goes first, so that
branches join again as early as they can. Blocks come in an order shuffled by the seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from benchmarks.instruments.ptx.faults import Divergence, Fault, Race
from benchmarks.instruments.ptx.memory import Global, Shared
from benchmarks.instruments.ptx.order import WARP, Order
from benchmarks.instruments.ptx.parse import SIZES, Instruction, Kernel, Unsupported

DTYPES: dict[str, Any] = {"pred": np.bool_, "f32": np.float32, "f64": np.float64}
for _bits, _size in SIZES.items():
    if _size <= 8:
        DTYPES |= {f"{_kind}{_bits}": np.dtype(f"u{_size}") for _kind in "bu"}
        DTYPES[f"s{_bits}"] = np.dtype(f"i{_size}")
# 16-bit floats are kept as bits, as are pairs of them.
DTYPES |= {"f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}
DTYPES |= {"tf32": np.uint32}

MOST_STEPS = 20_000_000  # of one block: more is a loop that does not end

PARAMETERS = 0x7F00 << 32  # generic addresses of parameters, and of shared memory
SHARED = 0x7E00 << 32
_NAN = 0xFFF5FFF5FFF5FFF5

T = TypeVar("T")
Mask = np.ndarray | None  # which threads take part; None: all
Run = Callable[[Mask], Any]


@dataclass
class Step:
    """An instruction with its operands bound to this machine's registers."""

    run: Run
    kind: str = "plain"  # or "branch", "exit", "barrier", "wait"
    guard: np.ndarray | None = None
    negated: bool = False
    instruction: Instruction | None = None


Builder = Callable[["Machine", Instruction], Run | Step]
BUILDERS: dict[str, Builder] = {}


def builds(*roots: str) -> Callable[[Builder], Builder]:
    """Registers the decorated function for opcodes that begin with one of the roots."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(roots, builder))
        return builder

    return register


class Machine:
    """A kernel ready to be launched, any number of times."""

    def __init__(self, kernel: Kernel, threads: int, *, shared_bytes: int = 0) -> None:
        """`shared_bytes`: of the shared memory that the launch adds."""
        if kernel.threads not in (None, threads):
            raise ValueError(f"{kernel.name} wants {kernel.threads} threads, not {threads}")
        self.kernel, self.threads = kernel, threads
        self.order = Order(threads)
        self.shared = Shared(self._place_shared(shared_bytes), self.order)
        self.everyone = np.arange(threads)
        self.registers = {
            name: np.zeros(threads, np.bool_ if kind == "pred" else DTYPES[f"b{kind[1:]}"])
            for name, kind in kernel.registers.items()
        }
        self.numbers = [r for name, r in self.registers.items() if not name.startswith("%p")]
        self.special = self._special()
        self.warp_of = self.everyone // WARP
        self.warp_sizes = np.bincount(self.warp_of)
        self.memory = Global([])
        self.parameters = np.zeros(0, np.uint8)
        self.descriptors: dict[int, Any] = {}  # by generic address
        self._kept: dict[type, Any] = {}
        self.deliver: list[Callable[[], bool]] = []  # each may finish something asynchronous
        self.resets: list[Callable[[], None]] = []  # called before each block
        self.changed = False  # something that threads wait for
        self.steps = [self._bind(instruction) for instruction in kernel.instructions]
        self.covered = np.zeros(len(self.steps), bool)  # which have been executed

    def launch(
        self,
        memory: Global,
        parameters: np.ndarray,  # bytes, laid out as `kernel.parameters` say
        grid: tuple[int, ...],
        *,
        seed: int = 0,  # 0: blocks in order
        descriptors: dict[int, Any] | None = None,
    ) -> None:
        self.memory, self.parameters = memory, parameters
        self.descriptors = descriptors or {}
        self.grid = (*grid, 1, 1)[:3]
        for axis, count in zip("xyz", self.grid, strict=True):
            self.special[f"%nctaid.{axis}"].fill(count)
        self.random = np.random.default_rng(seed)
        self.shuffled = seed != 0
        memory.begin(self.order)
        count = int(np.prod(self.grid))
        with np.errstate(all="ignore"):
            for block in self.random.permutation(count) if self.shuffled else range(count):
                self._run_block(int(block))

    def kept(self, group: type[T]) -> T:
        """What a group of instructions keeps between them: one of its class for each machine."""
        if group not in self._kept:
            self._kept[group] = group(self)
        return self._kept[group]

    # ---- Operands

    def read(self, operand: str, kind: str) -> Any:
        """A view of a register's bits as `kind`, or a number of that type."""
        dtype = np.dtype(DTYPES[kind])
        if operand.startswith("!"):
            raise Unsupported(f"operand {operand}")
        register = self.registers.get(operand, self.special.get(operand))
        if register is not None:
            if register.dtype == dtype:
                return register
            if register.dtype == np.bool_ or dtype == np.bool_:
                raise Unsupported(f"{operand} as {kind}")
            ratio = register.itemsize // dtype.itemsize
            if ratio == 0:
                raise Unsupported(f"{operand} as {kind}")
            return register.view(dtype)[::ratio]
        if (address := self.symbol(operand)) is not None:
            return dtype.type(address)
        return _number(operand, dtype)

    def write(self, operand: str, kind: str) -> Callable[[Any, Mask], None]:
        """Puts results into a register, extended by their sign or zeros where it is wider."""
        if operand == "_":
            return lambda result, mask: None
        if operand not in self.registers:
            raise Unsupported(f"destination {operand}")
        register = self.registers[operand]
        dtype = np.dtype(DTYPES[kind])
        if register.itemsize > dtype.itemsize:
            if dtype.kind == "f" or register.dtype == np.bool_:
                raise Unsupported(f"{kind} into {operand}")
            dtype = np.dtype(f"{dtype.kind}{register.itemsize}")
        view = register.view(dtype)

        def put(result: Any, mask: Mask) -> None:
            if mask is None:
                view[...] = result
            else:
                np.copyto(view, result, where=mask, casting="unsafe")

        return put

    def predicate(self, operand: str) -> Callable[[], Any]:
        if operand.startswith("!"):
            register = self.registers[operand[1:]]
            return lambda: ~register
        view = self.read(operand, "pred")
        return lambda: view

    def address(self, operand: str) -> Callable[[np.ndarray], np.ndarray]:
        """[register or name + offset], for the threads that are asked for."""
        match = re.fullmatch(r"\[([%$\w@]+)(?:\+(-?\w+))?\]", operand)
        if match is None:
            raise Unsupported(f"address {operand}")
        offset = np.uint64(int(match[2] or "0", 0) & (2**64 - 1))
        if match[1] in self.registers:
            register = self.registers[match[1]]
            return lambda some: register[some].astype(np.uint64) + offset
        symbol = self.symbol(match[1])
        if symbol is None:
            raise Unsupported(f"address {operand}")
        return lambda some: np.full(len(some), symbol, np.uint64) + offset

    def parameter(self, operand: str) -> int | None:
        """Where [name + offset] is among the parameters; None for what a register says."""
        name, _, offset = operand.strip("[]").partition("+")
        if name not in self.kernel.parameters:
            return None
        return self.kernel.parameters[name].offset + int(offset or "0", 0)

    def symbol(self, name: str) -> int | None:
        if name in self.kernel.parameters:
            return self.kernel.parameters[name].offset
        if name in self.kernel.shared:
            return Shared.BASE + self.kernel.shared[name].offset
        return None

    def some(self, mask: Mask) -> np.ndarray:
        """The threads of a mask, by number."""
        return self.everyone if mask is None else np.flatnonzero(mask)

    def whole_warps(self, some: np.ndarray) -> np.ndarray:
        """The warps of these threads; every thread of a warp must be among them."""
        warps = np.bincount(self.warp_of[some], minlength=len(self.warp_sizes))
        if ((warps != 0) & (warps != self.warp_sizes)).any():
            raise Divergence("threads of one warp are elsewhere")
        return np.flatnonzero(warps)

    # ---- Execution

    def _run_block(self, block: int) -> None:
        self.block = block
        x, y, _ = self.grid
        for axis, place in zip("xyz", (block % x, block // x % y, block // (x * y)), strict=True):
            self.special[f"%ctaid.{axis}"].fill(place)
        for register in self.numbers:
            # NaN, as a number of any width: nothing may depend on what was there before.
            register.fill(_NAN & (2 ** (8 * register.itemsize) - 1))
        self.shared.new_block(self.random)
        self.order.new_block()
        for reset in self.resets:
            reset()
        self.groups: dict[int, np.ndarray] = {0: np.ones(self.threads, bool)}
        self.stalled: dict[int, np.ndarray] = {}
        self.waiting: dict[int, np.ndarray] = {}
        self.resume = np.zeros(self.threads, np.int64)
        self.left = MOST_STEPS
        while self._wake():
            at = min(self.groups)
            self._advance(at, self.groups.pop(at))
        if self.shared.flying.any() or self.shared.leaving.any():
            raise Race(f"block {block} ends while copies of shared memory are under way")

    def _wake(self) -> bool:
        """Whether somebody can go on."""
        if self.groups:
            return True
        if self.stalled:
            finished = [deliver() for deliver in self.deliver]
            if any(finished) or self.changed:
                self.changed = False
                self.groups, self.stalled = self.stalled, {}
                return True
        held = {**self.stalled, **self.waiting}
        if held:
            counts = ", ".join(str(int(mask.sum())) for mask in held.values())
            raise Divergence(f"block {self.block}: {counts} threads wait for ever")
        return False

    def _join(self, at: int, mask: np.ndarray) -> None:
        if mask.any():
            self.groups[at] = self.groups[at] | mask if at in self.groups else mask

    def _advance(self, at: int, mask: np.ndarray) -> None:
        """Runs a group until it meets another, branches, waits or ends."""
        limit = min(self.groups, default=-1)
        full = bool(mask.all())
        while at != limit:
            step = self.steps[at]
            self.left -= 1
            if self.left == 0:
                raise Divergence(f"block {self.block} does not end")
            self.covered[at] = True
            active: Mask = None if full else mask
            if step.guard is not None:
                active = mask & (~step.guard if step.negated else step.guard)
                count = np.count_nonzero(active)
                if count == self.threads:
                    active = None
                elif count == 0:
                    at += 1
                    continue
            try:
                result = step.run(active)
            except Fault as fault:
                text = step.instruction.text
                raise type(fault)(f"block {self.block}, {text}\n{fault}") from fault
            if step.kind == "plain":
                at += 1
                continue
            took = np.ones(self.threads, bool) if active is None else active
            if step.kind == "branch":
                self._join(step.instruction.target, took)
            elif step.kind == "barrier":
                self._arrive(result, took, at)
            elif step.kind == "wait":
                self._join(at + 1, took & result)
                stalled = took & ~result
                if stalled.any():
                    self.stalled[at] = self.stalled.get(at, False) | stalled
            self._join(at + 1, mask & ~took)
            return
        self._join(at, mask)

    def _arrive(self, what: tuple[int, int | None, bool], took: np.ndarray, at: int) -> None:
        """A block's barrier: (id, how many threads it is for, whether these wait)."""
        name, count, waits = what
        waiting = self.waiting.get(name, np.zeros(self.threads, bool)) | took
        self.resume[took] = at + 1 if waits else -1
        self.waiting[name] = waiting
        if not waits:
            self._join(at + 1, took)
        if waiting.sum() == (self.threads if count is None else count):
            del self.waiting[name]
            self.order.barrier(waiting)
            resume = np.where(waiting, self.resume, -1)
            for place in set(resume.tolist()) - {-1}:
                self._join(place, resume == place)

    # ---- Preparation

    def _bind(self, instruction: Instruction) -> Step:
        root = instruction.parts[0]
        if instruction.opcode.startswith("cp.async.bulk"):
            root = "cp.async.bulk"
        if root not in BUILDERS:
            raise Unsupported(instruction.text)
        try:
            built = BUILDERS[root](self, instruction)
        except (KeyError, IndexError, ValueError, Unsupported) as error:
            raise Unsupported(f"{instruction.text} ({error})") from error
        step = built if isinstance(built, Step) else Step(built)
        step.instruction, step.negated = instruction, instruction.negated
        if instruction.guard is not None:
            step.guard = self.registers[instruction.guard]
        return step

    def _place_shared(self, extra: int) -> int:
        at = 0
        for variable in self.kernel.shared.values():
            # The launch's own memory is aligned as hardware's asynchronous copies need it.
            align = variable.align if variable.size else 1024
            variable.offset = -(-at // align) * align
            at = variable.offset + (variable.size or extra)
        return at

    def _special(self) -> dict[str, np.ndarray]:
        def constant(value: int) -> np.ndarray:
            return np.full(self.threads, value, np.uint32)

        found = {"%tid.x": self.everyone.astype(np.uint32), "%tid.y": constant(0)}
        found |= {"%tid.z": constant(0), "%ntid.x": constant(self.threads)}
        found |= {"%ntid.y": constant(1), "%ntid.z": constant(1)}
        found["%laneid"] = (self.everyone % WARP).astype(np.uint32)
        found["%warpid"] = (self.everyone // WARP).astype(np.uint32)
        for axis in "xyz":
            found |= {f"%nctaid.{axis}": constant(1), f"%ctaid.{axis}": constant(0)}
        return found


def _number(text: str, dtype: np.dtype) -> Any:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        bits = np.uint32(int(match[1], 16)) if match[1] else np.uint64(int(match[2], 16))
        if bits.itemsize != dtype.itemsize:
            raise Unsupported(f"number {text}")
        return bits.view(dtype)
    if dtype.kind == "f":
        return dtype.type(float(text))
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.bool_(value)
    bits = np.dtype(f"u{dtype.itemsize}").type(value & (2 ** (8 * dtype.itemsize) - 1))
    return bits.view(dtype)
