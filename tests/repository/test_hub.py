"""Builds for Hugging Face's `kernels`: loaded offline, beside the installed package and each other.

Without `kernels` the tests that load builds are skipped; those that read the sources run anywhere.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastdpo
from fastdpo.names import namespace

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "fastdpo").rglob("*.py"))
REPOSITORY, COMMIT = "somebody/fastdpo", "0123456789abcdef0123456789abcdef01234567"
MISSING = "needs Hugging Face's kernels: python -m pip install 'kernels>=0.17,<0.18'"


def build(checkout: Path, out: Path) -> Path:
    subprocess.run([sys.executable, checkout / "build_kernel.py", out], check=True)
    return out


def variant(out: Path) -> Path:
    name = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    return out / "build" / f"torch-{name}"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return pytest.importorskip("kernels", minversion="0.17", reason=MISSING)


@pytest.fixture(scope="module")
def copy(kernels, out) -> ModuleType:
    return kernels.get_local_kernel(out)


@pytest.fixture(scope="module")
def later(kernels, tmp_path_factory) -> ModuleType:
    """The build of other sources, that say another version."""
    checkout = tmp_path_factory.mktemp("later")
    shutil.copytree(ROOT / "fastdpo", checkout / "fastdpo")
    for name in ("build.toml", "build_kernel.py"):
        shutil.copy(ROOT / name, checkout)
    face = checkout / "fastdpo" / "__init__.py"
    face.write_text(face.read_text().replace(fastdpo.__version__, "99.0"))
    return kernels.get_local_kernel(build(checkout, checkout / "out"))


# ---- What the sources may say


def test_no_module_names_its_package_or_a_namespace():
    """In an import, in an argument of import_module and the like, or in an operator's name."""
    assert ROOT / "fastdpo" / "names.py" in SOURCES
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if any(name.split(".")[0] == "fastdpo" for name in imported(node)) or operator(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


def imported(node: ast.AST) -> list[str]:
    """The absolute names that are imported here, as far as the text says."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module]
    if isinstance(node, ast.Call) and "module" in ast.unparse(node.func).split(".")[-1]:
        return [text for text in map(leading_text, node.args) if text]
    return []


def operator(node: ast.AST) -> bool:
    """Whether this is an operator's name in a fixed namespace, or its use."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"fastdpo\w*::\w+", node.value) is not None
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.fastdpo")


def leading_text(node: ast.expr) -> str | None:
    node = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    text = getattr(node, "value", None)
    return text if isinstance(text, str) else None


def test_a_name_has_a_namespace_of_its_own():
    names = [
        "fastdpo",
        "_fastdpo_cuda_0123456789ab",
        "_fastdpo_cpu_0123456789ab",
        "fastdpo_cuda",  # a namespace of the installed package
        "fastdpo_triton",
        "vendor.fastdpo",
        "vendor_fastdpo",
        "fastdpo-2",
        "fastdpo_2",
    ]
    all_of_them = [f"{namespace(name)}{end}" for name in names for end in ("", "_triton", "_cuda")]
    assert len(set(all_of_them)) == len(all_of_them)
    assert all(name.isidentifier() for name in all_of_them)
    assert [namespace(name) for name in names[:3]] == names[:3]


# ---- What a build is


def test_a_build_has_every_module_that_it_imports_and_nothing_else(out):
    folder = variant(out)
    built = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"__init__.py", "loss.py", "metadata.json", "fastdpo/__init__.py"} <= built
    assert not [name for name in built if name.startswith("demo/") or name == "cli.py"]
    assert all(name.endswith(".py") for name in built - {"metadata.json"})
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                there = base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()
                assert there, f"{path}:{node.lineno}"


def test_a_second_run_leaves_nothing_of_the_first(out, tmp_path):
    build(ROOT, tmp_path)
    (variant(tmp_path) / "stale.py").touch()
    build(ROOT, tmp_path)
    first, second = (
        {path.relative_to(top): path.read_bytes() for path in variant(top).rglob("*.*")}
        for top in (out, tmp_path)
    )
    first, second = ({k: v for k, v in f.items() if k.suffix != ".pyc"} for f in (first, second))
    assert first == second


def test_kernels_reads_the_configuration_and_the_metadata(kernels, out, tmp_path):
    rust = import_module("kernels._rust")
    backends = [str(backend).lower() for backend in rust.Build.open(ROOT).general.backends]
    folders = sorted(path.name for path in (out / "build").iterdir())
    assert folders == sorted(f"torch-{backend}" for backend in backends)
    for folder in (out / "build").iterdir():
        metadata = kernels.Metadata.read_from_file(folder / "metadata.json")
        assert (str(metadata.name), metadata.version) == ("fastdpo", 0)
        assert str(metadata.backend.backend_type).lower() == folder.name.removeprefix("torch-")
        clean = shutil.ignore_patterns("__pycache__")
        copied = shutil.copytree(folder, tmp_path / folder.name, ignore=clean)
        found = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, copied)
        metadata.digest.validate(found)
        (copied / "loss.py").write_text("")
        found = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, copied)
        with pytest.raises(rust.DigestValidationError):
            metadata.digest.validate(found)


# ---- What a loaded build computes


def step(package: ModuleType, backend: str, compiled: bool = False) -> list[torch.Tensor]:
    """The loss, its rewards and the gradients of one seeded batch."""
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(4, 5, 16, generator=generator) for _ in range(2))
    weight, ref_weight = (torch.randn(40, 16, generator=generator) for _ in range(2))
    labels = torch.randint(40, (4, 5), generator=generator)
    labels[1, 3:] = -100
    hidden.requires_grad_()
    weight.requires_grad_()

    linear_dpo_loss = package.linear_dpo_loss

    def loss(hidden, weight):
        out = linear_dpo_loss(
            hidden,
            weight,
            labels,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            backend=backend,
        )
        return out.loss, out.chosen_rewards, out.rejected_rewards

    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, *rewards = loss(hidden, weight)
    value.backward()
    return [value.detach(), *rewards, hidden.grad, weight.grad]


def operators(run) -> set[str]:
    """The namespaces of fastdpo's operators that `run` calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    spaces = {event.name.split("::")[0] for event in profiled.events() if "::" in event.name}
    return {space for space in spaces if "fastdpo" in space}


def modules(package: ModuleType) -> list[ModuleType]:
    begin = f"{package.__name__}."
    return [module for name, module in list(sys.modules.items()) if name.startswith(begin)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_build_gives_the_bits_of_the_installed_package(copy, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    assert copy.linear_dpo_loss is not fastdpo.linear_dpo_loss
    for ours, theirs in zip(step(fastdpo, backend), step(copy, backend), strict=True):
        assert torch.equal(ours, theirs)


def test_builds_live_in_one_process_with_the_installed_package(copy, later, out):
    """Each traced in full by torch.compile, with the operators of its own."""
    results: dict[str, list[torch.Tensor]] = {}
    for package in (fastdpo, copy, later):
        name = package.__name__
        used = operators(lambda p=package, n=name: results.update({n: step(p, "torch", True)}))
        assert used == {name}  # a build's id, as the Hub asks
    expected = results.pop("fastdpo")
    for found in results.values():
        for ours, theirs in zip(expected, found, strict=True):
            assert torch.equal(ours, theirs)
    assert len(results) == 2
    assert (copy.__version__, later.__version__) == (fastdpo.__version__, "99.0")
    assert {Path(module.__file__).is_relative_to(out) for module in modules(copy)} == {True}


def test_every_module_of_a_build_can_be_imported(copy, out):
    pytest.importorskip("transformers")
    pytest.importorskip("trl")
    folder = variant(out)
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__")
        module = import_module(f"{copy.__name__}.{name}".rstrip("."))
        assert name == "fastdpo." or Path(module.__file__) == path
    assert import_module(f"{copy.__name__}.integrations.hf").dpo_loss.__module__ != "fastdpo"
    assert {Path(module.__file__).is_relative_to(out) for module in modules(copy)} == {True}


def test_a_build_from_the_cache_is_found_by_its_lock(kernels, out, copy, monkeypatch, tmp_path):
    """`load_kernel` and `get_kernel`, as they find a published kernel without a network."""
    snapshot = tmp_path / "kernels--somebody--fastdpo" / "snapshots" / COMMIT
    shutil.copytree(out / "build", snapshot / "build")
    rust = import_module("kernels._rust")
    locked = rust.KernelDependency(REPOSITORY, rust.KernelVersion.Version(0))
    lock = tmp_path / "kernels.lock"
    lock.write_text(rust.KernelLocks({locked: rust.KernelLock(COMMIT)}).to_json())
    monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    loaded = kernels.load_kernel(REPOSITORY, lockfile=lock)
    assert Path(loaded.__file__).is_relative_to(snapshot)
    assert loaded.__name__ == copy.__name__  # the same sources, from another place
    assert loaded.linear_dpo_loss is copy.linear_dpo_loss

    monkeypatch.setenv("LOCAL_KERNELS", f"{REPOSITORY}={out}")
    assert kernels.get_kernel(REPOSITORY, version=0) is copy


def test_older_versions_of_kernels_find_the_package_in_its_folder(out, tmp_path):
    """They import the folder `fastdpo` of a build, under a name of their own; in a process of its
    own, where nothing has imported the build."""
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastdpo_of_theirs", sys.argv[1])
package = sys.modules["fastdpo_of_theirs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
print(package.__version__, package.linear_dpo_loss.__module__, "fastdpo" in sys.modules)
"""
    command = [sys.executable, "-c", script, variant(out) / "fastdpo" / "__init__.py"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    name = json.loads((variant(out) / "metadata.json").read_text())["id"]
    assert ran.stdout.split() == [fastdpo.__version__, f"{name}.loss", "False"]
