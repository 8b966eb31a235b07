"""`fastdpo ref-logps`: a reference's log-probabilities of a data set, from the command line."""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .data import PairCollator, prepare, reference_logps
from .data.collator import ATTENTION
from .data.columns import IDS
from .data.prepare import RowError
from .data.reference_folder import Folder
from .data.truncation import check, truncate
from .demo.model import PLAIN_TEMPLATE
from .demo.options import InputError
from .demo.pairs import json_rows
from .integrations.packing import attention_of
from .integrations.unwrap import causal_lm

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_AUTOCAST = ("bfloat16", "float16")
_TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any | None
    adapter: str | None


def run(options: argparse.Namespace, console: Console | None = None) -> None:
    """
    Raises:
        InputError: something that was given cannot be used. Nothing is written then.
    """
    console = Console() if console is None else console
    start = time.perf_counter()
    _check(options)
    device = _device(options.device)
    rows = _rows(options.data, options.split)
    loaded = _load(options, device, text=not _tokenized(rows))
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        examples = _examples(rows, loaded.tokenizer, options)
    for note in noted:
        if note.category is UserWarning:
            console.print(f"Note: {note.message}", markup=False)
    collator = PairCollator(
        _padding(loaded.tokenizer),
        options.layout,
        options.max_length,
        options.truncation_mode,
        _attention(loaded.model, options.layout),
    )
    before, continued = _finished(options.out), None
    columns = (
        TextColumn("Reference"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console)
    bar = bars.add_task("", total=len(examples))

    def progress(done: int, total: int) -> None:
        nonlocal continued
        if continued is None:  # the first call: what was there
            continued = done
            bars.start()
        bars.update(bar, completed=done)

    try:
        reference_logps(
            loaded.model,
            examples,
            collator,
            options.out,
            max_tokens_per_batch=options.max_tokens_per_batch,
            tokenizer=loaded.tokenizer,
            ref_adapter=loaded.adapter,
            autocast=None if options.autocast is None else getattr(torch, options.autocast),
            temperature=options.temperature,
            backend=options.backend,
            progress=progress,
        )
    except ValueError as error:
        raise InputError(_as_options(error)) from None
    except torch.OutOfMemoryError:
        raise InputError(
            f"--max-tokens-per-batch should be less than {options.max_tokens_per_batch}: the "
            "device's memory does not suffice"
        ) from None
    except KeyboardInterrupt:
        raise InputError("interrupted: the same command continues") from None
    finally:
        if continued is not None:
            bars.stop()
    if before:
        said = f"{options.out} is finished: {len(examples):,} pairs. Nothing was computed."
    else:
        more = f" ({continued:,} of them were there)" if continued else ""
        said = (
            f"Wrote {len(examples):,} pairs{more} to {options.out} in "
            f"{time.perf_counter() - start:.0f} s."
        )
    console.print(
        f"{said}\nTo train: fastdpo.data.load_reference({str(options.out)!r})",
        markup=False,
        soft_wrap=True,
    )


def _check(options: argparse.Namespace) -> None:
    for name, known in (("dtype", _DTYPES), ("autocast", _AUTOCAST), ("too_long", _TOO_LONG)):
        value = getattr(options, name)
        if value not in known and not (name == "autocast" and value is None):
            raise InputError(
                f"--{name.replace('_', '-')} should be one of {', '.join(known)}, got {value!r}"
            )
    try:
        check(options.max_length, options.truncation_mode)
        PairCollator(0, options.layout)
        Folder(options.out).check("out")
    except ValueError as error:
        raise InputError(_as_options(error)) from None


def _as_options(error: ValueError) -> str:
    """What `reference_logps` says, in the words of the command line."""
    message = re.sub(r"""(\w+)=["'](\w+)["']""", r"\1 \2", str(error))
    message = re.sub(r"^(out|layout|temperature|backend)\b", r"--\1", message)
    message = re.sub(r"\b(layout) (padded|packed)\b", r"--\1 \2", message)
    message = message.replace("attn_implementation", "--attention")
    message = message.replace("give the collator a", "give")
    words = r"\b(max_length|truncation_mode|max_tokens_per_batch|too_long)\b"
    return re.sub(words, lambda found: "--" + found[0].replace("_", "-"), message)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return device


def _finished(out: Path) -> bool:
    manifest = Folder(out).manifest()
    return manifest is not None and manifest["finished"]


# ---- The data


def _rows(path: Path, split: str | None) -> Any:
    """A list of dicts, or a data set.

    Raises:
        InputError: naming --data or --split.
    """
    if not path.exists():
        raise InputError(f"--data {path} does not exist")
    if split is not None and not path.is_dir():
        raise InputError(f"--split is of a directory, and --data {path} is none")
    try:
        rows = _read(path, split)
    except InputError:
        raise
    except Exception as error:  # whatever Arrow and datasets say
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--data {path} cannot be read: {reason[0]}") from None
    if len(rows) == 0:
        raise InputError(f"--data {path} has no pairs")
    return rows


def _read(path: Path, split: str | None) -> Any:
    import datasets

    if path.suffix == ".parquet" and path.is_file():
        return datasets.Dataset.from_parquet(str(path))
    if not path.is_dir():
        return [row for row, _ in json_rows(path)]
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"--split should be one of {', '.join(found)}, got {split!r}")
        return found[split]
    if split is not None:
        raise InputError(f"--split should be left out: --data {path} has no splits")
    return found


def _tokenized(rows: Any) -> bool:
    return isinstance(rows[0], dict) and set(IDS) <= set(rows[0])


def _examples(rows: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    if _tokenized(rows):
        return _fitting(rows, options)
    try:
        examples = prepare(
            rows,
            tokenizer,
            max_length=options.max_length,
            truncation_mode=options.truncation_mode,
            too_long=options.too_long,
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
        )
    except RowError as error:
        raise InputError(f"--data {options.data}, {error}") from None
    except ValueError as error:
        raise InputError(f"--data {options.data}: {_as_options(error)}") from None
    if len(examples) == 0:
        raise InputError(f"--max-length {options.max_length} leaves no pairs")
    return examples


def _fitting(rows: Any, options: argparse.Namespace) -> Any:
    if options.too_long == "error" or options.max_length is None:
        return rows  # who computes says which do not fit

    def fits(row: Any) -> bool:
        prompt, *answers = (row[name] for name in IDS)
        try:
            truncate(prompt, answers, options.max_length, options.truncation_mode)
        except ValueError:
            return False
        return True

    kept = [i for i in range(len(rows)) if fits(rows[i])]
    if not kept:
        raise InputError(f"--max-length {options.max_length} leaves no pairs")
    if len(kept) < len(rows):
        message = f"{len(rows) - len(kept)} of {len(rows)} pairs are too long and are dropped"
        warnings.warn(message, stacklevel=2)
    return [rows[i] for i in kept]


# ---- The model


def _load(options: argparse.Namespace, device: torch.device, text: bool) -> _Loaded:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tokenizer = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if text or options.tokenizer:
            name = "--tokenizer" if options.tokenizer else "--model"
            given = options.tokenizer or options.model
            raise InputError(f"{name} {given}: no tokenizer: {_first_line(error)}") from None
    given = {"attn_implementation": options.attention} if options.attention else {}
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **given)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"--model {options.model} cannot be loaded: {_first_line(error)}"
        ) from None
    if options.adapter is None:
        return _Loaded(_on(model, device), tokenizer, None)
    return _Loaded(_on(_with_adapter(model, options.adapter), device), tokenizer, "default")


def _on(model: Any, device: torch.device) -> Any:
    return model.to(device).eval()


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError("--adapter needs peft: pip install peft") from None
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"--adapter {adapter} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _padding(tokenizer: Any | None) -> int:
    """Any token does: none sees it."""
    found = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in found if isinstance(i, int)), 0)


def _attention(model: Any, layout: str) -> str:
    name = attention_of(causal_lm(model))
    names: Sequence[str] = [n for n in ATTENTION if layout != "shared_prompts" or "flash" not in n]
    if layout == "padded":
        return name if name in ATTENTION else "sdpa"
    if name not in names:
        raise InputError(
            f"--attention should be one of {', '.join(names)} for --layout {layout}, got {name}"
        )
    return name
