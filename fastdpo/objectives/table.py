"""The documentation's table of objectives, from the registry itself."""

from __future__ import annotations

from .common import COMMON_OPTIONS
from .registry import OBJECTIVES, REQUIRED, Objective, Option, names

_NOTATION = """\
w and l are the chosen and the rejected answer, π the policy's probability of an answer,
h = log π/π_ref its log-ratio, s its score (h, or f'(eʰ) of an f-divergence), n its number of
tokens, a = log π / n, σ the logistic function, β `beta`, ε `label_smoothing`."""


def markdown_table() -> str:
    """The tables of docs/objectives.md, objectives and common options, in Markdown."""
    rows = [
        _row("objective", "formula", "own options", "ε", "reference", "f-divergence", "paper"),
        _row(*["---"] * 7),
        *(_objective_row(entry) for entry in OBJECTIVES.values()),
    ]
    common = [
        _row("option", "default", "valid", "what it does", "for"),
        _row(*["---"] * 5),
        *(
            _row(
                f"`{name}`",
                f"`{entry.option.default}`",
                entry.option.valid,
                entry.option.doc,
                _takers(name),
            )
            for name, entry in COMMON_OPTIONS.items()
        ),
    ]
    return "\n".join([*_NOTATION.splitlines(), "", *rows, "", *common, ""])


def _objective_row(entry: Objective) -> str:
    layout = "" if entry.layout == "pairs" else f" ({entry.layout})"
    return _row(
        f"`{entry.name}`{layout}",
        entry.formula,
        "<br>".join(_option(option) for option in entry.options) or "–",
        "–" if entry.label_smoothing is None else str(entry.label_smoothing),
        entry.reference,
        {"composes": "yes", "unaffected": "unaffected", "refused": "–"}[entry.f_divergence],
        entry.paper,
    )


def _option(option: Option) -> str:
    default = "required" if option.default is REQUIRED else f"{option.default}"
    return f"`{option.name}` ({default}): {option.valid}; {option.doc}"


def _takers(name: str) -> str:
    takers = COMMON_OPTIONS[name].takers()
    pairs = [other for other, entry in OBJECTIVES.items() if entry.layout == "pairs"]
    if len(takers) == len(OBJECTIVES):
        return "all"
    return "all on pairs" if takers == pairs else names(takers)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
