"""Draws every figure again, from results.json alone: python examples/frontier/draw.py [FOLDER]"""

from __future__ import annotations

import sys
from pathlib import Path

from fastdpo.demo.frontier import figures
from fastdpo.demo.frontier.results import load

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "figures"
    print("\n".join(figures.draw(load(HERE / "results.json"), folder)))
