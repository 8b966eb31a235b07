"""DPO of a LoRA adapter: the base model is the reference, and the lm_head is frozen.

    python examples/lora.py                                  a tiny model, made here
    python examples/lora.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

The forward multiplies by the lm_head once and forms the gradient of the hidden states on the way:
two products a step, where a trained head takes three. Batches are those of plain_loop.py.
"""

from __future__ import annotations

import argparse

import tiny
import torch
from peft import LoraConfig, get_peft_model
from plain_loop import collate
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.integrations.hf import dpo_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", help="where to save the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--lr", type=float, help="1e-2 for the tiny model, else 1e-5")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        base = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = tiny.tokenizer()
        base = tiny.model(len(tokenizer))
    # No dropout: policy and reference are one network, with and without the adapter.
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.0,
        target_modules="all-linear",  # but the lm_head
        task_type="CAUSAL_LM",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = get_peft_model(base, config).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr or (1e-5 if args.model else 1e-2))
    pairs = tiny.read_pairs(args.data)

    for step in range(1, args.steps + 1):
        rows = [pairs[i] for i in torch.randint(len(pairs), (args.batch_size,)).tolist()]
        batch = {name: t.to(device) for name, t in collate(rows, tokenizer).items()}
        out = dpo_loss(model, batch)  # no ref_model: the adapter is disabled for it
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
