"""Compiles csrc/ for the CPU: the same kernels, launchers and bindings over this folder's runtime.

The module is built once per state of the sources into build/host*/ and found there again. With
`sanitize`, AddressSanitizer and UndefinedBehaviorSanitizer are in it, and the process that imports
it needs `sanitizer_environment()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MODULE = "_cuda_host"
ARCHITECTURES = ("80,86,90", "90")  # SASS and PTX that the stand-in claims to be built for

_FLAGS = [
    "-std=c++17",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
]
_SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]


def missing() -> str | None:
    """Why the host build is impossible here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def build(*, sanitize: bool = False) -> Path:
    """The path of the compiled module; RuntimeError with the compiler's words where it fails."""
    import pybind11

    includes = [HERE / "include", ROOT / "csrc"]
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*_FLAGS, *(["-O1", *_SANITIZE] if sanitize else ["-O2"])]
    flags += [f"-DFASTDPO_MODULE={MODULE}"]
    flags += [f"-DFASTDPO_SASS_ARCHS={ARCHITECTURES[0]}", f"-DFASTDPO_PTX_ARCHS={ARCHITECTURES[1]}"]
    flags += [f"-I{path}" for path in includes] + [f"-isystem{path}" for path in system]
    csrc = ROOT / "csrc"
    sources = sorted([*csrc.glob("*.cu"), *csrc.glob("*.cpp"), *HERE.glob("*.cpp")])
    digest = hashlib.sha256(" ".join([*flags, sys.version, pybind11.__version__]).encode())
    headers = [*csrc.glob("*.cuh"), *csrc.glob("*.h"), *(HERE / "include").iterdir()]
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / ("host-sanitize" if sanitize else "host") / digest.hexdigest()[:16]
    module = folder / (MODULE + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = folder / (source.name + f".{os.getpid()}.o")
        _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / f"{MODULE}.{os.getpid()}.so"
    _run(["g++", "-shared", *(_SANITIZE if sanitize else []), *objects, "-o", str(partial)])
    for path in objects:
        Path(path).unlink()
    return partial.replace(module)  # in one step: whoever sees it sees all of it


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """What a Python that imports the sanitized module should be started with."""
    # libstdc++ too: the sanitizer looks for the functions that it wraps when the process starts.
    libraries = [_library(name) for name in ("libasan.so", "libstdc++.so")]
    return {
        # Leaks are not looked for: the interpreter and PyTorch leave memory behind by design.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LD_PRELOAD": " ".join(libraries),
    }


def sanitizer_missing() -> str | None:
    """Why a sanitized module is impossible here, or None."""
    why = missing()
    if why is None and not Path(_library("libasan.so")).is_absolute():
        return "g++ has no AddressSanitizer runtime"
    return why


def _library(name: str) -> str:
    """Its path, or just its name where the compiler does not have it."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
