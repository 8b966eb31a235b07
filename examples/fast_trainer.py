"""TRL's DPOTrainer with shared prompts, a budget of tokens and a reference that is computed once.

    python examples/fast_trainer.py                          a tiny model, made here
    python examples/fast_trainer.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

Needs TRL 1.16 or later. FastDPOConfig and FastDPOTrainer take the place of TRL's classes.
"""

from __future__ import annotations

import argparse

import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.integrations.trl import FastDPOConfig, FastDPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", default="out/fast", help="the trainer's output directory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=512, help="in a batch")
    parser.add_argument("--layout", default="shared_prompts", help="or packed, or padded")
    parser.add_argument("--lr", type=float, help="1e-3 for the tiny model, else 1e-6")
    parser.add_argument("--loss-type", default="sigmoid", help="any of TRL's")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = tiny.tokenizer()
        model = tiny.model(len(tokenizer))
    config = FastDPOConfig(
        output_dir=args.output,
        max_steps=args.steps,
        layout=args.layout,
        max_tokens_per_batch=args.max_tokens,
        max_length=args.max_tokens // 2,
        precompute_ref_log_probs=True,
        learning_rate=args.lr or (1e-6 if args.model else 1e-3),
        lr_scheduler_type="constant",
        loss_type=[args.loss_type],
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
    )
    trainer = FastDPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(tiny.read_pairs(args.data)),
        processing_class=tokenizer,
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(
                f"step {entry['step']}  loss {float(entry['loss']):.4f}  "
                f"accuracy {float(entry['rewards/accuracies']):.2f}"
            )
    trainer.save_model()


if __name__ == "__main__":
    main()
