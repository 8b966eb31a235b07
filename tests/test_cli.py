"""The command line: what it prints, and the exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastdpo
from fastdpo import checkout, cli
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
    assert all(command in printed for command in ("demo", "doctor", "bench"))
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


def test_bench_is_handed_its_arguments_in_the_checkout(monkeypatch, tmp_path, capfd):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "loss.py").write_text(
        "import os, sys\nprint(os.path.basename(os.getcwd()), sys.argv[1:])\nsys.exit(3)\n"
    )
    monkeypatch.setattr(checkout, "find", lambda: tmp_path)
    assert cli.main(["bench", "--rows", "7"]) == 3
    assert capfd.readouterr().out.strip() == f"{tmp_path.name} ['--rows', '7']"


def test_bench_without_a_checkout_says_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastdpo, "__file__", str(tmp_path / "site" / "fastdpo" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert checkout.find() is None
    assert cli.main(["bench"]) == 2
    assert "benchmarks/loss" in capsys.readouterr().err


def test_the_demo_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_missing", lambda *names: ["rich"])
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "fastdpo: error: the demo needs rich: pip install 'fastdpo[demo]'\n"
    )
