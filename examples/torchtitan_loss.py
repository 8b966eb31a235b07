"""A DPO loss for torchtitan's trainer: a BaseLoss that calls the lm_head itself, once.

In torchtitan the model's forward leaves its lm_head out (`model._skip_lm_head = True`), and the
loss is given it by `set_lm_head`, as `ChunkedLossWrapper` is, whose chunks of a sequence would not
do: DPO's loss is no sum over tokens. Derive `DPOLoss` from torchtitan's `BaseLoss` there.
"""

from __future__ import annotations

import copy

import tiny
import torch
from plain_loop import collate
from torch import nn

from fastdpo.loss import linear_dpo_loss, linear_logps
from fastdpo.parallel import call_head


class DPOLoss:
    """`pred` [2B, T, D] are hidden states, chosen first; `labels` [2B, T] are shifted already."""

    def set_lm_head(self, lm_head):
        self.lm_head = lm_head

    def __call__(self, pred, labels, global_valid_tokens=None, *, ref_logps):
        def loss(hidden, weight, bias):
            return linear_dpo_loss(hidden, weight, labels, bias=bias, ref_logps=ref_logps, beta=0.1)

        out = call_head(self.lm_head, loss, pred)
        right = (out.chosen_rewards > out.rejected_rewards).float().mean()
        return out.loss, {"accuracy_mean": right}


class Decoder(nn.Module):
    """What the loss needs of torchtitan's model."""

    def __init__(self, vocab_size, dim=32):
        super().__init__()
        self.embed, self.layer = nn.Embedding(vocab_size, dim), nn.GRU(dim, dim, batch_first=True)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self._skip_lm_head = False

    def forward(self, tokens):
        hidden, _ = self.layer(self.embed(tokens))
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def token_logps(model, tokens, labels):
    def logps(hidden, weight, bias):
        return linear_logps(hidden, weight, labels, bias=bias)

    return call_head(model.lm_head, logps, model(tokens))


def main() -> None:
    torch.manual_seed(0)
    tokenizer, pairs = tiny.tokenizer(), tiny.read_pairs(None)
    model, loss_fn = Decoder(len(tokenizer)), DPOLoss()
    model._skip_lm_head = True
    loss_fn.set_lm_head(model.lm_head)
    ref_model = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(1, 21):
        rows = [pairs[i] for i in torch.randint(len(pairs), (8,)).tolist()]
        batch = collate(rows, tokenizer)
        tokens, answers = batch["input_ids"], batch["completion_mask"] == 1
        labels = torch.where(answers, tokens, -100)  # that of a position is the next token:
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        ref_logps = token_logps(ref_model, tokens, labels)
        loss, metrics = loss_fn(model(tokens), labels, ref_logps=ref_logps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}  accuracy {metrics['accuracy_mean']:.2f}")


if __name__ == "__main__":
    main()
