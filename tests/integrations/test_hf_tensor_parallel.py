"""Hugging Face models that transformers spreads over processes: what one process finds."""

from __future__ import annotations

import pytest
import torch
from hf_models import batch, build

from fastdpo.integrations import hf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")

transformers = pytest.importorskip("transformers", reason="needs transformers")
FIRST = transformers.__version__.startswith("5.0.")
needs_a_spread_head = pytest.mark.skipif(
    FIRST, reason="transformers 5.0 spreads the layers and leaves the head whole: needs a newer one"
)

VOCAB = 54  # transformers asks for whole shares
FAMILIES = ["Llama", "Qwen2", "Gemma2", "Cohere", "Phi"]


@pytest.fixture
def saved(tmp_path):
    """Saves a policy and a reference of the family, and says where."""

    def save(family):
        torch.manual_seed(0)
        for name in ("policy", "reference"):
            build(family, vocab_size=VOCAB).save_pretrained(tmp_path / name)
        return str(tmp_path)

    return save


def load(directory, name, spread, train_head=True):
    from transformers import AutoModelForCausalLM

    options = {"tp_plan": "auto"} if spread else {}
    model = AutoModelForCausalLM.from_pretrained(
        f"{directory}/{name}", dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    weight = model.get_output_embeddings().weight
    spread_head = spread and not FIRST
    assert hasattr(weight, "device_mesh") == spread_head
    assert (hf.vocab_parallel(model) is not None) == spread_head
    model.get_output_embeddings().requires_grad_(train_head)
    return model


def step(directory, spread, train_head, same=False, **options):
    """The loss, the log-probabilities and every parameter's gradient."""
    policy = load(directory, "policy", spread, train_head)
    reference = load(directory, "policy" if same else "reference", spread)
    input_ids, attention_mask, labels = batch()
    pairs = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    output = hf.dpo_loss(policy, pairs, reference, beta=0.3, **options)
    output.loss.backward()
    gradients = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in policy.named_parameters()
        if p.grad is not None
    }
    return [t.detach() for t in output[:5]], gradients, output.tokens


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step(processes, saved, family, train_head):
    if FIRST and family == "Phi":
        pytest.skip("transformers 5.0 gives the biases of spread layers no gradient")
    directory = saved(family)
    expected, gradients, tokens = step(directory, False, train_head, stats=("entropy",))
    for found, grads, found_tokens in processes.run(
        step, directory, True, train_head, stats=("entropy",)
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found_tokens.entropy, tokens.entropy, atol=1e-4, rtol=1e-4)
        assert grads.keys() == gradients.keys()
        for name, g in gradients.items():
            torch.testing.assert_close(
                grads[name], g, atol=2e-4 * float(g.abs().max()), rtol=0, msg=name
            )


def test_equal_weights_give_ln_2_to_the_bit(processes, saved):
    for found, *_ in processes.run(step, saved("Gemma2"), True, True, same=True):
        assert found[0].item() == torch.tensor(2.0).log().item()


@needs_a_spread_head
def test_the_head_as_the_loss_takes_it(processes, saved):
    assert processes.run(_shapes, saved("Phi")) == [((27, 32), (27,), (27, 27))] * 2


def _shapes(directory):
    model = load(directory, "policy", True)
    head, spread = hf.read_head(model), hf.vocab_parallel(model)
    return tuple(head.weight.shape), tuple(head.bias.shape), spread.sizes


def test_one_process_spreads_nothing():
    assert hf.vocab_parallel(build("Llama")) is None


def test_a_label_of_another_process_is_in_range(processes, saved):
    processes.run(_labels, saved("Llama"))


def _labels(directory):
    model = load(directory, "policy", True)
    ids = torch.tensor([[1, 2, VOCAB - 1, 0]])
    assert hf.sequence_logps(model, ids, ids).isfinite().all()
    with pytest.raises(ValueError, match=rf"labels should be in \[0, {VOCAB}\)"):
        hf.sequence_logps(model, ids, torch.tensor([[1, 2, VOCAB, 0]]))


@needs_a_spread_head
def test_lora_on_the_head_is_refused(processes, saved):
    pytest.importorskip("peft")
    processes.run(_lora_on_the_head, saved("Llama"))


def _lora_on_the_head(directory):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load(directory, "policy", True), LoraConfig(r=2, target_modules=["lm_head"])
    )
    with pytest.raises(hf.UnsupportedModel, match="LoRA on the head"):
        hf.sequence_logps(model, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3).long())
