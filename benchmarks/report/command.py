"""python -m benchmarks.report: docs/benchmarks.md and the README's table from results/*.json.

    python -m benchmarks.report            print the page's section
    python -m benchmarks.report --write    write figures and peers between their markers
    python -m benchmarks.report --check    exit with 1 where any of them says anything else
    python -m benchmarks.report --plots    draw the plots again from the JSON

Every figure comes from the documents; a peer that is faster or smaller than fastdpo is named under
the table. Files are told apart by their name: gpu-*.json and cpu-*.json, and counted.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy import shown as accuracy
from benchmarks.kernels import shown as kernels
from benchmarks.loss import shown as loss
from benchmarks.memory import shown as memory
from benchmarks.report import documents, peers, readme_table
from benchmarks.report.documents import RESULTS
from benchmarks.step import shown as step
from benchmarks.workspace import shown as workspace

ROOT = RESULTS.parent.parent
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PEERS_BEGIN, PEERS_END = "<!-- peers:begin -->", "<!-- peers:end -->"
HEADLINE_BEGIN, HEADLINE_END = "<!-- headline:begin -->", "<!-- headline:end -->"
MARKDOWN = {
    "loss": loss.markdown,
    "workspace": workspace.markdown,
    "accuracy": accuracy.markdown,
    "step": step.markdown,
    "max_tokens": loss.longest_pairs_markdown,
    "kernels": kernels.markdown,
    "counted": memory.markdown,
}
PLOTS = {
    "loss": loss.plot,
    "workspace": workspace.plot,
    "accuracy": accuracy.plot,
    "step": step.plot,
    "counted": memory.plot,
}


def render(docs: dict[str, dict[str, Any]], folder: Path = RESULTS) -> str:
    """The page's section in Markdown, GPU figures first."""
    parts = []
    on_gpu = {k: d for k, d in docs.items() if d["environment"]["device"] == "cuda"}
    counted = {k: d for k, d in docs.items() if d["kind"] == "counted"}
    on_cpu = {k: d for k, d in docs.items() if k not in on_gpu and k not in counted}
    if not on_gpu:
        parts.append(
            "GPU figures are still to be measured, by `benchmarks/gpu.sh`: the kernels' and the "
            "loss step's take a quarter of an hour, all of them half an hour."
        )
    groups = {
        "On a GPU": on_gpu,
        "What a GPU would be asked for": counted,
        "On a CPU": on_cpu,
    }
    for title, group in groups.items():
        if not group:
            continue
        parts.append(f"### {title}")
        for name, doc in group.items():
            parts.append(MARKDOWN[doc["kind"]](doc))
            for plot, what in ((f"{name}.png", ""), (f"{name}-tokens.png", ", against tokens")):
                if (folder / plot).exists():
                    parts.append(f"![{doc['title']}{what}](../benchmarks/results/{plot})")
    return "\n\n".join(parts)


def section_of(text: str, begin: str = BEGIN, end: str = END) -> str | None:
    """What stands between the markers; None without them."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        return None
    return text[text.index(begin) + len(begin) : text.index(end)].strip()


def with_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `section` between its markers.

    Raises:
        ValueError: where the text does not hold each marker once, in order.
    """
    if section_of(text, begin, end) is None:
        raise ValueError(f"the text should hold {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def draw(docs: dict[str, dict[str, Any]], folder: Path) -> None:
    for name, doc in docs.items():
        if doc["kind"] in PLOTS:
            PLOTS[doc["kind"]](doc, folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON documents")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--readme", type=Path, default=README)
    action = parser.add_mutually_exclusive_group()
    for flag in ("--write", "--check", "--plots"):
        action.add_argument(flag, action="store_true")
    args = parser.parse_args()
    docs = documents.load_all(args.results)
    if args.plots:
        draw(docs, args.results)
        return
    section = render(docs, args.results)
    if not args.write and not args.check:
        print(section)
        return
    for path, text, begin, end in (
        (args.page, section, BEGIN, END),
        (args.page, peers.table(), PEERS_BEGIN, PEERS_END),
        (args.readme, readme_table.table(docs), HEADLINE_BEGIN, HEADLINE_END),
    ):
        if args.write:
            path.write_text(with_section(path.read_text(), text, begin, end))
        elif section_of(path.read_text(), begin, end) != text:
            sys.exit(f"{path}: not what benchmarks/results and the providers say: run --write")


if __name__ == "__main__":
    main()
