"""KTO: single answers, each desirable or not, with the KL estimate of mismatched ones.

    python examples/kto.py                                  a tiny model, made here
    python examples/kto.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

PAIRS.jsonl is that of the other examples: a pair is a desirable answer and another.
"""

from __future__ import annotations

import argparse
import copy

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.data import CompletionCollator, prepare
from fastdpo.integrations.hf import preference_loss, sequence_logps
from fastdpo.objectives import kl_estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="answers a step")
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
    pairs = prepare(tiny.read_pairs(args.data), tokenizer, max_length=512)
    examples = [
        {"prompt_ids": p["prompt_ids"], "completion_ids": p[f"{kind}_ids"], "label": good}
        for p in pairs
        for kind, good in (("chosen", True), ("rejected", False))
    ]
    collate = CompletionCollator(tokenizer.pad_token_id or 0, "packed")

    def on_device(rows):
        return {name: t.to(device) for name, t in collate(rows).items()}

    for step in range(1, args.steps + 1):
        rows = [examples[i] for i in torch.randint(len(examples), (args.batch_size,)).tolist()]
        # Each prompt with another's answer.
        answers = [row["completion_ids"] for row in rows[1:] + rows[:1]]
        mixed = [{**r, "completion_ids": a} for r, a in zip(rows, answers, strict=True)]
        with torch.no_grad():
            batch = on_device(mixed)
            batch.pop("desirable")
            kl = kl_estimate(*(sequence_logps(m, **batch) for m in (model, ref_model)))
        out = preference_loss(model, on_device(rows), ref_model, args.beta, objective="kto", kl=kl)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        better = (out.chosen_rewards.mean() > out.rejected_rewards.mean()).float()
        print(f"step {step}  loss {out.loss.item():.4f}  accuracy {better.item():.2f}")
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
