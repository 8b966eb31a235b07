"""The command line: what it prints, and the exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastdpo
from fastdpo import cli
from fastdpo.backends import select


def test_python_dash_m_fastdpo():
    ran = subprocess.run(
        [sys.executable, "-m", "fastdpo", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == f"fastdpo {fastdpo.__version__}"


def test_help_names_the_commands_and_an_unknown_one_is_refused(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["--help"])
    assert exited.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "doctor"))
    with pytest.raises(SystemExit) as exited:
        cli.main(["nonsense"])
    assert exited.value.code == 2


def test_doctor_names_every_backend_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv(select.ENVIRONMENT_VARIABLE, "torch")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name, available, reason in select.report():
        row = [name, "yes" if available else "no", *reason.split()]
        assert row in [line.split() for line in printed.splitlines()]
    assert torch.__version__ in printed
    assert "FASTDPO_BACKEND = torch" in printed


def test_doctor_says_what_is_not_installed(capsys, monkeypatch):
    from importlib import metadata

    def version(name):
        if name == "trl":
            raise metadata.PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    cli.main(["doctor"])
    printed = capsys.readouterr().out.splitlines()
    rows = dict(line.split(None, 1) for line in printed if line.startswith("  "))
    assert rows["trl"] == "not installed"
    assert rows["peft"] == "1.2.3"


def test_the_demo_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_missing", lambda *names: ["rich"])
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "fastdpo: error: the demo needs rich: pip install 'fastdpo[demo]'\n"
    )
