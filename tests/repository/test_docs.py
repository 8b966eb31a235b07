"""The documentation tells the truth: tables are the code's, files and names exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastdpo.loss
from fastdpo.data import load_reference, prepare, reference_logps
from fastdpo.integrations import batches, hf
from fastdpo.integrations.trl import use_fastdpo
from fastdpo.objectives import markdown_table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OBJECTIVES = DOCS / "objectives.md"
PAGES = sorted(
    [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
)
# Macros of csrc, which are no environment variables.
MACROS = {"FASTDPO_MODULE", "FASTDPO_SHARED", "FASTDPO_PTX_ARCHS", "FASTDPO_SASS_ARCHS"}


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def between(whole: str, name: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert whole.count(begin) == whole.count(end) == 1
    return whole.split(begin)[1].split(end)[0].strip()


def test_the_table_of_objectives_is_current():
    """Renew it with: python tests/repository/test_docs.py"""
    assert between(text(OBJECTIVES), "objectives") == markdown_table().strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_files_it_speaks_of_exist(page):
    folders = r"fastdpo|tests|benchmarks|csrc|docs|examples|\.ci|\.github"
    for path in re.findall(rf"(?<![\w./])((?:{folders})/[\w./*-]+\.\w+)", text(page)):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_its_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s:#]+)(?:#[^)]*)?\)", text(page)):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_its_imports_work(page):
    for module, names in re.findall(r"^from (fastdpo\S*) import ([\w, ]+)", text(page), re.M):
        loaded = __import__(module, fromlist=["_"])
        for name in names.split(","):
            assert hasattr(loaded, name.strip()), (module, name)


def test_every_environment_variable_is_in_the_table():
    read = set()
    for folder in ("fastdpo", "benchmarks", "csrc", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".sh"):
                read |= set(re.findall(r"FASTDPO_[A-Z0-9_]+[A-Z0-9]", text(path)))
    read |= set(re.findall(r"FASTDPO_[A-Z0-9_]+[A-Z0-9]", text(ROOT / "setup.py")))
    listed = set(re.findall(r"^\| `(FASTDPO_\w+)` \|", text(DOCS / "environment.md"), re.MULTILINE))
    assert listed == read - MACROS


PUBLIC = [
    *(getattr(fastdpo.loss, name) for name in fastdpo.loss.__all__ if name in fastdpo.__all__),
    *(getattr(hf, name) for name in ("dpo_loss", "sequence_logps")),
    use_fastdpo,
    prepare,
    reference_logps,
    load_reference,
]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_every_argument_of_a_public_function_is_described(function):
    """In an entry that the documentation's parser reads: its names on one line."""
    described = inspect.getdoc(function).split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    ([\w*][\w*, ]*):", described, re.MULTILINE)
    names = {name.strip().lstrip("*") for entry in entries for name in entry.split(",")}
    assert names == set(inspect.signature(function).parameters)


def code(page: str, containing: str) -> str:
    """The Python block of the page that has such a line."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text(DOCS / page), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


def test_the_quickstart_runs(capsys):
    names: dict[str, torch.Tensor] = {}
    exec(code("quickstart.md", "torch.randn"), names)
    assert names["out"].loss.isfinite()
    assert names["weight"].grad.shape == names["weight"].shape
    assert capsys.readouterr().out.startswith("tensor(")


def test_the_example_of_preparing_data_runs():
    tokenizers = pytest.importorskip("fastdpo.demo.model")
    datasets = pytest.importorskip("datasets")
    says = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [says[0], {"role": "assistant", "content": "c"}]
    rows = [{"chosen": says, "rejected": other}, {"chosen": says, "rejected": says}]
    names = {
        "dataset": datasets.Dataset.from_list(rows),
        "tokenizer": tokenizers.make_tokenizer(["a b c"]),
    }
    exec(code("tasks/data.md", "prepare(dataset"), names)
    assert len(names["pairs"]) == 1


def test_the_example_of_a_kept_reference_runs(tmp_path, monkeypatch):
    models = pytest.importorskip("fastdpo.demo.model")
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = models.make_tokenizer(["a b c"])
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 3
    model = models.make_model(tokenizer, 256)
    names = {"dataset": rows, "tokenizer": tokenizer, "model": model, "policy": model}
    exec(code("tasks/reference.md", "pairs = prepare(dataset"), names)
    first = names["rows"].to_list()
    exec(code("tasks/reference.md", "model=policy"), names)
    assert names["rows"].to_list() == first
    assert len(first) == 3


def test_the_labels_of_a_packed_batch_are_those_of_a_padded_one():
    ids = torch.randint(0, 50, (4, 7))
    keep = torch.rand(4, 7) > 0.4
    ends = torch.arange(5) * 7
    names = {"ids": ids.flatten(), "keep": keep.flatten(), "cu_seqlens": ends.int()}
    exec(code("tasks/packed.md", "labels[:-1]"), names)
    padded = batches.shifted_labels(torch.where(keep, ids, -100))
    assert torch.equal(names["labels"].view(4, 7), padded)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_its_python_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL):
        if not block.startswith("--8<--"):  # a file, which is run elsewhere
            ast.parse(block)


def refused_arguments() -> set[str]:
    """The arguments that the package's `fail(argument, should, got)` names, where they are
    written out."""
    found = set()
    for path in (ROOT / "fastdpo").rglob("*.py"):
        for node in ast.walk(ast.parse(text(path))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            first = node.args[0]
            if name == "fail" and isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found


def test_every_argument_that_is_refused_is_in_troubleshooting():
    found = refused_arguments()
    assert {"labels", "row_index", "backend"} <= found  # it sees the package's checks
    page = text(DOCS / "troubleshooting.md")
    missing = {name for name in found if f"`{name}`" not in page}
    assert not missing, "docs/troubleshooting.md should say what to change for these arguments"


def test_the_citations_of_the_design_are_sections_of_it():
    sections = set(re.findall(r"^#+ (.+)$", text(DOCS / "design.md"), re.MULTILINE))
    cited = []
    for folder in ("fastdpo", "csrc", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            whole = re.sub(r"\s*\n(?:# ?)?\s*", " ", text(path))
            cited += re.findall(r'docs/design\.md, "([^"]+)"', whole)
            assert not re.search(r"\bDESIGN \d", whole), path
    assert cited
    assert set(cited) <= sections


def test_the_map_of_the_house_is_the_house():
    whole = text(ROOT / "CONTRIBUTING.md")
    lines = whole.split("<!-- map -->")[1].split("<!-- /map -->")[0].splitlines()
    folders: list[str] = []
    named = []
    for line in lines:
        entry = re.match(r"^( *)([\w.]+/?)(?:, |  |$)", line)
        if entry is None:
            continue
        depth = (len(entry[1]) - 4) // 2
        folders = [*folders[:depth], entry[2]]
        named.append("".join(folders[:-1]) + entry[2])
    assert len(named) > 30
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, "CONTRIBUTING.md's map names what is not there"


if __name__ == "__main__":
    old = text(OBJECTIVES)
    begin, end = "<!-- objectives:begin -->", "<!-- objectives:end -->"
    before, rest = old.split(begin)
    new = f"{before}{begin}\n{markdown_table().strip()}\n{end}{rest.split(end)[1]}"
    OBJECTIVES.write_text(new, encoding="utf-8")
