"""Extra memory of a step: the peak beyond what was there before, less the gradients it returns.

On a GPU it is the caching allocator's own peak. On a CPU it is the resident set: a process of its
own makes the inputs, warms up on a few tokens, gives freed memory back, resets the kernel's
high-water mark (5 into /proc/self/clear_refs), runs one step and reads VmHWM. glibc is told to map
every block of 128 KiB or more by itself and to return it when freed, so that memory kept by the
allocator counts for nobody. A provider that compiles warms up on the whole shape, so that its
compiler does not count either.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Inputs, make_inputs
from benchmarks.providers import Provider
from benchmarks.providers.ours import FastDPO
from benchmarks.scenarios import Scenario, from_dict
from fastdpo.demo.peak import peak_bytes

METHOD = {
    "cuda": "torch.cuda.max_memory_allocated of one step, less what was allocated before it and "
    "less the gradients",
    "cpu": "VmHWM of one step in a process of its own (reset before the step), less VmRSS before "
    "it and less the gradients; glibc maps blocks of 128 KiB and more, and returns them",
}
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_WARMUP_LENGTH = 16  # positions per sequence


def extra_bytes(provider: Provider, inputs: Inputs, timeout: float | None = None) -> int:
    """Peak bytes of one step beyond inputs and gradients, on the inputs' device."""
    if inputs.hidden.is_cuda:
        peak = peak_bytes(lambda: provider.step(inputs), inputs.hidden.device)
        return peak - inputs.gradient_bytes
    return on_cpu(provider, inputs.scenario, timeout)


def on_cpu(provider: Provider, scenario: Scenario, timeout: float | None = None) -> int:
    """The same on the CPU, measured in a fresh process.

    Raises:
        RuntimeError: with the last line that the process wrote, where it failed.
    """
    request: dict[str, Any] = {"scenario": scenario.as_dict(), "provider": provider.name}
    if isinstance(provider, FastDPO):
        request |= {
            "backend": provider.backend,
            "workspace": provider.workspace,
            "rows_known": provider.rows_known,
        }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory.extra", json.dumps(request)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **MALLOC_SETTINGS},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])["extra_bytes"]


def _provider(request: dict[str, Any]) -> Provider:
    from benchmarks.providers import by_name

    if "workspace" in request:  # any workspace, not only the registry's
        options = (request["backend"], request["workspace"], request["rows_known"])
        return FastDPO(request["provider"], "", *options)
    return by_name([request["provider"]])[0]


def _measure(request: dict[str, Any]) -> int:
    scenario = from_dict(request["scenario"])
    provider, device = _provider(request), torch.device("cpu")
    inputs = make_inputs(scenario, device)
    warm = inputs
    if not provider.compiles and scenario.length > _WARMUP_LENGTH:
        small = scenario.with_tokens(_WARMUP_LENGTH * scenario.sequences)
        warm = make_inputs(small, device, weight=inputs.weight)
    provider.step(warm)
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    out = provider.step(inputs)
    peak = _status("VmHWM")
    del out
    return peak - before - inputs.gradient_bytes


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Extra memory of one step on the CPU (internal).")
    parser.add_argument("request", help="JSON with scenario and provider")
    print(json.dumps({"extra_bytes": _measure(json.loads(parser.parse_args().request))}))


if __name__ == "__main__":
    main()
