"""The README tells the truth: the table of objectives is the registry's, and its names exist."""

from __future__ import annotations

import re
from pathlib import Path

import fastdpo.loss
from fastdpo.objectives import markdown_table

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert README.count(begin) == README.count(end) == 1
    return README.split(begin)[1].split(end)[0].strip()


def test_the_table_of_objectives_is_current():
    """Renew it with: python tests/test_readme.py"""
    assert between("objectives") == markdown_table().strip()


def test_the_names_of_the_public_functions_exist():
    for name in re.findall(r"`fastdpo\.loss\.(\w+)`", README):
        assert name in fastdpo.loss.__all__


def test_the_files_it_speaks_of_exist():
    root = Path(__file__).parent.parent
    for path in re.findall(r"`((?:fastdpo|tests|benchmarks|csrc)/[\w./]+\.\w+)", README):
        assert (root / path).exists(), path


def test_the_commands_are_marked_for_continuous_integration():
    for name in ("demo-command", "test-command"):
        block = README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
        assert len(re.findall(r"^```sh\n.+\n```$", block.strip(), flags=re.M)) == 1


if __name__ == "__main__":
    current = between("objectives")
    new = README.replace(
        f"<!-- objectives:begin -->\n{current}" if current else "<!-- objectives:begin -->",
        f"<!-- objectives:begin -->\n{markdown_table().strip()}",
    )
    (Path(__file__).parent.parent / "README.md").write_text(new, encoding="utf-8")
