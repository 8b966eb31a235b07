"""A process of a sweep: `python -m fastdpo.demo.frontier.worker FOLDER`, its runs on stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .sweep import work

if __name__ == "__main__":
    work(Path(sys.argv[1]), json.load(sys.stdin))
