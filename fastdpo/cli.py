"""The command line: `fastdpo demo | ref-logps | doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0, or 2 with one line on stderr for bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"] and "--frontier" in arguments:  # it has options of its own
        return _frontier(arguments[1:])
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo", description="Direct Preference Optimization without the logits."
    )
    parser.add_argument("--version", action="version", version=f"fastdpo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_ref_logps(commands)
    doctor = commands.add_parser("doctor", help="what this machine can use, and why not the rest")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="a small DPO run from end to end",
        description="Makes (or loads) preference pairs and a causal language model, trains it by "
        "DPO, and saves the model, its metrics and a plot. Without options it takes a minute or "
        "two on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="preference pairs: JSON lines (or .parquet) with chosen and rejected, strings or "
        "lists of messages, and prompt, which may be missing where both begin with it; other "
        "columns are ignored",
    )
    add("--model", help="a Hugging Face causal language model: a directory or a name")
    add("--output", type=Path, default=Path("fastdpo-demo"), help="the directory to write")
    add("--steps", type=int, default=150, help="DPO steps")
    add("--sft-steps", type=int, help="steps of pre-training (700 for a new model, 0 for a loaded)")
    add("--batch-size", type=int, default=16, help="pairs per step")
    add("--max-length", type=int, default=512, help="tokens per sequence; longer ones are cut")
    add("--beta", type=float, default=0.5, help="strength of the pull towards the reference")
    add("--objective", default="sigmoid", help="the preference loss, any that takes pairs")
    add("--label-smoothing", type=float, default=0.0, help="for objectives that define it")
    add("--lr", type=float, help="peak learning rate (depends on what is trained)")
    add("--lora", action="store_true", help="train LoRA adapters (needs peft)")
    add("--seed", type=int, default=0, help="of the pairs, the weights and the order")
    add("--device", help="cpu, cuda, ... (a GPU where there is one)")
    add("--dtype", default="float32", help="float32, or bfloat16 for autocast")
    add("--backend", help="fastdpo's backend: auto, torch, triton or cuda")
    add(
        "--frontier",
        action="store_true",
        help="the paper's frontier of reward against KL instead, in a world of 262,144 answers; "
        "its own options: fastdpo demo --frontier --help",
    )
    parser.set_defaults(run=_demo)


def _add_ref_logps(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ref-logps",
        help="a reference's log-probabilities of a data set, once",
        description="Computes the log-probabilities of chosen and rejected answers, and of each of "
        "their tokens, under a reference, and keeps them as Parquet, for "
        "fastdpo.data.load_reference and for the columns ref_chosen_logps and ref_rejected_logps "
        "of TRL. A run that was stopped, or killed, is continued by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model", required=True, help="a Hugging Face causal language model: a directory or a name"
    )
    add(
        "--data",
        type=Path,
        required=True,
        help="preference pairs: JSON lines, .parquet, or a directory of Dataset.save_to_disk; in "
        "any of TRL's formats (chosen, rejected and perhaps prompt, strings or lists of messages), "
        "or token ids (prompt_ids, chosen_ids, rejected_ids)",
    )
    add("--out", type=Path, required=True, help="the folder to write, or to continue")
    add("--split", help="of a --data directory that has several")
    add("--adapter", help="a PEFT adapter with which the model is the reference: a directory")
    add("--tokenizer", help="a directory or a name (the model's own)")
    add("--layout", default="packed", help="of a batch: padded, packed or shared_prompts")
    add("--max-length", type=int, help="tokens of prompt and answer; longer pairs are cut")
    add("--truncation-mode", default="keep_start", help="which end stays: keep_start or keep_end")
    add("--too-long", default="error", help="of pairs that cannot be cut: error or drop")
    add(
        "--dtype", default="auto", help="of the weights: float32, bfloat16, float16; as saved: auto"
    )
    add("--autocast", help="multiply in bfloat16 or float16, as a mixed-precision training does")
    add("--attention", help="the attention implementation (the model's own)")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--device", help="cpu, cuda, ... (a GPU where there is one)")
    add("--max-tokens-per-batch", type=int, default=16_384, help="less where memory is short")
    add("--backend", help="fastdpo's backend: auto, torch, triton or cuda")
    parser.set_defaults(run=_ref_logps)


def _demo(arguments: argparse.Namespace) -> int:
    missing = _missing("transformers", "tokenizers", "matplotlib", "rich")
    if missing:
        return _bad_input(f"the demo needs {', '.join(missing)}: pip install 'fastdpo[demo]'")
    from .demo.options import InputError, Options
    from .demo.run import run

    if arguments.frontier:  # argparse knows abbreviations
        return _bad_input("--frontier should be written in full")
    given = {
        name: value for name, value in vars(arguments).items() if name not in ("run", "frontier")
    }
    try:
        run(Options(**given))
    except InputError as error:
        return _bad_input(str(error))
    return 0


def _frontier(arguments: Sequence[str]) -> int:
    missing = _missing("transformers", "matplotlib", "rich")
    if missing:
        return _bad_input(f"the demo needs {', '.join(missing)}: pip install 'fastdpo[demo]'")
    from .demo.frontier import command

    try:
        asked = command.read(arguments)
    except ValueError as error:
        return _bad_input(str(error))
    command.run(asked)
    return 0


def _ref_logps(arguments: argparse.Namespace) -> int:
    missing = _missing("transformers", "datasets", "rich")
    if missing:
        return _bad_input(f"ref-logps needs {', '.join(missing)}: pip install 'fastdpo[data]'")
    from .demo.options import InputError
    from .ref_logps import run

    try:
        run(arguments)
    except InputError as error:
        return _bad_input(str(error))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import lines

    print("\n".join(lines()))
    return 0


def _missing(*modules: str) -> list[str]:
    from importlib.util import find_spec

    return [name for name in modules if find_spec(name) is None]


def _bad_input(message: str) -> int:
    print(f"fastdpo: error: {message}", file=sys.stderr)
    return BAD_INPUT
