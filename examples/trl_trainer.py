"""TRL's DPOTrainer with fastdpo's log-probabilities.

    python examples/trl_trainer.py                           a tiny model, made here
    python examples/trl_trainer.py --model DIR_OR_NAME --data PAIRS.jsonl --output DIR

Needs TRL 1.16 or later. Everything but the one line with `use_fastdpo` is TRL's usual script.
"""

from __future__ import annotations

import argparse
import copy

import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fastdpo.integrations.trl import use_fastdpo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a directory or a name")
    parser.add_argument("--data", help="JSON lines; made up where none are given")
    parser.add_argument("--output", default="out/trl", help="the trainer's output directory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
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
    config = DPOConfig(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr or (1e-6 if args.model else 1e-3),
        lr_scheduler_type="constant",
        loss_type=[args.loss_type],
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
    )
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model),  # the reference; None for adapters
        args=config,
        train_dataset=Dataset.from_list(tiny.read_pairs(args.data)),
        processing_class=tokenizer,
    )
    use_fastdpo(trainer)  # before train()
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
