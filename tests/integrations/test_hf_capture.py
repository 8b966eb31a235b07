"""How the hidden states are caught: wrappers, modes, refusals, and a model that is left as it
was."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import assert_same_gradients, batch, build, eager_token_logps, gradients
from torch import nn

from fastdpo.integrations import hf

CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def eager_logps(model, input_ids, labels, **kwargs):
    return eager_token_logps(model, input_ids, labels, **kwargs).sum(-1)


def test_the_models_own_head_never_sees_the_batch():
    model = build("Llama")
    input_ids, attention_mask, labels = batch()
    shapes = []
    model.lm_head.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    for _ in range(2):
        hf.sequence_logps(model, input_ids, labels, attention_mask)
    vocab = model.config.vocab_size
    assert [shape for shape in shapes if shape[1]] == [(1, 16, vocab)]  # the probe's rows, once
    assert shapes[-2:] == [(1, 16, vocab), (4, 0, vocab)]


def test_the_model_is_left_as_it_was_even_by_a_forward_that_fails():
    model = build("Llama").train()
    head, keys = model.lm_head, list(model.state_dict())
    input_ids, attention_mask, labels = batch()
    hf.sequence_logps(model, input_ids, labels, attention_mask)
    assert model.lm_head is head
    assert head.training
    with pytest.raises(ValueError, match="inputs_embeds"):
        hf.sequence_logps(model, input_ids, labels, attention_mask, inputs_embeds="nonsense")
    with pytest.raises(ValueError):
        hf.sequence_logps(model, input_ids, labels.fill_(10_000))
    assert model.lm_head is head
    assert list(model.state_dict()) == keys


def test_per_token_results_stand_at_the_tokens_they_are_about():
    model = build("Gemma2")
    input_ids, attention_mask, labels = batch(padding="left")
    expected = eager_token_logps(model, input_ids, labels, attention_mask=attention_mask)
    got = hf.sequence_logps(
        model,
        input_ids,
        labels,
        attention_mask,
        per_token=True,
        stats=("entropy", "mean_logits", "is_top1"),
    )
    torch.testing.assert_close(got.logps, expected, **CLOSE)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    logps = logits.log_softmax(-1)
    carries = labels[:, 1:] != -100
    entropy = -(logps.exp() * logps).sum(-1) * carries
    torch.testing.assert_close(got.entropy[:, 1:], entropy, **CLOSE)
    torch.testing.assert_close(got.mean_logits[:, 1:], logits.mean(-1) * carries, **CLOSE)
    assert torch.equal(got.is_top1[:, 1:], (logits.argmax(-1) == labels[:, 1:]) & carries)
    for field in (got.logps, got.entropy, got.mean_logits, got.is_top1):
        assert field.shape == labels.shape
        assert not field[:, 0].any()

    averages = hf.sequence_logps(model, input_ids, labels, attention_mask, average_log_prob=True)
    torch.testing.assert_close(averages, expected.sum(-1) / carries.sum(-1), **CLOSE)


def test_temperature_divides_the_logits():
    model = build("Gemma2")
    input_ids, _, labels = batch()
    got = hf.sequence_logps(model, input_ids, labels, temperature=2.0)
    logits = model(input_ids=input_ids).logits[:, :-1] / 2.0
    logps = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(got, (logps * (labels[:, 1:] != -100)).sum(-1), **CLOSE)


@pytest.mark.parametrize("first", ["compiled alone", "through fastdpo"])
def test_torch_compile_in_either_order_without_recompiling(first):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = build("Llama"), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    input_ids, attention_mask, labels = batch()
    expected = eager_logps(model, input_ids, labels, attention_mask=attention_mask)
    expected.sum().backward()
    expected_grads = gradients(model)

    if first == "compiled alone":
        assert compiled(input_ids=input_ids, attention_mask=attention_mask).logits.shape[1] == 11
    for call in range(4):
        got = hf.sequence_logps(compiled, input_ids, labels, attention_mask)
        torch.testing.assert_close(got, expected, **CLOSE)
        got.sum().backward()
        assert_same_gradients(gradients(model), expected_grads)
        if call == 1:
            count = counter.frame_count
    assert counter.frame_count == count
    # And the compiled model still has its logits.
    assert compiled(input_ids=input_ids, attention_mask=attention_mask).logits.shape[1] == 11


def test_distributed_data_parallel(tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    model = build("Qwen2")  # tied: one parameter, two uses
    input_ids, attention_mask, labels = batch()
    eager_logps(model, input_ids, labels, attention_mask=attention_mask).sum().backward()
    expected = gradients(model)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for unused in (False, True):
            wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
            for _ in range(2):
                hf.sequence_logps(wrapped, input_ids, labels, attention_mask).sum().backward()
                assert_same_gradients(gradients(model), expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_around_the_call_or_inside_the_models_forward(inside):
    model = build("Llama")
    input_ids, attention_mask, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = eager_logps(model, input_ids, labels, attention_mask=attention_mask)
    expected.sum().backward()
    expected_grads = gradients(model)
    exact = eager_logps(model, input_ids, labels, attention_mask=attention_mask)
    if inside:  # as accelerate's prepare does it
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    got.sum().backward()
    assert got.dtype == torch.float32
    # Not further from the truth than eager is, which rounds its logits to bf16 on top.
    assert (got - exact).norm() <= 1.5 * (expected - exact).norm()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert (grad - expected_grads[name]).norm() <= 0.1 * expected_grads[name].norm() + 1e-3, (
            name
        )


def test_gradient_checkpointing():
    model = build("Llama").train()
    input_ids, attention_mask, labels = batch()
    eager_logps(model, input_ids, labels, attention_mask=attention_mask).sum().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hf.sequence_logps(model, input_ids, labels, attention_mask).sum().backward()
    assert_same_gradients(gradients(model), expected)


def test_models_that_return_tuples():
    model = build("Llama")
    input_ids, _, labels = batch()
    expected = eager_logps(model, input_ids, labels)
    for _ in range(2):
        got = hf.sequence_logps(model, input_ids, labels, return_dict=False)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_an_empty_batch_and_one_without_labels():
    model = build("Llama")
    input_ids, attention_mask, labels = batch()
    got = hf.sequence_logps(model, input_ids, labels.fill_(-100), attention_mask)
    got.sum().backward()
    assert torch.equal(got.detach(), torch.zeros(4))
    assert all(not grad.any() for grad in gradients(model).values())


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj"], **options})
    return peft.get_peft_model(model, config)


def disturb(model):
    """Adapters begin at zero; let them do something."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                )


PEFTS = {
    "lora": {},
    "lora with a frozen tied head": {"family": "Qwen2"},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "rank-stabilised lora with a bias on the head": {
        "target_modules": ["lm_head"],
        "use_rslora": True,
        "lora_bias": True,
    },
    "lora on a head with a bias": {"family": "Phi", "target_modules": ["lm_head"]},
    "a head trained in full": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", PEFTS)
def test_peft_models(case):
    options = dict(PEFTS[case])
    model = lora(build(options.pop("family", "Llama")), **options)
    input_ids, attention_mask, labels = batch()
    hf.sequence_logps(
        model, input_ids, labels, attention_mask
    )  # probed while adapters are still zero
    disturb(model)
    expected = eager_logps(model, input_ids, labels, attention_mask=attention_mask)
    expected.sum().backward()
    expected_grads = gradients(model)
    got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    got.sum().backward()
    torch.testing.assert_close(got, expected, **CLOSE)
    assert expected_grads
    assert_same_gradients(gradients(model), expected_grads)
    with model.disable_adapter():
        base = hf.sequence_logps(model, input_ids, labels, attention_mask)
        torch.testing.assert_close(
            base, eager_logps(model, input_ids, labels, attention_mask=attention_mask), **CLOSE
        )
    assert (base - got).abs().max() > 1e-3


def test_merged_adapters():
    model = lora(build("Llama"), target_modules=["q_proj", "lm_head"])
    disturb(model)
    input_ids, _, labels = batch()
    expected = eager_logps(model, input_ids, labels)
    model.merge_adapter()
    torch.testing.assert_close(hf.sequence_logps(model, input_ids, labels), expected, **CLOSE)


def test_prompt_tuning_prepends_tokens_that_have_no_labels():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("Llama"), config)
    input_ids, attention_mask, labels = batch()
    got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 3:-1]
    logps = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(got, (logps * (labels[:, 1:] != -100)).sum(-1), **CLOSE)


def test_adapters_on_the_head_keep_their_own_precision():
    """W + B·A in bf16 would round away what the adapter adds; [W, B] does not."""
    model = lora(build("Llama").bfloat16(), target_modules=["lm_head"])
    input_ids, _, labels = batch()
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.fill_(2e-3)
        got = hf.sequence_logps(model, input_ids, labels)
        with model.disable_adapter():
            moved = got - hf.sequence_logps(model, input_ids, labels)
        exact = model.float()
        expected = hf.sequence_logps(exact, input_ids, labels)
        with exact.disable_adapter():
            expected = expected - hf.sequence_logps(exact, input_ids, labels)
    # Every entry of B is the same, so every logit moves alike and no log-probability does.
    assert moved.abs().max() <= 1e-3
    assert expected.abs().max() <= 1e-4


def test_dropout_of_an_adapter_on_the_head():
    model = lora(build("Llama"), target_modules=["lm_head"], lora_dropout=0.5).train()
    input_ids, _, labels = batch()
    disturb(model)
    # The first call probes the head, which must not mistake dropout for another family.
    noisy = torch.stack([hf.sequence_logps(model, input_ids, labels) for _ in range(2)])
    quiet = hf.sequence_logps(model.eval(), input_ids, labels)
    model.train()
    assert not torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], quiet)
    torch.testing.assert_close(noisy.mean(0), quiet, rtol=0.2, atol=10.0)
    assert all(m.training for m in model.modules())


class NormalisedHead(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


def test_heads_that_cannot_be_read_are_refused():
    input_ids, _, labels = batch()

    model = build("Llama")
    head = NormalisedHead(32, model.config.vocab_size, bias=False)
    model.set_output_embeddings(head)
    with pytest.raises(hf.UnsupportedModel, match="NormalisedHead"):
        hf.sequence_logps(model, input_ids, labels)

    model = build("Llama")
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(hf.UnsupportedModel, match="sharded"):
        hf.read_head(model)

    model = build("Llama")
    model.lm_head.to("meta")
    with pytest.raises(hf.UnsupportedModel, match="meta"):
        hf.read_head(model)

    model = build("Llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(53, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(hf.UnsupportedModel, match="quantized"):
        hf.read_head(model)

    with pytest.raises(hf.UnsupportedModel, match="causal language model"):
        hf.sequence_logps(nn.Linear(2, 2), input_ids, labels)
    with pytest.raises(hf.UnsupportedModel, match="output head"):
        hf.sequence_logps(build("Llama").model, input_ids, labels)


def test_a_sharded_head_is_refused(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(build("Llama"), mesh=mesh, reshard_after_forward=True)
        with pytest.raises(hf.UnsupportedModel, match="DTensor"):
            hf.read_head(model)
    finally:
        distributed.destroy_process_group()


def test_a_forward_that_goes_around_its_head_is_refused():
    model = build("Llama")
    input_ids, _, labels = batch()
    original = model.forward

    def around(*args, **kwargs):
        outputs = original(*args, **kwargs)
        outputs.logits = model.lm_head(outputs.logits.new_zeros(1, 1, 32))
        return outputs

    model.forward = around
    with pytest.raises(hf.UnsupportedModel, match="2 times"):
        hf.sequence_logps(model, input_ids, labels)


def test_bad_arguments_are_named():
    model = build("Llama")
    input_ids, attention_mask, labels = batch()
    for arguments, name in (
        ((input_ids[0], labels[0]), "input_ids"),
        ((input_ids, labels[:, :-1]), "labels"),
        ((input_ids, labels, attention_mask[:1]), "attention_mask"),
        ((input_ids, labels + 1000), "labels"),
    ):
        with pytest.raises(ValueError, match=name):
            hf.sequence_logps(model, *arguments)
    for options, name in (
        ({"stats": ("entropy",)}, "stats"),
        ({"per_token": True, "average_log_prob": True}, "average_log_prob"),
        ({"per_token": True, "stats": ("nonsense",)}, "stats"),
        ({"temperature": 0.0}, "temperature"),
        ({"backend": "nonsense"}, "backend"),
    ):
        with pytest.raises(ValueError, match=name):
            hf.sequence_logps(model, input_ids, labels, **options)


def test_copies_are_probed_on_their_own():
    model = build("Llama")
    input_ids, _, labels = batch()
    hf.sequence_logps(model, input_ids, labels)
    twin = copy.deepcopy(model)
    twin.lm_head.register_forward_hook(lambda module, args, output: output * 2.0)
    with pytest.raises(hf.UnsupportedModel):
        hf.sequence_logps(twin, input_ids, labels)


def test_hooks_that_come_after_the_first_call_are_noticed():
    model, (input_ids, _, labels) = build("Llama"), batch()
    before = hf.sequence_logps(model, input_ids, labels)
    harmless = model.lm_head.register_forward_hook(lambda module, args, output: None)
    assert torch.equal(hf.sequence_logps(model, input_ids, labels), before)
    harmless.remove()
    hook = model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(hf.UnsupportedModel, match="differ"):
        hf.sequence_logps(model, input_ids, labels)
    hook.remove()
    assert torch.equal(hf.sequence_logps(model, input_ids, labels), before)


def test_logits_of_zero_verify_nothing(monkeypatch):
    """A head that is still zero agrees with any family."""
    model, (input_ids, _, labels) = build("Gemma2", tie_word_embeddings=False), batch()
    monkeypatch.delitem(hf.FAMILIES, "Gemma2ForCausalLM")
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    hf.sequence_logps(model, input_ids, labels)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    with pytest.raises(hf.UnsupportedModel, match="differ"):
        hf.sequence_logps(model, input_ids, labels)
