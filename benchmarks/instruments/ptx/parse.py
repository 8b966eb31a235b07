"""PTX text to instructions: names resolved within their scopes, labels to positions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class Unsupported(Exception):
    """PTX that the executor does not know; it never guesses."""


@dataclass
class Instruction:
    text: str
    opcode: str  # "ld.global.v4.b32"
    operands: list[str]
    guard: str | None = None  # the register of @%p
    negated: bool = False  # @!%p
    target: int | None = None  # where a branch goes

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Variable:
    """Something with an address: a parameter or shared memory."""

    size: int  # bytes; 0: as many as the launch says
    align: int
    offset: int = 0


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name -> "b32", "pred", ...
    instructions: list[Instruction] = field(default_factory=list)
    threads: int | None = None  # what .reqntid demands


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_VARIABLE = re.compile(
    r"\.(?:param|shared)\s+(?:\.align\s+(\d+)\s+)?\.([a-z]+)(\d+)\s+(?:\.ptr.*?)?([\w$]+)"
    r"\s*(?:\[(\d*)\])?$"
)
_NAME = re.compile(r"[%$A-Za-z_][\w$]*(?:\.[xyzw])?")
_LABEL = re.compile(r"\s*([$\w]+)\s*:(?!:)")


def parse(text: str) -> dict[str, Kernel]:
    """The module's kernels by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"\.section\s+\.\w+\s*\{[^}]*\}", "", text)
    text = re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*$", "", text, flags=re.M)
    outside, kernels = {}, {}
    for match in re.finditer(r"\.extern\s+(\.shared[^;]*);", text):
        name, variable = _variable(match[1])
        outside[name] = variable
    heads = r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{"
    for match in re.finditer(heads, text, flags=re.DOTALL):
        kernel = Kernel(match[1], shared=dict(outside))
        end = 0
        for parameter in filter(str.strip, match[2].split(",")):
            name, variable = _variable(parameter.strip())
            variable.offset = -(-end // variable.align) * variable.align
            end = variable.offset + variable.size
            kernel.parameters[name] = variable
        if wanted := re.search(r"\.reqntid\s+(\d+)", match[3]):
            kernel.threads = int(wanted[1])
        _Body(kernel).read(_statements(text, match.end()))
        kernels[kernel.name] = kernel
    return kernels


def _variable(text: str) -> tuple[str, Variable]:
    match = _VARIABLE.match(text.strip())
    if match is None:
        raise Unsupported(f"declaration: {text}")
    align, _kind, bits, name, count = match.groups()
    size = SIZES[bits]
    number = 1 if count is None else int(count or 0)
    return name, Variable(size * number, int(align or size))


def _statements(text: str, at: int) -> Iterator[str]:
    """What lies between braces and semicolons, and the braces of scopes themselves."""
    start, vector = at, 0
    for match in re.compile(r"[{};]").finditer(text, at):
        mark = match[0]
        before = text[start : match.start()].strip()
        if mark == "{" and _LABEL.sub("", before):
            vector += 1
        elif mark == "}" and vector:
            vector -= 1
        elif mark == ";":
            if vector == 0:
                yield before
                start = match.end()
        else:
            if before:
                yield before  # a label
            yield mark
            start = match.end()


class _Body:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]  # names as written -> names as kept
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[Instruction, list[dict[str, str]]]] = []
        self.opened = 0

    def read(self, statements: Iterator[str]) -> None:
        for statement in statements:
            if statement == "{":
                self.opened += 1
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
                if not self.scopes:
                    break
            else:
                self._statement(statement)
        for instruction, scopes in self.branches:
            label = instruction.operands[-1]
            kept = next(scope[label] for scope in reversed(scopes) if label in scope)
            instruction.target = self.labels[kept]

    def _statement(self, text: str) -> None:
        while match := _LABEL.match(text):
            kept = f"{match[1]}@{self.opened}"
            self.scopes[-1][match[1]] = kept
            self.labels[kept] = len(self.kernel.instructions)
            text = text[match.end() :]
        text = " ".join(text.split())
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            name, variable = _variable(text)
            self.kernel.shared[name] = variable
        elif text.startswith("."):
            raise Unsupported(text)
        else:
            self._instruction(text)

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if match is None:
            raise Unsupported(text)
        for name in match[2].split(","):
            name = name.strip()
            many = re.match(r"(.*)<(\d+)>$", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for one in names:
                kept = one if len(self.scopes) == 1 else f"{one}@{self.opened}"
                self.kernel.registers[kept] = match[1]
                self.scopes[-1][one] = kept

    def _instruction(self, text: str) -> None:
        match = re.match(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)$", text)
        if match is None:
            raise Unsupported(text)
        bang, guard, opcode, rest = match.groups()
        branch = opcode.split(".")[0] == "bra"
        operands = [part if branch else self._resolve(part) for part in split_operands(rest)]
        instruction = Instruction(
            text, opcode, operands, None if guard is None else self._resolve(guard), bang == "!"
        )
        if branch:
            self.branches.append((instruction, list(self.scopes)))
        self.kernel.instructions.append(instruction)

    def _resolve(self, operand: str) -> str:
        def kept(match: re.Match[str]) -> str:
            for scope in reversed(self.scopes):
                if match[0] in scope:
                    return scope[match[0]]
            return match[0]

        return _NAME.sub(kept, operand)


def split_operands(text: str) -> list[str]:
    """At the commas outside of brackets and braces; spaces go."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        elif not char.isspace():
            current += char
    return [*parts, current] if current else parts
