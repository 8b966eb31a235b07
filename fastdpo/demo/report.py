"""What the demo says while it runs and when it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .evaluate import Evaluation
from .memory import Memory
from .sample import Answers

MIB = 2**20
TRAINING_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "grad_norm",
)


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as bars:
        yield bars


def accuracy_table(
    before: Evaluation,
    after: Evaluation,
    answers_before: Answers,
    answers_after: Answers,
    held_out: int,
) -> Table:
    table = Table(title=f"{held_out} held-out pairs", title_justify="left")
    table.add_column("the chosen answer is preferred")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for flaw in after.by_flaw:
        if flaw:
            row = (f"  rejected answer {flaw}", before.by_flaw[flaw], after.by_flaw[flaw])
            table.add_row(row[0], _percent(row[1]), _percent(row[2]))
    table.add_section()
    table.add_row(
        "by likelihood per token",
        _percent(before.preference_accuracy),
        f"[bold]{_percent(after.preference_accuracy)}[/bold]",
    )
    table.add_row(
        "by implicit reward (a tie is 50%)",
        _percent(before.reward_accuracy),
        f"[bold]{_percent(after.reward_accuracy)}[/bold]",
    )
    shares = answers_before.share_good, answers_after.share_good
    if shares[0] is not None and shares[1] is not None:
        table.add_section()
        table.add_row(
            "sampled answers that are good",
            _percent(shares[0]),
            f"[bold]{_percent(shares[1])}[/bold]",
        )
    return table


def metrics_table(metrics: Sequence[dict[str, float]]) -> Table:
    """First and last tenth of the run."""
    count = max(1, len(metrics) // 10)
    table = Table(title="Training", title_justify="left")
    table.add_column("logged")
    table.add_column(f"first {count} steps", justify="right")
    table.add_column(f"last {count} steps", justify="right")
    for name in TRAINING_METRICS:
        first = sum(row[name] for row in metrics[:count]) / count
        last = sum(row[name] for row in metrics[-count:]) / count
        table.add_row(name, f"{first:.3f}", f"{last:.3f}")
    return table


def memory_table(memory: Sequence[Memory], sequences: int, length: int) -> Table:
    table = Table(
        title=f"Peak memory of one training step beyond the weights, {sequences} sequences of "
        f"{length} tokens",
        title_justify="left",
        caption="measured at PyTorch's allocator, forward and backward, gradients included",
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("vocabulary", justify="right")
    table.add_column("eager", justify="right")
    table.add_column("fastdpo", justify="right")
    table.add_column("", justify="right")
    for m in memory:
        table.add_row(
            m.label,
            f"{m.vocab_size:,}",
            f"{m.eager / MIB:,.1f} MiB",
            f"[bold]{m.fastdpo / MIB:,.1f} MiB[/bold]",
            f"{m.eager / max(1, m.fastdpo):.1f}x less",
        )
    return table


def answers_table(before: Answers, after: Answers, rows: int) -> Table:
    """Some prompts, those whose answer became a good one first."""
    order = list(range(len(before.answers)))
    if before.good:
        order = sorted(order, key=lambda i: (before.good[i], not after.good[i]))
    table = Table(
        title="Sampled answers; those that became good come first",
        title_justify="left",
        show_lines=True,
    )
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold")
    for i in order[:rows]:
        table.add_row(*(Text(side[i]) for side in (before.prompts, before.answers, after.answers)))
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
