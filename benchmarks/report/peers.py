"""The table of peers in docs/benchmarks.md: who each is, and what it cannot do for a DPO step."""

from __future__ import annotations

from benchmarks.providers import FastDPO, registry
from benchmarks.report.markdown import line


def table() -> str:
    rows = [
        line(f"`{p.name}`", p.summary, p.cannot) for p in registry() if not isinstance(p, FastDPO)
    ]
    return "\n".join([line("peer", "what it is", "what it cannot do"), line(*["---"] * 3), *rows])
