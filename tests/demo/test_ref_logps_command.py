"""`fastdpo ref-logps`: what it reads, what it says, and the exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("datasets", reason="needs datasets")
pytest.importorskip("rich", reason="needs rich")

import datasets
from hf_models import build
from small_tokenizers import byte_level

from fastdpo import cli
from fastdpo.data import PairCollator, load_reference, prepare, reference_logps

ROWS = [
    {"prompt": f"What color is {i}?", "chosen": " It is red" + " so" * (i % 4), "rejected": " no"}
    for i in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    build("Llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def command(model, data, out, *more):
    arguments = ["--model", model, "--data", data, "--out", out, *more]
    return cli.main(["ref-logps", *map(str, arguments)])


def loaded(model, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, **options)


def test_it_is_the_function(model, data, tmp_path, capsys):
    out, collator = tmp_path / "out", PairCollator(0, "shared_prompts", 30)
    more = ("--layout", "shared_prompts", "--max-length", 30, "--dtype", "bfloat16")
    assert command(model, data, out, *more) == 0
    printed = capsys.readouterr().out
    assert "12/12" in printed
    assert f"\nWrote 12 pairs to {out} in " in printed
    assert printed.endswith(f"fastdpo.data.load_reference('{out}')\n")
    rows = prepare(ROWS, byte_level(), max_length=30)
    policy = loaded(model, dtype=torch.bfloat16)
    given = {"examples": rows, "tokenizer": byte_level(), "collator": collator}
    found = load_reference(out, model=policy, temperature=1.0, **given)
    expected = reference_logps(
        policy, rows, collator, tmp_path / "own", tokenizer=byte_level(), progress=False
    )
    assert found.to_list() == expected.to_list()
    assert command(model, data, out, *more) == 0
    assert "is finished: 12 pairs. Nothing was computed." in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("kind", ["parquet", "directory", "splits", "ids", "ids.jsonl"])
def test_kinds_of_data(kind, model, data, tmp_path):
    assert command(model, data, tmp_path / "jsonl") == 0
    rows, more = datasets.Dataset.from_list(ROWS), []
    if kind.startswith("ids"):
        rows = datasets.Dataset.from_list(prepare(ROWS, byte_level()))
    given = tmp_path / "given"
    if kind == "parquet":
        given = tmp_path / "given.parquet"
        rows.to_parquet(given)
    elif kind == "ids.jsonl":
        given = tmp_path / "given.jsonl"
        rows.to_json(given)
    elif kind == "splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(given)
        more = ["--split", "train"]
    else:
        rows.save_to_disk(given)
    assert command(model, given, tmp_path / "out", *more) == 0
    assert (
        load_reference(tmp_path / "out").to_list() == load_reference(tmp_path / "jsonl").to_list()
    )


def test_too_long_pairs(model, data, tmp_path, capsys):
    rows = prepare(ROWS, byte_level())
    shortest = min(len(row["prompt_ids"]) for row in rows)
    fitting = [row for row in rows if len(row["prompt_ids"]) < shortest + 1]
    assert 0 < len(fitting) < len(rows)
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, given in (("text", data), ("ids", ids)):
        more = ("--max-length", shortest + 1)
        assert command(model, given, tmp_path / name, *more) == 2
        assert "leaves nothing of the answers" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
        assert command(model, given, tmp_path / name, *more, "--too-long", "drop") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "pairs are too long" in printed
        found = load_reference(tmp_path / name)
        assert found["prompt_ids"][:] == [row["prompt_ids"] for row in fitting]
    more = ("--max-length", 2, "--too-long", "drop")
    assert command(model, ids, tmp_path / "none", *more) == 2
    assert "--max-length 2 leaves no pairs" in capsys.readouterr().err


def test_an_adapter(model, data, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    policy = peft.get_peft_model(loaded(model), config)
    policy.save_pretrained(tmp_path / "adapter")
    assert command(model, data, tmp_path / "out", "--adapter", tmp_path / "adapter") == 0
    load_reference(tmp_path / "out", model=policy, ref_adapter="default")
    with pytest.raises(ValueError, match="weights: "):
        load_reference(tmp_path / "out", model=policy, ref_adapter="__base__")


BAD = [
    (["--model", "{tmp}/nobody"], "--model {tmp}/nobody: no tokenizer"),
    (["--tokenizer", "{tmp}/nobody"], "--tokenizer {tmp}/nobody: no tokenizer"),
    (["--adapter", "{tmp}/nobody"], "--adapter {tmp}/nobody cannot be loaded"),
    (["--data", "{tmp}/nobody"], "--data {tmp}/nobody does not exist"),
    (["--data", "{tmp}"], "--data {tmp} cannot be read"),
    (["--data", "{tmp}/broken.jsonl"], "broken.jsonl, line 2: not JSON"),
    (["--data", "{tmp}/empty.jsonl"], "empty.jsonl has no pairs"),
    (["--data", "{tmp}/same.jsonl"], "--data {tmp}/same.jsonl, row 0: "),
    (["--split", "train"], "--split is of a directory"),
    (["--out", "{tmp}/empty.jsonl"], "--out should be a folder, got the file"),
    (["--out", "{tmp}"], "--out should be a new folder"),
    (["--layout", "x"], "--layout should be one of"),
    (["--max-length", "1"], "--max-length should be None or an integer"),
    (["--truncation-mode", "x"], "--truncation-mode should be one of"),
    (["--too-long", "x"], "--too-long should be one of"),
    (["--dtype", "int8"], "--dtype should be one of"),
    (["--autocast", "float32"], "--autocast should be one of"),
    (["--device", "toaster"], "--device toaster cannot be used here"),
    (["--attention", "nobody"], "cannot be loaded"),
    (["--temperature", "0"], "--temperature should be"),
    (["--backend", "nobody"], "--backend should be"),
    (["--max-tokens-per-batch", "3"], "--max-tokens-per-batch should be at least"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input(more, message, model, data, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    same = {"prompt": "a", "chosen": " b", "rejected": " b"}
    (tmp_path / "same.jsonl").write_text(json.dumps(same) + "\n")
    here = str(tmp_path)
    more = [argument.replace("{tmp}", here) for argument in more]
    assert command(model, data, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdpo: error: ")
    assert error.count("\n") == 1
    assert message.replace("{tmp}", here) in error
    assert not (tmp_path / "out").exists()


def test_another_reference_is_refused_by_name(model, data, tmp_path, capsys):
    assert command(model, data, tmp_path / "out") == 0
    assert command(model, data, tmp_path / "out", "--dtype", "bfloat16", "--max-length", "9") == 2
    error = capsys.readouterr().err
    assert "--max-length: none there, 9 here" in error
    assert "dtype: float32 there, bfloat16 here" in error


def test_without_its_packages_it_says_what_to_install(monkeypatch, capsys, model, data, tmp_path):
    monkeypatch.setattr(cli, "_missing", lambda *names: ["datasets"])
    assert command(model, data, tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "fastdpo: error: ref-logps needs datasets: pip install 'fastdpo[data]'\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_an_interrupt_says_how_it_goes_on(model, tmp_path):
    """Ctrl-C, as a process gets it."""
    code = (
        "import signal, sys, time; from fastdpo import cli\n"
        # Shells have what they run in the background ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastdpo.data import reference\n"
        "real = reference.Run._logps\n"
        "def slow(self, batch):\n"
        "    print('batch', flush=True); found = real(self, batch); slow.batches += 1\n"
        "    time.sleep(60 if slow.batches == 3 else 0); return found\n"
        "slow.batches = 0\n"
        "reference.Run._logps = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--model", model, "--data", data, "--out", tmp_path / "out"]
    options = [*map(str, arguments), "--max-tokens-per-batch", "40"]
    root = str(Path(cli.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, "ref-logps", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        for _, line in zip(range(3), process.stdout, strict=False):
            assert "batch" in line or "Reference" in line
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 2
    assert "interrupted: the same command continues" in error
    assert command(model, data, tmp_path / "out", "--max-tokens-per-batch", "40") == 0
    assert len(load_reference(tmp_path / "out")) == len(ROWS)
