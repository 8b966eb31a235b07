"""What is shipped: the wheel is the package alone, the source distribution can build it and has the
documentation; both have the package's version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastdpo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """dist/ of a copy of the checkout, without the CUDA C++ extension."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("checkout") / "fastdpo"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "bdist_wheel"],
        cwd=folder,
        env={**os.environ, "FASTDPO_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


def test_the_wheel_is_the_package_and_nothing_else(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (metadata,) = (n for n in names if n.endswith("/METADATA"))
        described = wheel.read(metadata).decode()
    assert f"\nVersion: {fastdpo.__version__}\n" in described
    assert {n.split("/")[0] for n in names} == {"fastdpo", metadata.split("/")[0]}
    assert "fastdpo/py.typed" in names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "fastdpo").rglob("*.py")}
    assert sources <= set(names)


def test_the_source_distribution_has_the_documentation_and_the_kernels(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert path.name == f"fastdpo-{fastdpo.__version__}.tar.gz"
    for folder, suffix in (("docs", ".md"), ("examples", ".py"), ("csrc", ".cu")):
        own = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(f"*{suffix}")}
        assert own
        assert own <= names
    for name in ("mkdocs.yml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"):
        assert name in names
    assert not any("__pycache__" in name for name in names)
