"""python -m benchmarks.kernels.one_launch: one launch of exp_logits, for a profiler to look at.

ncu --clock-control none --set full -k regex:exp_logits -c 1 python -m benchmarks.kernels.one_launch
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.environment import default_device
from benchmarks.inputs import make_inputs
from benchmarks.scenarios import HEADS, Scenario
from fastdpo.backends import select
from fastdpo.backends.contract import Head


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.one_launch", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--head", choices=HEADS, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--backend", help="default: fastdpo's choice")
    parser.add_argument("--device", type=torch.device, default=default_device())
    args = parser.parse_args()
    inputs = make_inputs(Scenario(args.head, args.tokens, trains="forward"), args.device)
    x, labels = inputs.hidden.flatten(0, 1), inputs.labels.flatten()
    head = Head(inputs.weight, softcap=inputs.scenario.shape.softcap)
    out = x.new_empty(args.tokens, head.vocab_size)
    with torch.no_grad():
        target = select.primitive("target_logits", x, args.backend).target_logits(x, head, labels)
        backend = select.primitive("exp_logits", x, args.backend)
        sums = backend.exp_logits(x, head, labels, target, out=out)
    logps = -torch.log1p(sums.sum * torch.exp(sums.anchor - target))
    print(f"{backend.__name__}: mean logp {float(logps.mean()):.4f} over {args.tokens} tokens")


if __name__ == "__main__":
    main()
