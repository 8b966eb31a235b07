"""Builds the optional extension fastdpo._cuda with nvcc and ninja; pyproject.toml has the rest.

    FASTDPO_BUILD_CUDA=auto|0|1   auto (default): built where nvcc is found, else one line says why
                                  not; 0: never; 1: a failure to build is an error. auto and 0
                                  remove the binary of an earlier build where they make none
    FASTDPO_CUDA_ARCHS            compute capabilities, e.g. "9.0" or "8.0;9.0+PTX"
                                  (default: 8.0;8.6;8.9;9.0;10.0;12.0+PTX, of which nvcc's)
    FASTDPO_NVCC                  the compiler, where it is not `nvcc` on PATH, under CUDA_HOME or
                                  CUDA_PATH, or in /usr/local/cuda
    FASTDPO_BUILD_JOBS            parallel compilations (default 2)

The extension neither includes nor links PyTorch, so an isolated build needs none, and one binary
serves every version. Objects stay in build/cuda-*/, where ninja rebuilds only what changed:
`python setup.py build_ext --inplace` is the development loop.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
NAME = "fastdpo._cuda"
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
MODES = ("auto", "0", "1")
NOT_BUILT = NAME + " is not built: {}. The torch and triton backends do not need it."


class CannotBuild(RuntimeError):
    """The extension cannot be built here; the message says why, in one line."""


def mode() -> str:
    value = os.environ.get("FASTDPO_BUILD_CUDA") or "auto"
    if value not in MODES:
        raise ValueError(f"FASTDPO_BUILD_CUDA should be one of {', '.join(MODES)}, got {value!r}")
    return value


def find_nvcc() -> str:
    named = os.environ.get("FASTDPO_NVCC")
    # The last is where the toolkit installs itself, and it does not touch PATH.
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [named] if named else ["nvcc", *(f"{h}/bin/nvcc" for h in homes if h)]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    raise CannotBuild(f"nvcc not found ({', '.join(candidates)})")


def architectures(nvcc: str) -> tuple[list[int], list[int]]:
    """SASS and PTX targets, e.g. ([80, 90], [90])."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if listing.returncode != 0:
        raise CannotBuild(f"{nvcc} --list-gpu-arch fails: {listing.stderr.strip()}")
    known = {int(number) for number in re.findall(r"compute_(\d+)", listing.stdout)}
    given = os.environ.get("FASTDPO_CUDA_ARCHS")
    sass: set[int] = set()
    ptx: set[int] = set()
    for word in re.split(r"[;,\s]+", (given or DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", word)
        if match is None:
            raise ValueError(f'FASTDPO_CUDA_ARCHS must look like "8.0;9.0+PTX", got {word!r}')
        number = 10 * int(match[1]) + int(match[2])
        if number not in known and given:
            names = "; ".join(f"{n // 10}.{n % 10}" for n in sorted(known))
            raise ValueError(f"FASTDPO_CUDA_ARCHS: {nvcc} does not know {word}, it knows {names}")
        if number in known:
            sass.add(number)
            if match[3]:
                ptx.add(number)
    if not sass:
        raise CannotBuild(f"{nvcc} knows none of {DEFAULT_ARCHITECTURES}")
    return sorted(sass), sorted(ptx or ([] if given else {max(sass)}))


def ninja_text(nvcc: str, target: Path) -> str:
    """The build, whole: an object per source, linked against the static CUDA runtime."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild(str(error)) from error
    sass, ptx = architectures(nvcc)
    # nvcc splits its arguments at commas, unless they are escaped.
    defines = [
        f"-DFASTDPO_{kind}_ARCHS=" + r"\,".join(map(str, numbers))
        for kind, numbers in (("SASS", sass), ("PTX", ptx))
    ]
    gencode = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in sass]
    gencode += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx]
    host = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    # No --use_fast_math: approximations are chosen by name in the source. No contraction either:
    # the source says fmaf where it means it, so that the backward's logits are the forward's to
    # the bit. A spilled register or a local array would cost more than either, and fails the
    # build.
    device = ["-lineinfo", "-fmad=false"]
    device += ["-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,-Werror"]
    include = [
        f"-isystem={path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))
    ]
    # The runtime's symbols stay inside: PyTorch brings a CUDA runtime of its own.
    link = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL,-Bsymbolic"]
    kernels = sorted(CSRC.glob("*.cu"))
    rules = {
        "kernel": [nvcc, *host, *device, *gencode, "-MD", "-MF", "$out.d", "-c", "$in"],
        "binding": [nvcc, *host, *defines, *include, "-MD", "-MF", "$out.d", "-c", "$in"],
        "link": [nvcc, *link, *gencode[:1], "$in"],
    }
    lines = ["ninja_required_version = 1.5"]
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {quote(command)} -o $out"]
        lines += [f"  description = {name} $out"]
        lines += [] if name == "link" else ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in [*kernels, CSRC / "bindings.cpp"]:
        rule = "kernel" if source.suffix == ".cu" else "binding"
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    lines.append(f"default {escape(target)}")
    return "\n".join(lines) + "\n"


def quote(command: list[str]) -> str:
    """For the shell, and $ for ninja as well, which quotes $in and $out itself."""
    return " ".join(
        word if re.match(r"\$(in|out)\b", word) else shlex.quote(word).replace("$", "$$")
        for word in command
    )


def escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CannotBuild("ninja is not installed") from None
        return found


class BuildWithNinja(build_ext):
    """Runs ninja where setuptools would run a compiler."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per Python: objects of the kernels could be shared, the bindings not.
        folder = ROOT / "build" / f"cuda-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / target.name
        write_if_changed(folder / "build.ninja", ninja_text(find_nvcc(), built))
        jobs = os.environ.get("FASTDPO_BUILD_JOBS") or "2"
        command = [find_ninja(), "-C", str(folder), "-j", jobs]
        if subprocess.run(command).returncode != 0:
            raise CannotBuild(f"`{shlex.join(command)}` failed, its output is above")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)

    def run(self) -> None:
        # setuptools switches `inplace` off while it builds.
        stale = [Path(self.build_lib), *([ROOT] if self.inplace else [])]
        try:
            super().run()
            if self.extensions:
                return
        except CannotBuild as error:
            if mode() == "1":
                raise SystemExit(f"FASTDPO_BUILD_CUDA=1, but {NAME}: {error}") from error
            self.extensions = []
            say(NOT_BUILT.format(error))
        # The kernels of an earlier build would be shipped, or imported, beside today's Python.
        for folder in stale:
            (folder / self.get_ext_filename(NAME)).unlink(missing_ok=True)


class Build(build):
    """With build_ext where there is no extension as well: it removes that of an earlier build."""

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else predicate) for name, predicate in build.sub_commands
    ]


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def say(line: str) -> None:
    print(line, file=sys.stderr)


def extensions() -> list[Extension]:
    if mode() == "0":
        return []
    try:
        find_nvcc()
    except CannotBuild as error:
        if mode() == "1":
            raise SystemExit(f"FASTDPO_BUILD_CUDA=1, but {NAME}: {error}") from error
        # Without an extension the wheel is pure Python, as it should be.
        say(NOT_BUILT.format(error))
        return []
    kernels, bindings, headers = (
        [str(path.relative_to(ROOT)) for suffix in suffixes for path in sorted(CSRC.glob(suffix))]
        for suffixes in (["*.cu"], ["*.cpp"], ["*.cuh", "*.h"])
    )
    # `depends` puts the headers into the source distribution.
    return [Extension(NAME, kernels + bindings, depends=headers)]


if __name__ == "__main__":  # the tests import what is above
    setup(ext_modules=extensions(), cmdclass={"build": Build, "build_ext": BuildWithNinja})
