"""The order in which blocks run and copies arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Scheduled:
    """What launches kernels: in order, or as a seed shuffles blocks and arrivals."""

    seed = 0

    @contextlib.contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        self.seed = seed
        try:
            yield
        finally:
            self.seed = 0
