"""The extension, compiled for every architecture: what came out of it, and that it imports.

The objects stay in build/cuda-*/, so that a second run, or `pip install .` from the same checkout,
compiles nothing again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host import refusals

ROOT = Path(__file__).parent.parent
NVCC = shutil.which(os.environ.get("FASTDPO_NVCC", "nvcc"))

needs_nvcc = pytest.mark.skipif(
    NVCC is None or any(importlib.util.find_spec(m) is None for m in ("pybind11", "setuptools")),
    reason="compiling csrc/ needs nvcc on PATH, pybind11 and setuptools",
)

# Registers a thread for which the kernels were designed: 256 threads a block, and at least 4 blocks
# a multiprocessor for those that move matrices, 2 for the other.
MOST_REGISTERS = {"logits_forward": 64, "logits_backward": 64, "target_logits": 64}
MOST_REGISTERS_ELSEWHERE = 128
MOST_SHARED_BYTES = 48 << 10


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    done = build(folder, FASTDPO_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (path,) = (folder / "fastdpo").glob("_cuda*.so")
    return path


@pytest.fixture(scope="session")
def module(built):
    spec = importlib.util.spec_from_file_location("fastdpo._cuda", built)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


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
def test_it_was_built_for_what_it_says(module):
    assert module.SASS_ARCHITECTURES[-1] in module.PTX_ARCHITECTURES
    for architecture in module.SASS_ARCHITECTURES:
        module.check_architecture(architecture // 10, architecture % 10)
    major = max(module.PTX_ARCHITECTURES) // 10
    module.check_architecture(major + 5, 0)  # a later GPU compiles the PTX
    with pytest.raises(ValueError, match=r'FASTDPO_CUDA_ARCHS="5\.0"'):
        module.check_architecture(5, 0)


@needs_nvcc
def test_no_kernel_spills_and_all_fit(built, module):
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
    assert architectures == set(module.SASS_ARCHITECTURES)
    names = set()
    for name, registers, stack, shared, local in usage:
        (kernel,) = re.findall(
            r"\d+(logits_forward|logits_backward|target_logits|sequence_loss)_", name
        )
        names.add(name)
        assert int(local) == 0, f"{name}: {local} bytes of local memory"
        assert int(stack) == 0, f"{name}: {stack} bytes of stack"
        assert int(shared) <= MOST_SHARED_BYTES, f"{name}: {shared} bytes of shared memory"
        most = MOST_REGISTERS.get(kernel, MOST_REGISTERS_ELSEWHERE)
        assert int(registers) <= most, f"{name}: {registers} registers"
    # 3 types × softcap or not; 9 pairs of types × softcap or not; 3 × softcap or not; 1.
    assert len(names) == 6 + 18 + 6 + 1
    assert len(usage) == len(names) * len(architectures)


@needs_nvcc
def test_products_and_sums_are_fused_only_where_the_source_says_so(built):
    """The backward without a softcap says it nowhere, with one everywhere."""
    tool = cuobjdump()
    listing = subprocess.run(
        [tool, "-sass", "-arch", "sm_90", str(built)], capture_output=True, text=True, check=True
    ).stdout
    backward = [f for f in listing.split("Function : ")[1:] if "logits_backward" in f[:60]]
    assert len(backward) == 18
    for code in backward:
        name = code.split()[0]
        assert "FMUL" in code, name
        assert ("FFMA" in code) == ("Lb1" in name), name


@needs_nvcc
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
def test_nothing_is_compiled_twice(built, tmp_path):
    done = build(tmp_path, FASTDPO_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert "no work to do" in done.stdout


@needs_nvcc
@pytest.mark.parametrize("refusal", refusals.REFUSALS, ids=str)
def test_the_binding_refuses_with_the_arguments_name(module, refusal):
    refusals.check(module, refusal)


@needs_nvcc
def test_without_a_gpu_a_launch_is_an_exception_that_names_the_kernel(module):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and these addresses are not memory")
    for op in ("logits_forward", "logits_backward", "target_logits", "sequence_loss"):
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
        ({"FASTDPO_BUILD_CUDA": "maybe"}, "FASTDPO_BUILD_CUDA must be one of auto, 0, 1"),
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


@needs_nvcc
def test_a_spill_is_an_error(tmp_path):
    """The flags with which the build compiles, on a kernel that cannot but spill."""
    text = (ROOT / "setup.py").read_text()
    (flag,) = re.findall(r'"(-Xptxas=[^"]*)"', text)
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
    assert NVCC is not None
    done = subprocess.run(
        [NVCC, "-arch=sm_90", flag, "-c", source, "-o", tmp_path / "spills.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "spilled to local memory" in done.stderr
