"""Builds of this checkout for Hugging Face's `kernels`, by build.toml: python build_kernel.py OUT

    OUT/build/torch-<backend>/   the package's modules, without its commands and the demo
        metadata.json            the build's id, and the SHA-256 of every file
        fastdpo/                 where older versions of `kernels` look: leads to the modules above

`kernels.get_local_kernel(OUT)` loads the build for the PyTorch that is installed. Its id carries a
hash of the modules, and is what they are imported as: builds of different sources live in one
process. What an earlier run left in a build's folder is replaced.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
# Commands, and what only they use: the Hub asks that a kernel imports nothing beside PyTorch.
LEFT_OUT = {"__main__.py", "cli.py", "demo", "ref_logps.py"}
OLDER = '''\
"""For versions of `kernels` that import a build from here: the package in the folder above."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "{id}", Path(__file__).parent.parent / "__init__.py"
    )
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])


def __getattr__(name):
    return getattr(sys.modules["{id}"], name)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds for Hugging Face's `kernels`.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write build/ in")
    out = parser.parse_args().out
    general = tomllib.loads((ROOT / "build.toml").read_text(encoding="utf-8"))["general"]
    for backend in general["backends"]:
        print(build(out / "build" / f"torch-{backend}", general, backend))


def build(variant: Path, general: dict, backend: str) -> Path:
    """Writes the build for a backend into `variant`, anew, and returns that."""
    package = ROOT / general["name"]
    files = {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in LEFT_OUT
    }
    sources = hashlib.sha256(json.dumps(_digests(files)).encode()).hexdigest()
    name = f"_{general['name']}_{backend}_{sources[:12]}"
    files[f"{general['name']}/__init__.py"] = OLDER.format(id=name).encode()
    metadata = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": _digests(files)},
    }
    files["metadata.json"] = f"{json.dumps(metadata, indent=2)}\n".encode()
    if variant.exists():
        shutil.rmtree(variant)
    for file, content in files.items():
        path = variant / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return variant


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {
        file: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for file, content in files.items()
    }


if __name__ == "__main__":
    main()
