"""Processes that talk to each other, for the tests of what they share: started once, given one
function after the other.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from typing import Any

import interpreter
import torch
import torch.distributed as dist
from torch import multiprocessing

# Imported once, by a server that runs nothing with them; what is not installed it leaves out.
LIBRARIES = [
    "pytest",
    "fastdpo.backends.triton",
    "fastdpo.integrations.hf",
    "transformers.trainer",
    "trl",
    "torch._inductor.compile_fx",
]


class Processes:
    """`run` has every process call the same function and returns what each of them returned."""

    def __init__(self, size: int, store: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, store, there, dict(os.environ)), daemon=True
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments, options))
        answers = [pipe.recv() for pipe in self._pipes]
        for failed, answer in answers:
            if failed:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(rank: int, size: int, store: str, pipe, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server's is that of the first pool
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.patch_once_a_launch()
    # As torchrun does: transformers and accelerate look there. (Nobody listens: there is a group.)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    # Where one of them fails, the others end too.
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    while (work := pipe.recv()) is not None:
        function, arguments, options = work
        torch.manual_seed(0)
        try:
            pipe.send((False, function(*arguments, **options)))
        except BaseException:
            pipe.send((True, f"process {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()
