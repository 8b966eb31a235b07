"""The documentation tells the truth: tables are the code's, files and names exist."""

from __future__ import annotations

import ast
import builtins
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastdpo.data
import fastdpo.loss
import fastdpo.parallel
from fastdpo.backends import select
from fastdpo.data import load_reference, prepare, reference_logps
from fastdpo.integrations import batches, hf
from fastdpo.integrations.trl import use_fastdpo
from fastdpo.objectives import OBJECTIVES, SequenceLogps, markdown_table, paired, resolve

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TABLE = DOCS / "objectives.md"
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
    assert between(text(TABLE), "objectives") == markdown_table().strip()


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


def test_the_example_of_an_objective_runs():
    sequences = SequenceLogps(torch.randn(6), torch.randn(6), torch.ones(6, dtype=torch.int64))
    options = {"beta": 0.3, "has_reference": True}
    expected = resolve("sigmoid", **options, options={})(sequences)
    try:
        exec(code("../CONTRIBUTING.md", "@objective("), dict(vars(paired)))
        found = resolve("mine", **options, options={"kappa": 0.5})(sequences)
    finally:
        OBJECTIVES.pop("mine", None)
    torch.testing.assert_close(found.loss, expected.loss + 0.5)


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


@pytest.mark.parametrize("kind", ["a list", "a data set"])
def test_the_examples_of_packed_rows_run(kind):
    models = pytest.importorskip("fastdpo.demo.model")
    datasets = pytest.importorskip("datasets")
    tokenizer = models.make_tokenizer(["a b c"])
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 9
    model = models.make_model(tokenizer, 256)
    names = {
        "dataset": rows if kind == "a list" else datasets.Dataset.from_list(rows),
        "tokenizer": tokenizer,
        "model": model,
        "ref_model": models.make_model(tokenizer, 256),
    }
    exec(code("tasks/packed.md", "examples = prepare"), names)
    assert names["out"].chosen_logps.shape == (8,)
    exec(code("tasks/packed.md", "sampler = "), names)
    assert [len(batch["row_lengths"]) for batch in names["loader"]] == [18]
    names["pairs"] = names["examples"]
    exec(code("tasks/packed.md", "for part in micro_batches"), names)


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


# Of libraries; the models, batches and data of an example are the reader's.
LOWER_CASE = {"torch", "nn", "random", "timeit", "get_peft_model", "import_module"}


def offered() -> set[str]:
    modules = (fastdpo, fastdpo.data, fastdpo.parallel, hf)
    return {name for module in modules for name in module.__all__}


def unimported(blocks: list[str]) -> set[str]:
    """Names of classes, libraries and fastdpo's own that blocks use before one of them has them."""
    there, found = set(vars(builtins)), set()
    for block in blocks:
        nodes = list(ast.walk(ast.parse(block)))
        used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        there |= {a.asname or a.name.split(".")[0] for n in nodes for a in getattr(n, "names", ())
                  if isinstance(a, ast.alias)}  # fmt: skip
        there |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        there |= {n.name for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
        if "..." not in block:  # a fragment of a call that stands above
            named = {name for name in used if re.fullmatch(r"[A-Z]+[a-z]\w*|F", name)}
            found |= (named | used & (LOWER_CASE | offered())) - there
    return found


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
def test_its_examples_import_what_they_use(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
    assert not unimported([block for block in blocks if not block.startswith("--8<--")])


def test_a_name_that_nothing_imports_is_found():
    assert unimported(["x = F.pad(labels, (0, 1))"]) == {"F"}
    assert unimported(["trainer = DPOTrainer(model)"]) == {"DPOTrainer"}
    blocks = ["from trl import DPOTrainer", "DPOTrainer(model, torch.ones(2))"]
    assert unimported(blocks) == {"torch"}
    assert unimported(["linear_dpo_loss(hidden, weight, labels)"]) == {"linear_dpo_loss"}
    assert unimported(["linear_dpo_loss(..., beta=0.1)", "import random\nrandom.random()"]) == set()


def test_the_modules_that_docstrings_speak_of_exist():
    missing = set()
    for folder in ("fastdpo", "docs", "csrc", "benchmarks", "tests", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".md", ".cu", ".cuh", ".h", ".cpp"):
                continue
            for name in re.findall(r"`(fastdpo(?:\.\w+)+)`", text(path)):
                if not resolves(name):
                    missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_the_tests_that_pages_and_docstrings_name_exist():
    found = {path: text(path) for path in (ROOT / "tests").rglob("test_*.py")}
    there = {path.stem for path in found}
    there |= {name for whole in found.values() for name in re.findall(r"def (test_\w+)", whole)}
    named = {
        name
        for whole in [*map(text, PAGES), *found.values()]
        for name in re.findall(r"`(test_\w+)`", whole)
    }
    # Of a docstring that gives the beginning of a name alone.
    assert {name for name in named if not any(t.startswith(name) for t in there)} == set()


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        built = name == "fastdpo._cuda"  # where nvcc was
        return built or not (error.name or "").startswith("fastdpo")
    except AttributeError:
        return False
    return True


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
    whole_map = "\n".join(lines)
    modules = [
        path
        for folder in ("", "core", "objectives", "backends", "data", "distributed", "integrations")
        for path in sorted((ROOT / "fastdpo" / folder).glob("*.py"))
        if not path.name.startswith("__")
    ]
    absent = [str(p.relative_to(ROOT)) for p in modules if not re.search(rf"\b{p.name}", whole_map)]
    assert not absent, "CONTRIBUTING.md's map should have them"


def test_each_kernel_has_tests_by_the_name_of_its_primitive():
    """What CONTRIBUTING.md says to run: pytest tests/backends/test_triton_primitives.py -k NAME."""
    tests = text(ROOT / "tests" / "backends" / "test_triton_primitives.py")
    named = re.findall(r"^def test_(\w+)", tests, re.MULTILINE)
    for primitive in select.PREFERENCE:
        assert any(primitive in name for name in named), primitive


if __name__ == "__main__":
    old = text(TABLE)
    begin, end = "<!-- objectives:begin -->", "<!-- objectives:end -->"
    before, rest = old.split(begin)
    new = f"{before}{begin}\n{markdown_table().strip()}\n{end}{rest.split(end)[1]}"
    TABLE.write_text(new, encoding="utf-8")
