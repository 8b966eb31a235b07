"""The loop of the original DPO repository, with its two functions from fastdpo.

    python examples/original_repository.py                   a tiny model, made here
    python examples/original_repository.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

The logits exist here, as they do there: what is saved is the passes over them. They are read once,
and their gradient is written over them. plain_loop.py does without them.
"""

from __future__ import annotations

import argparse
import copy

import tiny
import torch
from plain_loop import collate
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import get_batch_logps, preference_loss


def concatenated_forward(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of the chosen and of the rejected answers, [B] each."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = torch.where(batch["completion_mask"].bool(), batch["input_ids"], -100)
    return get_batch_logps(logits, labels, inplace_backward=True).chunk(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--lr", type=float, help="1e-3 for the tiny model, else 5e-7")
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
    optimizer = torch.optim.RMSprop(model.parameters(), args.lr or (5e-7 if args.model else 1e-3))

    for step in range(1, args.steps + 1):
        rows = [pairs[i] for i in torch.randint(len(pairs), (args.batch_size,)).tolist()]
        batch = {name: t.to(device) for name, t in collate(rows, tokenizer).items()}
        policy = concatenated_forward(model, batch)
        with torch.no_grad():
            reference = concatenated_forward(ref_model, batch)
        losses, chosen, rejected = preference_loss(*policy, *reference, beta=args.beta)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        right = (chosen > rejected).float().mean().item()
        print(f"step {step}  loss {losses.mean().item():.4f}  accuracy {right:.2f}")
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
