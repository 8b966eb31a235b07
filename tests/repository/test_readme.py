"""The README: short, and what continuous integration and readers take from it is there."""

from __future__ import annotations

import re
from pathlib import Path

import fastdpo
from fastdpo.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES, MOST_WORDS = 130, 900


def test_it_is_short():
    assert len(README.splitlines()) <= MOST_LINES
    assert len(README.split()) <= MOST_WORDS


def test_the_commands_are_marked_for_continuous_integration():
    for name in ("demo-command", "test-command"):
        block = README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
        assert len(re.findall(r"^```sh\n.+\n```$", block.strip(), flags=re.M)) == 1


def test_what_it_imports_exists():
    imported = re.findall(r"^from (fastdpo\S*) import (\w+)$", README, re.MULTILINE)
    assert len(imported) == 3
    for module, name in imported:
        assert hasattr(__import__(module, fromlist=[name]), name), (module, name)


def test_it_counts_the_objectives():
    (count,) = re.findall(r"\[(\d+) objectives\]", README)
    assert int(count) == len(OBJECTIVES)


def test_the_status_stands_high():
    assert README.index("No kernel has run on a GPU yet") < README.index("## Install")


def test_it_is_the_package_that_is_described():
    assert README.startswith(f"# {fastdpo.__name__}\n")
