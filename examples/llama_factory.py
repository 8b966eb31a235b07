"""LLaMA-Factory's DPO without logits.

    python examples/llama_factory.py                         a stand-in of its trainer, made here
    python examples/llama_factory.py CONFIG.yaml             LLaMA-Factory itself

With a configuration it is `llamafactory-cli train CONFIG.yaml` after one call.
"""

from __future__ import annotations

import copy
import sys

import tiny
import torch
from plain_loop import collate
from stand_ins import CustomDPOTrainer

from fastdpo.integrations.llama_factory import concatenated_forward, patch


def with_llama_factory() -> None:
    from llamafactory.train.tuner import run_exp

    patch()
    run_exp()  # reads the command line


def with_a_stand_in() -> None:
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    model = tiny.model(len(tokenizer))
    CustomDPOTrainer.concatenated_forward = concatenated_forward  # as patch() does
    trainer = CustomDPOTrainer(model, copy.deepcopy(model).eval())
    pairs = tiny.read_pairs(None)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(1, 21):
        rows = [pairs[i] for i in torch.randint(len(pairs), (8,)).tolist()]
        batch = collate(rows, tokenizer)
        mask = batch["completion_mask"].bool()
        batch = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.where(mask, batch["input_ids"], -100),
        }
        loss, metrics = trainer.get_batch_loss_metrics(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracy = metrics["rewards/accuracies"]
        print(f"step {step}  loss {loss.item():.4f}  accuracy {accuracy:.2f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        with_llama_factory()
    else:
        with_a_stand_in()
