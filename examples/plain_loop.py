"""DPO in a plain PyTorch loop over fastdpo.integrations.hf.dpo_loss.

    python examples/plain_loop.py                                  a tiny model, made here
    python examples/plain_loop.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

PAIRS.jsonl has an object a line, with the strings prompt, chosen and rejected.
"""

from __future__ import annotations

import argparse
import copy

import tiny
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.integrations.hf import dpo_loss, with_row_index


def collate(rows, tokenizer, max_length: int = 512) -> dict[str, torch.Tensor]:
    """[2B, T] each: the B chosen sequences, then the B rejected; loss on the answers alone."""
    ids, answers = [], []
    for answer in ("chosen", "rejected"):
        for row in rows:
            prompt = tokenizer(row["prompt"]).input_ids
            end = [tokenizer.eos_token_id]
            completion = tokenizer(row[answer], add_special_tokens=False).input_ids + end
            ids.append(torch.tensor(prompt + completion)[:max_length])
            answers.append(torch.tensor([0] * len(prompt) + [1] * len(completion))[:max_length])
    batch = {
        "input_ids": pad_sequence(ids, True, tokenizer.pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], True),
        "completion_mask": pad_sequence(answers, True),
    }
    return with_row_index(batch)  # found here, so that no loss waits for a GPU


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
    pairs = tiny.read_pairs(args.data)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr or (1e-6 if args.model else 1e-3))

    for step in range(1, args.steps + 1):
        rows = [pairs[i] for i in torch.randint(len(pairs), (args.batch_size,)).tolist()]
        batch = {name: t.to(device) for name, t in collate(rows, tokenizer).items()}
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
