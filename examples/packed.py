"""DPO on rows without padding, filled to a budget of tokens.

    python examples/packed.py                                  a tiny model, made here
    python examples/packed.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

Batches hold pairs of like lengths, as many as fit: each step costs the same.
"""

from __future__ import annotations

import argparse
import copy

import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.data import PairCollator, TokenBudgetSampler, prepare
from fastdpo.integrations.hf import dpo_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=512, help="in a batch")
    parser.add_argument("--lr", type=float, help="1e-3 for the tiny model, else 1e-6")
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = tiny.tokenizer()
        model = tiny.model(len(tokenizer))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).train()
    ref_model = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr or (1e-6 if args.model else 1e-3))
    examples = prepare(tiny.read_pairs(args.data), tokenizer, max_length=args.max_tokens // 2)
    attention = model.config._attn_implementation  # "flash_attention_2" and "flex_attention" too
    collate = PairCollator(tokenizer.pad_token_id or 0, "packed", attention=attention)
    sampler = TokenBudgetSampler(examples, collate, args.max_tokens)
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=collate)

    step = 0
    while step < args.steps:
        for batch in loader:
            step += 1
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            out = dpo_loss(model, batch, ref_model=ref_model, beta=args.beta)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            right = (out.chosen_rewards > out.rejected_rewards).float().mean()
            print(f"step {step}  loss {out.loss.item():.4f}  accuracy {right.item():.2f}")
            if step == args.steps:
                break
        sampler.set_epoch(sampler.epoch + 1)
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
