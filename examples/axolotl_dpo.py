"""axolotl's DPO with fastdpo: one line of its configuration.

    axolotl train CONFIG.yaml                                axolotl itself
    python examples/axolotl_dpo.py                           its two calls, on a tiny model

CONFIG.yaml, with the TRL that axolotl 0.18 pins (1.8.0):

    rl: dpo
    dpo_use_liger_kernel: true
    plugins:
      - fastdpo.integrations.axolotl.FastDPOPlugin

From TRL 1.16 on, which is what runs here, `dpo_use_liger_kernel` is left out.
"""

from __future__ import annotations

import copy
import tempfile
import types

import tiny
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fastdpo.integrations.axolotl import FastDPOPlugin


def main() -> None:
    torch.manual_seed(0)
    cfg = types.SimpleNamespace(rl="dpo", dpo_use_liger_kernel=None)
    plugin = FastDPOPlugin()
    plugin.pre_model_load(cfg)
    tokenizer = tiny.tokenizer()
    model = tiny.model(len(tokenizer))
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dataset = Dataset.from_list(tiny.read_pairs(None))
    trainer = DPOTrainer(
        model, copy.deepcopy(model), args=config, train_dataset=dataset, processing_class=tokenizer
    )
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            accuracy = float(entry["rewards/accuracies"])
            print(f"step {entry['step']}  loss {float(entry['loss']):.4f}  accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
