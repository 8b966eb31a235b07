"""Options travel as one value: a function below the public surface has few parameters, or says why
it has many.

    def forward(  # many parameters: an operator takes no objects
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 8
# Modules whose functions without an underscore are what users call.
PUBLIC = (
    "fastdpo/loss.py",
    "fastdpo/data/prepare.py",
    "fastdpo/data/reference.py",
    "fastdpo/integrations/hf.py",
    "fastdpo/integrations/liger.py",
)
# A kernel takes numbers and pointers, and a fake has its operator's signature.
DECORATED = ("triton.jit", "register_fake")
REASON = re.compile(r"# many parameters: \w+")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    found = function.args
    names = [a.arg for a in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def offenders(source: str, public: bool) -> list[str]:
    """Functions with more than `MOST` parameters and no reason beside their name."""
    lines, found = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if parameters(node) <= MOST or REASON.search(lines[node.lineno - 1]):
            continue
        surface = public and (node.name == "__init__" or not node.name.startswith("_"))
        decorators = "\n".join(map(ast.unparse, node.decorator_list))
        if not surface and not any(name in decorators for name in DECORATED):
            found.append(f"{node.name} (line {node.lineno}) has {parameters(node)}")
    return found


@pytest.mark.parametrize("folder", ["fastdpo", "benchmarks"])
def test_options_travel_as_one_value(folder):
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if many := offenders(path.read_text(), name in PUBLIC):
            found[name] = many
    assert not found, f"at most {MOST} parameters, or `# many parameters: why` after the name"


def test_a_function_of_many_parameters_is_found():
    many = ", ".join("abcdefghi")
    assert offenders(f"def f({many}): ...", False) == ["f (line 1) has 9"]
    assert offenders(f"def f({many}): ...", True) == []
    assert offenders(f"def _f({many}): ...", True) == ["_f (line 1) has 9"]
    assert offenders(f"class A:\n    def f(self, {many[3:]}): ...", False) == []
    assert offenders(f"def f(  # many parameters: the contract's\n{many}): ...", False) == []
    assert offenders(f"def f(  # many parameters:\n{many}): ...", False) != []
    assert offenders(f"@triton.jit\ndef f({many}): ...", False) == []
