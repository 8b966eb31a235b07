"""DPO against a reference that is computed once, kept on the disk, and not in memory afterwards.

    python examples/cached_reference.py                          a tiny model, made here
    python examples/cached_reference.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

PAIRS.jsonl has an object a line, in any of TRL's preference formats. Needs datasets. Run again, it
finds the reference in DIR-reference, and continues there if it was killed.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.data import PairCollator, TokenBudgetSampler, prepare, reference_logps
from fastdpo.integrations.hf import dpo_loss


def epochs(loader, sampler):
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, help="a batch (256 for the tiny model, or 8192)")
    parser.add_argument("--lr", type=float, help="1e-3 for the tiny model, else 1e-6")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = tiny.tokenizer()
        model = tiny.model(len(tokenizer))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    pairs = prepare(tiny.read_pairs(args.data), tokenizer)
    collator = PairCollator(tokenizer.pad_token_id or 0, layout="shared_prompts")
    tokens = args.max_tokens or (8192 if args.model else 256)
    sampler = TokenBudgetSampler(pairs, collator, tokens)
    folder = f"{args.output}-reference" if args.output else tempfile.mkdtemp()
    # In the batches of the first epoch: its first step has a margin of exactly 0.
    batches = sampler.batches()
    rows = reference_logps(model, pairs, collator, folder, batches=batches, tokenizer=tokenizer)
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=collator)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr or (1e-6 if args.model else 1e-3))
    for step, batch in enumerate(itertools.islice(epochs(loader, sampler), args.steps), start=1):
        out = dpo_loss(model, {name: t.to(model.device) for name, t in batch.items()})
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right = (out.chosen_rewards > out.rejected_rewards).float().mean()
        print(f"step {step}  loss {out.loss.item():.4f}  accuracy {right.item():.2f}")
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
