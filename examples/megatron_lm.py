"""DPO in Megatron-LM: its GPTModel answers with the loss.

    python examples/megatron_lm.py                          a stand-in of GPTModel, made here

`forward_step` is what a training script hands to Megatron-LM's schedule (pipelines, tensor and
sequence parallelism are the model's affair); the loop below stands for the schedule.
"""

from __future__ import annotations

import copy
from functools import partial

import tiny
import torch
from plain_loop import collate
from stand_ins import GPTModel  # in Megatron-LM: megatron.core.models.gpt.GPTModel

from fastdpo.integrations.megatron import dpo_loss, token_logps


def forward_step(data_iterator, model, ref_model, beta=0.1):
    batch = next(data_iterator)  # the B chosen sequences, then the B rejected ones
    given = (batch["tokens"], batch["position_ids"], None)
    aligned = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with torch.no_grad():
        ref_logps = ref_model(*given, **aligned, output_processor=token_logps)
    output = model(
        *given,
        **aligned,
        output_processor=dpo_loss,
        output_processor_context={"ref_logps": ref_logps, "beta": beta},
    )
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask, output):
    # Under context parallelism every process has the whole loss, and gradients of its own tokens.
    right = (output["chosen_rewards"] > output["rejected_rewards"]).float().mean()
    return output["loss"], {"loss": output["loss"].detach(), "accuracy": right}


def batches(tokenizer, pairs, batch_size):
    while True:
        rows = [pairs[i] for i in torch.randint(len(pairs), (batch_size,)).tolist()]
        batch = collate(rows, tokenizer)
        ids = batch["input_ids"]
        yield {
            "tokens": ids[:, :-1],
            "labels": ids[:, 1:],  # the token that each position predicts
            "loss_mask": batch["completion_mask"][:, 1:].float(),
            "position_ids": torch.arange(ids.shape[1] - 1).expand_as(ids[:, 1:]),
        }


def main() -> None:
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    model = GPTModel(len(tokenizer))
    ref_model = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data_iterator = batches(tokenizer, tiny.read_pairs(None), 8)
    for step in range(1, 21):
        output, reduce = forward_step(data_iterator, model, ref_model)
        loss, report = reduce(output)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {report['loss'].item():.4f}  accuracy {report['accuracy']:.2f}")


if __name__ == "__main__":
    main()
