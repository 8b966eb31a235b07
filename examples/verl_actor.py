"""verl's actor with fastdpo's kernels: a forward that returns log-probabilities and entropies.

    python examples/verl_actor.py                            a tiny model, made here

In verl itself two lines do it, before the worker makes its model (and `use_fused_kernels: true`
with the backend triton in the actor's configuration):

    from fastdpo.integrations.verl import patch
    patch()

Here the same call, as verl's forward makes it, is trained with DPO's loss.
"""

from __future__ import annotations

import copy

import tiny
import torch
from plain_loop import collate

from fastdpo import preference_loss
from fastdpo.integrations.verl import linear_cross_entropy


def forward(model, input_ids, attention_mask, temperature=1.0):
    """As verl's `forward_with_triton_backend`: every position's log-probability of the next."""
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    rolled = torch.roll(input_ids, shifts=-1, dims=-1)
    log_probs, entropy = linear_cross_entropy(
        hidden, model.lm_head.weight, rolled, temperature, "none"
    )
    return log_probs.view_as(input_ids), entropy.view_as(input_ids)


def sequence_logps(model, batch):
    log_probs, _ = forward(model, batch["input_ids"], batch["attention_mask"])
    return (log_probs[:, :-1] * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)


def main() -> None:
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    model = tiny.model(len(tokenizer))
    ref_model = copy.deepcopy(model).eval()
    pairs = tiny.read_pairs(None)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(1, 21):
        rows = [pairs[i] for i in torch.randint(len(pairs), (8,)).tolist()]
        batch = collate(rows, tokenizer)
        with torch.no_grad():
            reference = sequence_logps(ref_model, batch)
        losses, chosen, rejected = preference_loss(
            *sequence_logps(model, batch), *reference, beta=0.1
        )
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        right = (chosen > rejected).float().mean()
        print(f"step {step}  loss {losses.mean().item():.4f}  accuracy {right:.2f}")


if __name__ == "__main__":
    main()
