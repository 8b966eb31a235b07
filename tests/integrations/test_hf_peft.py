"""PEFT on the output head: what it costs, and that values and gradients are those of the model's
own logits, for every kind of adapter that the head may have.
"""

from __future__ import annotations

import pytest
import torch
from hf_models import batch, build
from test_extra_columns import Fresh
from test_hf_capture import disturb, lora

from fastdpo.integrations import hf

WIDE = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 1}
RANK = 4  # of test_hf_capture.lora


def on_head(model, **options):
    model = lora(model, **{"target_modules": ["lm_head"], **options})
    disturb(model)
    return model


@pytest.mark.parametrize(
    ("workspace", "backward"), [(None, 1 + 2 * RANK / 256), (0, 2 + 3 * RANK / 256)]
)
def test_lora_on_a_frozen_head_costs_r_columns(workspace, backward):
    """Where E is kept: the frozen head's two products, and r columns three times. Nothing of the
    weight's size is made."""
    model, (input_ids, mask, labels) = on_head(build("Llama", **WIDE)), batch()
    options = {"workspace_bytes": workspace}
    hf.sequence_logps(model, input_ids, labels, mask, **options)  # the probe
    count, weight = int((labels[:, 1:] != -100).sum()), model.get_output_embeddings().weight
    unit = 2 * count * weight.numel()
    with Fresh() as there:
        logps = hf.sequence_logps(model, input_ids, labels, mask, **options)
    with Fresh() as back:
        logps.sum().backward()
    # The head's products are thousands of times those of the layer below it.
    assert there.operations / unit == pytest.approx(1 + RANK / 256, abs=0.2)
    assert back.operations / unit == pytest.approx(backward, abs=0.2)
    assert max(there.largest_made, back.largest_made) < weight.nbytes / 4
    assert weight.grad is None


def test_a_head_that_is_trained_beside_its_adapter_has_both_gradients():
    model, (input_ids, mask, labels) = on_head(build("Llama")), batch()
    head = model.get_output_embeddings()
    head.base_layer.weight.requires_grad_()
    logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    own = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    (own * (targets != -100)).sum().backward()
    expected = [p.grad.clone() for p in head.parameters()]
    model.zero_grad()
    hf.sequence_logps(model, input_ids, labels, mask).sum().backward()
    for got, want in zip([p.grad for p in head.parameters()], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
