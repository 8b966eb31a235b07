"""The demo from its first line to its last."""

from __future__ import annotations

import dataclasses
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from .. import __version__
from . import model as models
from . import output, plot, report, synthetic
from .collate import Example, collate, encode_all
from .evaluate import Evaluation, Evaluator
from .memory import Memory, measure
from .options import Options
from .pairs import Pair, read_pairs
from .sample import Answers, sample
from .setting import Setting
from .train import ask_reference, pretrain, train

SYNTHETIC_PAIRS = 1500
HELD_OUT = 0.15
MOST_HELD_OUT = 200
EVALUATIONS = 10
SHOWN = 5
# What the tiny model has read before: a place where good answers are rare.
FLAWED_PER_GOOD = 2.0
# Shown beside the tiny model's own vocabulary, where there are few logits to save: Llama 2's.
LARGE_VOCABULARY = 32_000


@dataclass
class Run:
    """What the run has found out so far."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)  # before, after


def run(options: Options, console: Console | None = None) -> None:
    """
    Raises:
        InputError: something that was given cannot be used. Nothing is written then.
    """
    console = Console() if console is None else console
    start = time.perf_counter()
    options.check()
    models.quiet_libraries(options)
    pairs = read_pairs(options.data) if options.data else None
    if pairs is None:
        pairs = synthetic.make_pairs(SYNTHETIC_PAIRS, options.seed)
    model, tokenizer = _model_and_tokenizer(options, pairs)
    random.Random(options.seed).shuffle(pairs)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        examples = encode_all(pairs, tokenizer, _room(model, options))
    held_out = examples[: max(1, min(MOST_HELD_OUT, int(HELD_OUT * len(examples))))]
    training = examples[len(held_out) :]
    setting = Setting(options, options.torch_device, tokenizer.pad_token_id)
    _introduce(console, options, model, tokenizer, len(training), len(held_out))
    for note in noted:
        if note.category is UserWarning:
            console.print(f"Note: {note.message}", markup=False)

    done = Run()
    with report.progress(console) as bars:
        model = _pretrain(model.to(setting.device), tokenizer, training, setting, bars)
        _dpo(model, tokenizer, training, held_out, setting, done, bars)
        _measure_memory(model, tokenizer, training, setting, done, bars)
    _show(console, done, training[: options.batch_size], len(held_out))
    _save(models.merged(model), tokenizer, held_out, setting, done)
    console.print(
        f"Saved in [bold]{options.output}[/bold]: model/ (loaded again and compared), plot.png, "
        f"metrics.jsonl, summary.json. {time.perf_counter() - start:.0f} s in all."
    )


def _model_and_tokenizer(options: Options, pairs: Sequence[Pair]) -> tuple[nn.Module, Any]:
    if options.model is not None:
        model, tokenizer = models.load(options.model)
    else:
        tokenizer = models.make_tokenizer(_contents(pairs))
        model = models.make_model(tokenizer, options.max_length)
    return model, tokenizer


def _contents(pairs: Sequence[Pair]) -> list[str]:
    parts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    return [
        content
        for part in parts
        for content in ([part] if isinstance(part, str) else [m["content"] or "" for m in part])
    ]


def _room(model: Any, options: Options) -> int:
    """--max-length, or the longest sequence that the model can read where that is less."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(options.max_length, longest or options.max_length)


def _introduce(
    console: Console, options: Options, model: nn.Module, tokenizer: Any, training: int, held: int
) -> None:
    device = options.torch_device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"[bold]fastdpo {__version__}[/bold] on {where}, {options.dtype}: "
        f"{options.model or 'a new Llama'} of {parameters:.1f} M parameters, vocabulary "
        f"{len(tokenizer):,}\n{training} pairs to train on and {held} held out, from "
        f"{options.data or 'the synthetic task'}; objective {options.objective}, "
        f"beta {options.beta:g}, learning rate {options.learning_rate:g}"
        f"{', LoRA' if options.lora else ''}"
    )


def _pretrain(
    model: nn.Module,
    tokenizer: Any,
    training: Sequence[Example],
    setting: Setting,
    bars: Progress,
) -> nn.Module:
    options = setting.options
    if options.pretraining_steps:
        bar = bars.add_task("Pre-training", total=options.pretraining_steps, note="")
        pretrain(
            model,
            training,
            setting,
            1.0 if options.data else FLAWED_PER_GOOD,
            lambda step, loss: bars.update(bar, completed=step, note=f"loss {loss:.2f}"),
        )
    return models.with_adapters(model) if options.lora else model


def _dpo(
    model: nn.Module,
    tokenizer: Any,
    training: Sequence[Example],
    held_out: Sequence[Example],
    setting: Setting,
    done: Run,
    bars: Progress,
) -> None:
    options = setting.options
    if options.uses_reference:
        everything = [*training, *held_out]
        bar = bars.add_task("Reference", total=len(everything), note="")
        ask_reference(model, everything, setting, lambda count: bars.advance(bar, count))
    evaluate = Evaluator(held_out, setting)
    # A small model answers them all in a second, a large one is asked for a glimpse.
    asked = held_out if options.model is None else held_out[:SHOWN]
    done.answers.append(sample(model, tokenizer, asked, setting))
    done.evaluations.append((0, evaluate(model)))
    every = max(1, options.steps // EVALUATIONS)
    bar = bars.add_task("DPO", total=options.steps, note="")

    def on_step(step: int, metrics: dict[str, float]) -> None:
        row = {"step": float(step), **metrics}
        if step % every == 0 or step == options.steps:
            evaluation = evaluate(model)
            done.evaluations.append((step, evaluation))
            row |= {
                "eval_preference_accuracy": evaluation.preference_accuracy,
                "eval_rewards/accuracies": evaluation.reward_accuracy,
                "eval_rewards/margins": evaluation.reward_margin,
            }
        done.metrics.append(row)
        accuracy = done.evaluations[-1][1].preference_accuracy
        note = f"loss {metrics['loss']:.3f}  held-out accuracy {100 * accuracy:.0f}%"
        bars.update(bar, completed=step, note=note)

    train(model, training, setting, on_step)
    done.answers.append(sample(model, tokenizer, asked, setting))


def _measure_memory(
    model: nn.Module,
    tokenizer: Any,
    training: Sequence[Example],
    setting: Setting,
    done: Run,
    bars: Progress,
) -> None:
    options = setting.options
    batch = collate(training[: options.batch_size], setting.pad_token_id, setting.device)
    measured = [(model, "this model")]
    if options.model is None:
        larger = models.make_model(tokenizer, options.max_length, LARGE_VOCABULARY)
        if options.lora:
            larger = models.with_adapters(larger)
        measured.append((larger.to(setting.device), "with Llama 2's vocabulary"))
    bar = bars.add_task("Memory", total=len(measured), note="")
    for candidate, label in measured:
        memory = measure(candidate, batch, setting, label)
        if memory is not None:
            done.memory.append(memory)
        bars.advance(bar)


def _show(console: Console, done: Run, batch: Sequence[Example], held_out: int) -> None:
    (_, before), (_, after) = done.evaluations[0], done.evaluations[-1]
    answers_before, answers_after = done.answers
    console.print()
    console.print(report.answers_table(answers_before, answers_after, SHOWN))
    console.print(report.metrics_table(done.metrics))
    console.print(report.accuracy_table(before, after, answers_before, answers_after, held_out))
    if done.memory:
        length = max(len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in batch)
        console.print(report.memory_table(done.memory, 2 * len(batch), length))
    else:
        console.print("Peak memory: not measured, this device's allocator keeps no account of it.")


def _save(
    model: Any, tokenizer: Any, held_out: Sequence[Example], setting: Setting, done: Run
) -> None:
    options = setting.options
    with output.directory(options.output) as folder:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        _check_saved(folder / "model", held_out, setting, done)
        output.write_lines(folder / "metrics.jsonl", done.metrics)
        output.write_json(folder / "summary.json", _summary(options, done))
        title = (
            f"{options.objective} on {options.data or 'the synthetic task'}, "
            f"{options.model or 'a 1 M parameter Llama'}, fastdpo {__version__}"
        )
        plot.draw(
            folder / "plot.png", done.metrics, done.evaluations, done.answers, done.memory, title
        )


def _check_saved(folder: Path, held_out: Sequence[Example], setting: Setting, done: Run) -> None:
    """What was saved is what was trained: its held-out margin is the same."""
    saved, _ = models.load(str(folder))
    again = Evaluator(held_out, setting)(saved.to(setting.device))
    margin = done.evaluations[-1][1].reward_margin
    if abs(again.reward_margin - margin) > 0.01 * abs(margin) + 1e-3:
        raise RuntimeError(
            f"the saved model has a held-out reward margin of {again.reward_margin:.4f}, the "
            f"trained one {margin:.4f}"
        )


def _summary(options: Options, done: Run) -> dict[str, Any]:
    before, after = done.evaluations[0][1], done.evaluations[-1][1]
    return {
        "fastdpo": __version__,
        "torch": torch.__version__,
        "device": str(options.torch_device),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(options).items()
        },
        "held_out_before": dataclasses.asdict(before),
        "held_out_after": dataclasses.asdict(after),
        "peak_step_bytes": [dataclasses.asdict(memory) for memory in done.memory],
        "answers_before": dataclasses.asdict(done.answers[0]),
        "answers_after": dataclasses.asdict(done.answers[1]),
    }
