"""What every result carries: versions, device, driver, clocks, commit. No paths, no host names."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "numpy")
_GPU_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)
_ROOT = Path(__file__).resolve().parent.parent


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """JSON of this machine and this tree, as far as they bear on a result."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": device.type,
        "hardware": _gpu(device) if device.type == "cuda" else _cpu(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def describe(env: dict[str, Any]) -> str:
    """One line for titles and tables."""
    hardware = env["hardware"]
    if env["device"] == "cuda":
        return f"{hardware['name']}, driver {hardware.get('driver_version', 'unknown')}"
    return (
        f"CPU, {hardware['threads']} threads of {hardware['name']} "
        f"({', '.join(hardware['instructions']) or 'no wide instructions'})"
    )


def _commit() -> dict[str, Any]:
    """FASTDPO_COMMIT names it where the tree came without its repository."""
    head = _run("git", "-C", str(_ROOT), "rev-parse", "HEAD") or os.environ.get("FASTDPO_COMMIT")
    status = _run("git", "-C", str(_ROOT), "status", "--porcelain", "--", "fastdpo", "csrc")
    return {"id": head, "modified": None if status is None else bool(status)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    _busy(device)
    line = _run(
        "nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "-i", "0"
    )
    if line is not None:
        found |= dict(zip(_GPU_FIELDS, (v.strip() for v in line.split(",")), strict=False))
    return found


def _busy(device: torch.device) -> None:
    """Half a second of products, the queue full of more: an idle GPU's clocks say nothing."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        torch.mm(a, a)


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in info.splitlines() if ":" in line
    )
    flags = fields.get("flags", "").split()
    return {
        "name": fields.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
    }


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
