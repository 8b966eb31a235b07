"""DPO that runs each prompt once for both of its answers.

    python examples/shared_prompts.py                                  a tiny model, made here
    python examples/shared_prompts.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

PAIRS.jsonl has TRL's formats: prompt, chosen and rejected, as strings or as messages.
"""

from __future__ import annotations

import argparse
import copy

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.data import PairCollator, prepare
from fastdpo.integrations.hf import dpo_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
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
    examples = prepare(tiny.read_pairs(args.data), tokenizer, max_length=512)
    collate = PairCollator(
        tokenizer.pad_token_id or 0,
        layout="shared_prompts",
        attention=model.config._attn_implementation,  # on a GPU "flex_attention" is the fastest
    )

    for step in range(1, args.steps + 1):
        rows = [examples[i] for i in torch.randint(len(examples), (args.batch_size,)).tolist()]
        batch = {name: t.to(device) for name, t in collate(rows).items()}
        out = dpo_loss(model, batch, ref_model=ref_model, beta=args.beta)
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
