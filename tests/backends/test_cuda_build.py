"""The extension, compiled for every architecture: what came out of it, and that it imports.

The objects stay in build/cuda-*/, so that a second run, or `pip install .` from the same checkout,
compiles nothing again. How it is built is tested on copies of the checkout: for one architecture,
or with a compiler that only pretends.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import refusals

pytest.importorskip("setuptools")
pybind11 = pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[2]
BINARY = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


setup_py = load("fastdpo_setup_py", ROOT / "setup.py")
try:
    NVCC, NO_NVCC = setup_py.find_nvcc(), ""
except setup_py.CannotBuild as error:
    NVCC, NO_NVCC = None, str(error)

needs_nvcc = pytest.mark.skipif(NVCC is None, reason=f"compiling csrc/: {NO_NVCC}")

# Registers a thread for which the kernels were designed: 256 threads a block, and at least 4 blocks
# a multiprocessor for those that move matrices, 2 for the other.
MOST_REGISTERS = {"logits_logps": 64, "logits_logps_backward": 64, "target_logits": 64}
MOST_REGISTERS_ELSEWHERE = 128
MOST_SHARED_BYTES = 48 << 10


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def build(folder: Path, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ("setup.py", "build_ext", "--build-lib", str(folder))
    return python(*command, cwd=root, **environment)


def copy_checkout(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        folder.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, folder)
    for name in ("csrc", "fastdpo"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def script(path: Path, *lines: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def command_of(rule: str, ninja_text: str) -> list[str]:
    (command,) = re.findall(rf"^rule {rule}\n  command = (.*)$", ninja_text, re.MULTILINE)
    return shlex.split(command.replace("$$", "$"))


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    done = build(folder, FASTDPO_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (path,) = (folder / "fastdpo").glob("_cuda*.so")
    return path


@pytest.fixture(scope="session")
def complete(built):
    return load("fastdpo._cuda", built)


class Checkout:
    """A copy that was built for one architecture, with spaces and worse in the names of folders."""

    def __init__(self, folder: Path):
        self.root = copy_checkout(folder / "a check out")
        shutil.copytree(pybind11.__path__[0], folder / "site packages" / "pybind11")
        compiler = folder / "the $HOME of 'nvcc'" / "nvcc"
        self.environment = {
            "FASTDPO_BUILD_CUDA": "1",
            "FASTDPO_CUDA_ARCHS": "9.0",
            "FASTDPO_NVCC": script(compiler, f'exec {shlex.quote(NVCC or "")} "$@"'),
            "PYTHONPATH": str(folder / "site packages"),
        }
        self.built = folder / "built"
        self.done = build(self.built, self.root, **self.environment)
        self.objects = self.root / "build" / f"cuda-{sysconfig.get_config_var('SOABI')}"

    def ninja_text(self) -> str:
        return (self.objects / "build.ninja").read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("checkout"))
    assert made.done.returncode == 0, made.done.stdout[-5000:] + made.done.stderr[-5000:]
    return made


@pytest.fixture(scope="module")
def module(checkout):
    (path,) = (checkout.built / "fastdpo").glob("_cuda*.so")
    return load("fastdpo._cuda", path)


def cuobjdump() -> str:
    """The toolkit's, or the one in the Triton wheel."""
    beside = [] if NVCC is None else [Path(NVCC).resolve().parent / "cuobjdump"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        wheel = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
        beside.append(wheel / "cuobjdump")
    found = shutil.which("cuobjdump") or next((str(p) for p in beside if p.exists()), None)
    if found is None:
        pytest.skip("cuobjdump is in neither the toolkit nor a Triton wheel")
    return found


@needs_nvcc
@pytest.mark.exhaustive  # compiled for every architecture
def test_it_was_built_for_what_it_says(complete):
    sass, ptx = setup_py.architectures(NVCC)
    assert list(complete.SASS_ARCHITECTURES) == sass
    assert list(complete.PTX_ARCHITECTURES) == ptx
    assert complete.SASS_ARCHITECTURES[-1] in complete.PTX_ARCHITECTURES
    for architecture in complete.SASS_ARCHITECTURES:
        complete.check_architecture(architecture // 10, architecture % 10)
    major = max(complete.PTX_ARCHITECTURES) // 10
    complete.check_architecture(major + 5, 0)  # a later GPU compiles the PTX
    with pytest.raises(ValueError, match=r'FASTDPO_CUDA_ARCHS="5\.0"'):
        complete.check_architecture(5, 0)


@needs_nvcc
@pytest.mark.exhaustive  # compiled for every architecture
def test_no_kernel_spills_and_all_fit(built, complete):
    tool = cuobjdump()
    listing = subprocess.run(
        [tool, "--dump-resource-usage", str(built)], capture_output=True, text=True, check=True
    ).stdout
    # One section per architecture, in which each kernel's line follows its name's.
    usage = re.findall(
        r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing
    )
    assert usage, listing[:2000]
    architectures = set(map(int, re.findall(r"sm_(\d+)", listing)))
    assert architectures == set(complete.SASS_ARCHITECTURES)
    names = set()
    for name, registers, stack, shared, local in usage:
        (kernel,) = re.findall(
            r"\d+(logits_logps_backward|logits_logps|target_logits|sequence_loss)_", name
        )
        names.add(name)
        assert int(local) == 0, f"{name}: {local} bytes of local memory"
        assert int(stack) == 0, f"{name}: {stack} bytes of stack"
        assert int(shared) <= MOST_SHARED_BYTES, f"{name}: {shared} bytes of shared memory"
        most = MOST_REGISTERS.get(kernel, MOST_REGISTERS_ELSEWHERE)
        assert int(registers) <= most, f"{name}: {registers} registers"
    # 3 types × softcap or not, twice; 9 pairs of types × softcap or not; 3 × softcap or not; 1.
    assert len(names) == 2 * 6 + 18 + 6 + 1
    assert len(usage) == len(names) * len(architectures)


@needs_nvcc
@pytest.mark.exhaustive  # compiled for every architecture
def test_products_and_sums_are_fused_only_where_the_source_says_so(built):
    """The backward without a softcap says it nowhere, with one everywhere."""
    tool = cuobjdump()
    listing = subprocess.run(
        [tool, "-sass", "-arch", "sm_90", str(built)], capture_output=True, text=True, check=True
    ).stdout
    backward = [f for f in listing.split("Function : ")[1:] if "logits_logps_backward" in f[:60]]
    assert len(backward) == 18
    for code in backward:
        name = code.split()[0]
        assert "FMUL" in code, name
        assert ("FFMA" in code) == ("Lb1" in name), name


@needs_nvcc
@pytest.mark.exhaustive  # compiled for every architecture
def test_it_links_no_pytorch_and_no_shared_cuda_runtime(built):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run([readelf, "-d", built], capture_output=True, text=True, check=True)
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed.stdout)
    assert libraries
    assert not [name for name in libraries if re.match(r"lib(torch|c10|cuda)", name)]
    symbols = subprocess.run(
        [readelf, "--dyn-syms", "--wide", built], capture_output=True, text=True, check=True
    ).stdout
    exported = re.findall(r"GLOBAL\s+DEFAULT\s+\d+\s+(cuda\w+)", symbols)
    assert not exported, "the runtime's symbols must not meet those of PyTorch's"


@needs_nvcc
@pytest.mark.exhaustive  # compiled for every architecture
def test_nothing_is_compiled_twice(built, tmp_path):
    done = build(tmp_path, FASTDPO_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "no work to do" in done.stdout


@pytest.mark.exhaustive
@needs_nvcc
@pytest.mark.parametrize("refusal", refusals.REFUSALS, ids=str)
def test_the_binding_refuses_with_the_arguments_name(module, refusal):
    refusals.check(module, refusal)


@pytest.mark.exhaustive
@needs_nvcc
def test_without_a_gpu_a_launch_is_an_exception_that_names_the_kernel(module):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and these addresses are not memory")
    for op in ("logits_logps", "logits_logps_backward", "target_logits", "sequence_loss"):
        with pytest.raises(RuntimeError, match=rf"^{op}: cudaError\w+: "):
            getattr(module, op)(**refusals.accepted(op))


def test_without_nvcc_one_line_says_so_and_nothing_fails(tmp_path):
    done = build(tmp_path, FASTDPO_NVCC="no-such-nvcc", FASTDPO_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "fastdpo._cuda" in line]
    assert lines == [
        "fastdpo._cuda is not built: nvcc not found (no-such-nvcc). "
        "The torch and triton backends do not need it."
    ]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTDPO_NVCC": "no-such-nvcc", "FASTDPO_BUILD_CUDA": "1"}, "nvcc not found"),
        ({"FASTDPO_BUILD_CUDA": "maybe"}, "FASTDPO_BUILD_CUDA should be one of auto, 0, 1"),
    ],
)
def test_what_was_demanded_and_cannot_be_is_an_error(tmp_path, environment, message):
    done = build(tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("sm_90", "FASTDPO_CUDA_ARCHS must look like"),
        ("9.0;4.2", "does not know 4.2"),
    ],
)
def test_architectures_that_do_not_exist_are_refused(tmp_path, architectures, message):
    done = build(tmp_path, FASTDPO_CUDA_ARCHS=architectures)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.exhaustive
@needs_nvcc
def test_a_spill_is_an_error(checkout, tmp_path):
    """The command with which the build compiles, on a kernel that cannot but spill."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spills(float* p, int n) {\n"
        "  float a[80];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 80; ++i) a[i] = p[i * n];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 80; ++i) p[(i + 1) * n] = a[i] * a[(i + 40) % 80];\n"
        "}\n"
    )
    names = {"$in": str(source), "$out": "spills.o", "$out.d": "spills.o.d"}
    command = [names.get(word, word) for word in command_of("kernel", checkout.ninja_text())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "spilled to local memory" in done.stderr


@pytest.mark.exhaustive
@needs_nvcc
def test_the_flags_of_the_kernels(checkout):
    command = command_of("kernel", checkout.ninja_text())
    assert "-lineinfo" in command
    assert "-fmad=false" in command
    # -use_fast_math is the same flag, and its parts are flags as well.
    approximate = r"-?-(use_fast_math|ftz=true|prec-div=false|prec-sqrt=false)"
    assert not [word for word in command if re.match(approximate, word)]
    targets = [word for word in command if word.startswith("-gencode")]
    assert targets == ["-gencode=arch=compute_90,code=sm_90"]


def included(name: str) -> set[str]:
    """The headers of csrc/ that this file sees."""
    found = set(re.findall(r'^#include "(.*)"', (ROOT / "csrc" / name).read_text(), re.MULTILINE))
    return found.union(*map(included, found))


@pytest.mark.exhaustive
@needs_nvcc
def test_a_changed_header_rebuilds_what_includes_it_and_nothing_else(checkout):
    csrc = checkout.root / "csrc"
    sources = [path for path in csrc.iterdir() if path.suffix in (".cu", ".cpp")]
    headers = [path for path in csrc.iterdir() if path.suffix in (".cuh", ".h")]
    assert included("logits_logps.cu") >= {"online_sum.cuh", "common.cuh"}
    ninja = [setup_py.find_ninja(), "-C", str(checkout.objects), "-n"]
    for header in headers:
        before = header.stat()
        os.utime(header)
        listing = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout
        os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
        rebuilt = set(re.findall(r"\] (?:kernel|binding) (\S+)\.o$", listing, re.MULTILINE))
        assert rebuilt == {p.stem for p in sources if header.name in included(p.name)}, header
    listing = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout
    assert "no work to do" in listing


@pytest.mark.exhaustive
@needs_nvcc
def test_a_wheel_has_the_extension_and_imports_anywhere_else(checkout, tmp_path):
    pytest.importorskip("pip")
    pip = ("-m", "pip", "--disable-pip-version-check")
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    done = python(*pip, *wheel, ".", cwd=checkout.root, **checkout.environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (built,) = tmp_path.glob("fastdpo-*.whl")
    target = tmp_path / "site"
    install = ("install", "--no-deps", "--no-index", "--target", str(target), str(built))
    done = python(*pip, *install, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import fastdpo._cuda as c; print(c.__file__, *c.SASS_ARCHITECTURES, sep='\\n')"
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.stdout.splitlines() == [str(target / "fastdpo" / BINARY), "90"], done.stderr


# What pip calls for `pip install .` and `pip install --editable .`, and the development loop.
WHEEL, EDITABLE = (
    ("-c", f"import setuptools.build_meta as m; print(m.build_{kind}('dist'))")
    for kind in ("wheel", "editable")
)
IN_PLACE = ("setup.py", "build_ext", "--inplace")
LISTS_AN_ARCHITECTURE = '[ "$1" = --list-gpu-arch ] && echo compute_90 && exit'


@pytest.fixture(scope="module")
def pretended(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("pretended") / "checkout")


@pytest.mark.parametrize("how", [WHEEL, EDITABLE, IN_PLACE], ids=["wheel", "editable", "inplace"])
@pytest.mark.parametrize("why", ["it does not compile", "there is no nvcc", "it is not wanted"])
def test_what_is_not_built_is_not_left_from_an_earlier_build(pretended, tmp_path, how, why):
    compiles = script(
        tmp_path / "nvcc",
        LISTS_AN_ARCHITECTURE,
        "while [ $# -gt 1 ]; do",
        '  case $1 in -MF) echo "object:" > "$2" ;; -o) echo binary > "$2" ;; esac',
        "  shift",
        "done",
    )
    fails = script(tmp_path / "failing", LISTS_AN_ARCHITECTURE, "exit 1")
    mode, nvcc = {
        "it does not compile": ("auto", fails),
        "there is no nvcc": ("auto", "no-such-nvcc"),
        "it is not wanted": ("0", compiles),
    }[why]

    def binaries(mode: str, nvcc: str) -> list[str]:
        environment = {"FASTDPO_BUILD_CUDA": mode, "FASTDPO_NVCC": nvcc, "FASTDPO_CUDA_ARCHS": ""}
        done = python(*how, cwd=pretended, **environment)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        assert ("fastdpo._cuda is not built" in done.stderr) == (mode == "auto")
        if how is not WHEEL:
            return [path.name for path in (pretended / "fastdpo").glob("*.so")]
        with zipfile.ZipFile(pretended / "dist" / done.stdout.split()[-1]) as wheel:
            return [Path(name).name for name in wheel.namelist() if name.endswith(".so")]

    assert binaries("1", compiles) == [BINARY]
    assert binaries(mode, nvcc) == []


@pytest.mark.parametrize(
    ("known", "sass", "ptx"),
    [
        ((75, 80, 86, 87, 89, 90, 100, 103, 120), [80, 86, 89, 90, 100, 120], [120]),
        ((70, 75, 80, 86, 89, 90), [80, 86, 89, 90], [90]),  # no 12.0: PTX of the last there is
        ((50, 80), [80], [80]),
    ],
)
def test_default_architectures_are_those_that_the_compiler_knows(
    tmp_path, monkeypatch, known, sass, ptx
):
    monkeypatch.delenv("FASTDPO_CUDA_ARCHS", raising=False)
    nvcc = script(tmp_path / "nvcc", *(f"echo compute_{number}" for number in known))
    assert setup_py.architectures(nvcc) == (sass, ptx)
    text = setup_py.ninja_text(nvcc, tmp_path / BINARY)
    codes = [f"sm_{number}" for number in sass] + [f"compute_{number}" for number in ptx]
    assert re.findall(r",code=(\w+)", " ".join(command_of("kernel", text))) == codes


def test_a_compiler_that_knows_no_default_architecture_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTDPO_CUDA_ARCHS", raising=False)
    with pytest.raises(setup_py.CannotBuild, match=r"knows none of 8\.0;"):
        setup_py.architectures(script(tmp_path / "nvcc", "echo compute_75"))


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    """FASTDPO_NVCC and nowhere else if given; PATH; CUDA_HOME; CUDA_PATH; /usr/local/cuda."""
    names = {"PATH": "", "CUDA_HOME": "home", "CUDA_PATH": "cuda path", "FASTDPO_NVCC": "named"}
    there = {name: tmp_path / folder / "bin" / "nvcc" for name, folder in names.items()}
    for name, path in there.items():
        path.parent.mkdir(parents=True)
        script(path)
        value = {"PATH": path.parent, "FASTDPO_NVCC": path}.get(name, path.parent.parent)
        monkeypatch.setenv(name, str(value))
    for name in ("FASTDPO_NVCC", "PATH", "CUDA_HOME", "CUDA_PATH"):
        assert setup_py.find_nvcc() == str(there[name])
        there[name].unlink()
        if name == "FASTDPO_NVCC":
            with pytest.raises(setup_py.CannotBuild, match="named"):
                setup_py.find_nvcc()
            monkeypatch.delenv(name)
    installed = "/usr/local/cuda/bin/nvcc"
    monkeypatch.setattr(shutil, "which", lambda name: name if name == installed else None)
    assert setup_py.find_nvcc() == installed
