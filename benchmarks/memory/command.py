"""python -m benchmarks.memory: the memory of a step at the size of real models, without a GPU.

The step runs on a GPU that is not there, on tensors without data (`instruments.fake_gpu`): every
allocation that PyTorch's allocator would be asked for is counted, none is made. What is missing of
a real peak: the allocator's rounding, the vendor's workspaces, and scratch inside an operator (of
fastdpo's: 4 bytes per row and tile of 128 columns, 8 MB for a block of 2,048 rows).

Counted and not measured: on a GPU `benchmarks.loss` measures the same, and says so.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: kernels are there, and not run

from benchmarks.environment import environment
from benchmarks.inputs import IGNORE_INDEX, Inputs
from benchmarks.instruments.fake_gpu import DEVICE, FakeGPU
from benchmarks.loss.runner import failure
from benchmarks.memory import shown
from benchmarks.providers import Provider, by_name
from benchmarks.report import documents, terminal
from benchmarks.scenarios import DTYPES, HEADS, TRAINS, Scenario

METHOD = (
    "bytes that PyTorch's allocator is asked for in one step, at their peak, less inputs and "
    "gradients; counted on tensors without data"
)
PROVIDERS = (
    *("fastdpo", "fastdpo-w0", "eager", "compiled", "trl-selective", "torch-lce"),
    *("torch-lce-chunked", "torch-lce-balanced", "torch-lce-accurate", "torch-lce-sum"),
    *("torch-lce-twice", "trl-chunked", "liger-1", "liger-scaled", "liger-sm90", "flash-attn"),
    *("cce", "cce-exact"),
)
_LLAMA = Scenario("llama-3-8b", 8192, share=0.5)
SCENARIOS = [
    *(replace(_LLAMA, tokens=t, sequences=16) for t in (2048, 8192, 32_768, 131_072)),
    replace(_LLAMA, trains="frozen"),
    replace(_LLAMA, trains="forward"),
    Scenario("qwen2.5-0.5b", 8192, share=0.5),
    Scenario("qwen2.5-7b", 8192, share=0.5),
    Scenario("gemma-2-2b", 8192, share=0.5),
    Scenario("mistral-7b", 8192, share=0.5),
]


def inputs_without_data(scenario: Scenario, gpu: FakeGPU) -> Inputs:
    count, length, shape = scenario.sequences, scenario.length, scenario.shape
    there: dict[str, Any] = {"device": DEVICE, "dtype": DTYPES[scenario.dtype]}
    hidden = torch.empty(count, length, shape.hidden_size, **there)
    weight = torch.empty(shape.vocab_size, shape.hidden_size, **there)
    labels = torch.randint(shape.vocab_size, (count, length))
    labels[:, : length - scenario.loss_tokens // count] = IGNORE_INDEX
    reference = hidden.clone(), weight, torch.zeros(count, device=DEVICE)
    hidden.requires_grad_(scenario.trains != "forward")
    weight = weight.detach().requires_grad_(scenario.trains == "head")
    return Inputs(scenario, hidden, weight, gpu.put(labels), *reference)


def extra_bytes(provider: Provider, scenario: Scenario) -> int:
    """Peak bytes of one step beyond inputs and gradients."""
    with FakeGPU(data=False) as gpu:
        inputs = inputs_without_data(scenario, gpu)
        before = gpu.reset_peak()
        provider.step(inputs)
        return gpu.peak_bytes - before - inputs.gradient_bytes


def row(provider: Provider, scenario: Scenario) -> dict[str, Any]:
    found: dict[str, Any] = {
        "provider": provider.name,
        "summary": provider.summary,
        "scenario": scenario.as_dict(),
        "status": "ok",
    }
    if provider.compiles:  # what a compiler fuses, and CCE's kernels, happen on a real GPU only
        return found | {"status": "absent", "reason": "what it allocates is its compiler's choice"}
    with FakeGPU(data=False):
        reason = provider.absent(DEVICE)
    if reason:
        return found | {"status": "absent", "reason": reason}
    reason = provider.refuses(scenario)
    if reason:
        return found | {"status": "refused", "reason": reason}
    try:
        found["extra_bytes"] = extra_bytes(provider, scenario)
    except Exception as error:  # whatever a peer raises is its result
        found |= {"status": "failed", "reason": failure(error)}
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0]
    )
    made.add_argument("--head", choices=HEADS, help="one scenario, with the options below")
    made.add_argument("--tokens", type=int, nargs="+", default=[8192])
    made.add_argument("--share", type=float, default=0.5, help="of tokens that carry loss")
    made.add_argument("--trains", choices=TRAINS, default="head")
    made.add_argument("--sequences", type=int, default=8)
    made.add_argument("--providers", nargs="+", default=PROVIDERS)
    made.add_argument("--out", type=Path, help="write OUT.json and OUT.png (no suffix here)")
    return made


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    if not args.head:
        return SCENARIOS
    return [
        Scenario(args.head, tokens, args.share, args.trains, sequences=args.sequences)
        for tokens in args.tokens
    ]


def main() -> None:
    args = parser().parse_args()
    if torch.cuda.is_available():
        parser().error("there is a GPU here: `python -m benchmarks.loss` measures its memory")
    try:
        chosen, providers = scenarios(args), by_name(args.providers)
    except ValueError as error:
        parser().error(str(error))
    env = environment(torch.device("cpu"))
    rows = []
    with terminal.progress("counted", len(chosen)) as tick:
        for scenario in chosen:
            tick(scenario.name)
            rows += [row(provider, scenario) for provider in providers]
    shown.table(rows)
    title = "Memory of a step, counted"
    doc = documents.document("counted", title, env, {"memory": METHOD}, rows)
    if args.out:
        documents.save(doc, args.out.with_suffix(".json"))
        shown.plot(doc, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
