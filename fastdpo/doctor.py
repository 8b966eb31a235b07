"""`fastdpo doctor`: what this machine has, and what fastdpo can therefore use."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import __version__
from .backends import select

PACKAGES = ("triton", "transformers", "trl", "peft", "liger_kernel")


def lines() -> list[str]:
    """Versions, devices, and every backend with the reason why it can or cannot be used."""
    chosen = os.environ.get(select.ENVIRONMENT_VARIABLE, "(not set)")
    return [
        *_table("versions", _versions()),
        "",
        *_table("devices", _devices()),
        "",
        *_table("backends", _backends()),
        "",
        f"{select.ENVIRONMENT_VARIABLE} = {chosen}",
    ]


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("fastdpo", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or torch.version.hip or "none, a CPU build"),
    ]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _devices() -> list[tuple[str, str]]:
    rows = [
        ("cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used")
    ]
    if not torch.cuda.is_available():
        return [*rows, ("gpu", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
                f"{properties.major}.{properties.minor}",
            )
        )
    return rows


def _backends() -> list[tuple[str, str]]:
    return [
        (name, f"{'yes' if available else 'no '}  {reason}")
        for name, available, reason in select.report()
    ]


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)]
