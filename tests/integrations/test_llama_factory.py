"""LLaMA-Factory's `concatenated_forward` (its 0.9.6.dev0), on a stand-in of its trainer, against a
transcription from logits.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastdpo.integrations import llama_factory
from fastdpo.integrations.llama_factory import concatenated_forward

transformers = pytest.importorskip("transformers", reason="needs transformers")
B, T, V = 3, 9, 53


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (2 * B, T), generator=generator)
    lengths = torch.tensor([9, 7, 8, 6, 9, 9])
    mask = (torch.arange(T) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(T) < 3), -100)
    labels[1, 5] = -100  # a turn that is not the model's
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer(loss_type="sigmoid", ld_alpha=None):
    return types.SimpleNamespace(loss_type=loss_type, ld_alpha=ld_alpha)


def from_logits(model, loss_type, ld_alpha, labels, input_ids, attention_mask):
    """Sums by sequence, token by token, and the lengths; `ld_alpha` behind the shorter length."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    sums, counts = [], []
    for s in range(2 * B):
        at = [t for t in range(1, T) if labels[s, t] != -100]
        other = (s + B) % (2 * B)
        shorter = min(len(at), int((labels[other, 1:] != -100).sum()))
        total = 0.0
        for t in at:
            weight = 1.0 if ld_alpha is None or t < at[0] + shorter else ld_alpha
            total = total + weight * logits[s, t - 1].log_softmax(-1)[labels[s, t]]
        sums.append(total)
        counts.append(len(at))
    sums, counts = torch.stack(sums), torch.tensor(counts)
    return (sums / counts if loss_type in ("ipo", "orpo", "simpo") else sums), sums / counts, logits


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo"])
def test_it_is_what_the_logits_give(loss_type, ld_alpha, reference):
    model, given = llama(), batch()
    before = {k: v.clone() for k, v in given.items()}
    found = concatenated_forward(trainer(loss_type, ld_alpha), model, given, reference)
    assert all(torch.equal(given[k], before[k]) for k in before)
    alpha = None if reference else ld_alpha
    logps, averages, logits = from_logits(model, loss_type, alpha, **given)
    expected = {
        "chosen_logps": logps[:B],
        "rejected_logps": logps[B:],
        "chosen_logps_avg": averages[:B],
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    for side, rows in (("chosen", slice(B)), ("rejected", slice(B, None))):
        at = given["labels"][rows, 1:] != -100
        means = logits[rows, :-1][at].mean(-1)
        torch.testing.assert_close(found[f"{side}_logits"], means, atol=1e-5, rtol=1e-5)
        assert not found[f"{side}_logits"].requires_grad
    weights = list(model.parameters())
    grads = torch.autograd.grad((logps * torch.arange(6.0)).sum(), weights)
    ours = torch.cat([found["chosen_logps"], found["rejected_logps"]])
    for a, b in zip(
        torch.autograd.grad((ours * torch.arange(6.0)).sum(), weights), grads, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_patch_puts_it_into_their_trainer(monkeypatch):
    class CustomDPOTrainer:
        def concatenated_forward(self, model, batch, is_ref_model=False):
            raise AssertionError("not called")

    name = "llamafactory.train.dpo.trainer"
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    sys.modules[name].CustomDPOTrainer = CustomDPOTrainer
    llama_factory.patch()
    made = CustomDPOTrainer()
    made.loss_type, made.ld_alpha = "sigmoid", None
    out = made.concatenated_forward(llama(), batch(), is_ref_model=True)
    assert out["chosen_logps"].shape == (B,)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("batch should be with input_ids and labels", {"labels": None}),
        ("batch should be of whole pairs", {"input_ids": 5, "attention_mask": 5, "labels": 5}),
    ],
)
def test_bad_input(message, changes):
    given = {k: v[: changes.get(k)] for k, v in batch().items() if changes.get(k, 1) is not None}
    with pytest.raises(ValueError, match=message):
        concatenated_forward(trainer(), llama(), given)
