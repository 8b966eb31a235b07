"""The order of tokens: models that are not causal, and padding on the left."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hf_models import FAMILIES, VOCAB, batch, build
from test_hf_capture import lora

from fastdpo.integrations import forward, hf, order

CLOSE = {"rtol": 1e-4, "atol": 1e-3}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "initializer_range": 0.4,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.4,
}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
# Class -> configuration, of models that count positions in ways of their own.
OTHERS: dict[str, dict] = {
    "GPTNeoForCausalLM": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    },
    "BioGptForCausalLM": {**_BERT},
    "XGLMForCausalLM": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "init_std": 0.4,
    },
    "BloomForCausalLM": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.4,
    },
    "MptForCausalLM": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "BertLMHeadModel": {**_BERT, "is_decoder": True},
    "RobertaForCausalLM": {**_BERT, "is_decoder": True},
}
REFUSED: dict[str, dict] = {
    "MBartForCausalLM": _BART,
    "xLSTMForCausalLM": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "initializer_range": 0.4,
    },
    "RecurrentGemmaForCausalLM": {
        **_BERT,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 16,
    },
}
NOT_CAUSAL: dict[str, dict] = {
    "BertLMHeadModel": _BERT,
    "RobertaForCausalLM": _BERT,
    "BertForMaskedLM": _BERT,
    "ModernBertForMaskedLM": _BERT,
    "XLNetLMHeadModel": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 48,
        "initializer_range": 0.4,
    },
    "BartForConditionalGeneration": _BART,
    "MBartForConditionalGeneration": _BART,
    "PegasusForConditionalGeneration": _BART,
    "T5ForConditionalGeneration": _T5,
}


def made(name: str, table: dict[str, dict]) -> torch.nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**table[name])).eval()


def any_model(name: str) -> torch.nn.Module:
    return build(name) if name in FAMILIES else made(name, OTHERS)


def unpadded(model, input_ids, labels, attention_mask):
    """Each sequence alone, without padding and without a mask."""
    kept = attention_mask.bool()
    rows = [(i[k][None], y[k][None]) for i, y, k in zip(input_ids, labels, kept, strict=True)]
    return torch.cat([hf.sequence_logps(model, i, y) for i, y in rows])


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_padding_on_the_left_changes_nothing(name):
    if name == "FalconH1" and transformers.__version__.startswith("5.0."):
        pytest.skip("the model's own logits change with what pads on the left: transformers 5.0")
    model = any_model(name)
    input_ids, attention_mask, labels = batch(padding="left")
    input_ids[attention_mask == 0] = 7  # any token may pad
    with torch.no_grad():
        got = hf.sequence_logps(model, input_ids, labels, attention_mask)
        expected = unpadded(model, input_ids, labels, attention_mask)
        one = hf.sequence_logps(model, input_ids[2:3], labels[2:3], attention_mask[2:3])
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(one, expected[2:3], **CLOSE)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_padding_on_the_right_changes_no_bit(name):
    """Of what the model computes where it finds the positions itself."""
    model = any_model(name)
    input_ids, attention_mask, _ = batch()
    heard, seen = [], []

    def listen(at):
        heard.append(at.hidden)
        return {}

    with torch.no_grad():
        forward.answered(model, input_ids, attention_mask, answer=listen)
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        model(input_ids=input_ids, attention_mask=attention_mask)
        handle.remove()
    kept = attention_mask.bool()
    assert torch.equal(heard[0][kept], seen[0][kept])


@pytest.mark.parametrize("name", REFUSED)
def test_padding_on_the_left_is_refused_where_it_would_count(name):
    model = made(name, REFUSED)
    input_ids, attention_mask, labels = batch(padding="left")
    for mask in (attention_mask, attention_mask.bool()):
        with pytest.raises(ValueError, match="attention_mask should be padded on the right"):
            hf.sequence_logps(model, input_ids, labels, mask)
    input_ids, attention_mask, labels = batch()
    got = hf.sequence_logps(model, input_ids, labels, attention_mask)
    torch.testing.assert_close(got, unpadded(model, input_ids, labels, attention_mask), **CLOSE)


def test_positions_that_are_given_stay():
    model = build("GPT2")
    input_ids, attention_mask, labels = batch(padding="left")
    asked = torch.arange(20, 31).expand(4, -1)
    got = hf.sequence_logps(model, input_ids, labels, attention_mask, position_ids=asked)
    seen = []
    model.transformer.wpe.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    again = hf.sequence_logps(model, input_ids, labels, attention_mask, position_ids=asked)
    assert torch.equal(seen[0], asked)
    assert torch.equal(got, again)


def test_a_prompt_before_padding_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("GPT2"), config)
    input_ids, attention_mask, labels = batch(padding="left")
    with pytest.raises(ValueError, match="attention_mask should be padded on the right"):
        hf.sequence_logps(model, input_ids, labels, attention_mask)
    hf.sequence_logps(model, *batch()[::2], batch()[1])


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_not_causal_is_refused_before_anything_is_computed(name):
    model = made(name, NOT_CAUSAL)
    input_ids, attention_mask, labels = batch()
    pairs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    good, seen = build("Llama"), []
    good.model.register_forward_hook(lambda _, args, out: seen.append(out[0].shape[1]))
    for call in (
        lambda: hf.sequence_logps(model, input_ids, labels, attention_mask),
        lambda: hf.dpo_loss(model, pairs, good),
        lambda: hf.dpo_loss(model, pairs, reference_free=True),
        lambda: hf.dpo_loss(good, pairs, model),
    ):
        with pytest.raises(hf.UnsupportedModel, match=rf"{name}.*(causal|encoder|masked)"):
            call()
        assert 11 not in seen  # of the batch, that is: a model is asked by shorter rows
    if "Conditional" in name or "Masked" in name:
        with pytest.raises(hf.UnsupportedModel, match=name):
            hf.read_head(model)


def paligemma():
    text = {**FAMILIES["Llama"], "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**text),
        vision_config=transformers.SiglipVisionConfig(
            num_hidden_layers=1, image_size=28, patch_size=14, **vision
        ),
        image_token_index=VOCAB - 1,
        projection_dim=32,
    )
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_prefix_that_is_seen_from_everywhere(padding):
    """Without token types it is the whole sequence, unless there is padding: 1.7 nats apart."""
    model = paligemma()
    input_ids, attention_mask, labels = batch(padding=padding)
    with pytest.raises(hf.UnsupportedModel, match=r"PaliGemma.*token_type_ids"):
        hf.sequence_logps(model, input_ids, labels, attention_mask)
    types = (labels != -100).long()
    got = hf.sequence_logps(model, input_ids, labels, attention_mask, token_type_ids=types)
    other = input_ids.clone()
    last = [int(y.nonzero()[-1]) for y in types]
    other[range(4), last] = 5  # predicted by nothing before it
    labels[range(4), last] = -100
    with torch.no_grad():
        a, b = (
            hf.sequence_logps(model, i, labels, attention_mask, token_type_ids=types)
            for i in (input_ids, other)
        )
    torch.testing.assert_close(a, b)
    assert (got <= a).all()
    with pytest.raises(ValueError, match="token_type_ids should be 1"):
        hf.sequence_logps(model, input_ids, labels, attention_mask, token_type_ids=0 * types)
    shift = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    mask = (labels != -100).long()
    for given in ({"shift_labels": shift}, {"completion_mask": mask}):
        given = {**given, "input_ids": input_ids, "attention_mask": attention_mask}
        got = hf.sequence_logps(model, **given, token_type_ids=types)
        assert got.isfinite().all()
        given["token_type_ids"] = 0 * types
        with pytest.raises(ValueError, match="token_type_ids should be 1"):
            hf.sequence_logps(model, **given)
        with pytest.raises(ValueError, match="token_type_ids should be 1"):
            hf.dpo_loss(model, given, reference_free=True)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_token_types_do_not_make_an_encoder_causal(name):
    model, (input_ids, _, labels) = made(name, NOT_CAUSAL), batch()
    with pytest.raises(hf.UnsupportedModel, match="not causal"):
        hf.sequence_logps(model, input_ids, labels, token_type_ids=torch.zeros_like(input_ids))


@pytest.mark.parametrize("key", ["decoder_input_ids", "decoder_attention_mask", "encoder_outputs"])
def test_a_second_sequence_is_refused(key):
    model, (input_ids, _, labels) = build("Llama"), batch()
    with pytest.raises(ValueError, match=f"^{key} should not be given"):
        hf.sequence_logps(model, input_ids, labels, **{key: input_ids})
    pairs = {"input_ids": input_ids, "labels": labels, key: input_ids}
    with pytest.raises(ValueError, match=f"^{key} should not be given"):
        hf.dpo_loss(model, pairs, reference_free=True)


def test_a_causal_model_whose_mask_somebody_removed_is_refused():
    """Bidirectional embeddings are made of decoders: by class and configuration they still are."""
    model, (input_ids, _, labels) = build("Llama", attn_implementation="eager"), batch()
    hf.sequence_logps(model, input_ids, labels)
    other = copy.deepcopy(model)

    def everything(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    for layer in other.model.layers:
        layer.self_attn.register_forward_pre_hook(everything, with_kwargs=True)
    with pytest.raises(hf.UnsupportedModel, match="not causal"):
        hf.sequence_logps(other, input_ids, labels)


def test_a_model_is_asked_once_and_its_modes_stay():
    model, (input_ids, attention_mask, labels) = build("Llama").train(), batch()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    model.model.register_forward_hook(lambda _, args, out: seen.append(torch.is_grad_enabled()))
    for _ in range(2):
        hf.sequence_logps(model, input_ids, labels, attention_mask).sum().backward()
    assert seen == [False, False, True, True]
    assert [m.training for m in model.modules()] == modes


def test_weights_that_say_nothing_are_asked_again():
    model, (input_ids, _, labels) = build("Llama"), batch()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    hf.sequence_logps(model, input_ids, labels)
    assert model not in order._known
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight)
    hf.sequence_logps(model, input_ids, labels)
    assert model in order._known


def test_gradients_survive_being_asked_inside_autocast():
    """A weight that autocast cast without gradients would be taken for the forward's."""
    model, (input_ids, _, labels) = build("Llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        hf.sequence_logps(model, input_ids, labels).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_adapter_model_pads_on_the_left():
    model = lora(build("GPT2"), target_modules=["c_attn"], fan_in_fan_out=True)
    input_ids, attention_mask, labels = batch(padding="left")
    pairs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    out = hf.dpo_loss(model, pairs)
    expected = unpadded(model, input_ids, labels, attention_mask)
    got = torch.cat([out.chosen_logps, out.rejected_logps])
    torch.testing.assert_close(got, expected, **CLOSE)
