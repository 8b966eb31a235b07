"""Several sequences in a row are worth what they are worth by themselves, or refused."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import _COMMON, FAMILIES, VOCAB, assert_same_gradients, build, gradients
from sampling import sampled

from fastdpo.data import CompletionCollator, PairCollator, RankingCollator
from fastdpo.integrations import hf, layout_check, tokens

LAYOUTS = ("packed", "shared_prompts")
WINDOWS = {
    "Mistral": {"sliding_window": 5},
    "Starcoder2": {**_COMMON, "sliding_window": 5},
    "Phi3": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Cohere2": {
        **_COMMON,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Llama4": {
        **_COMMON,
        "head_dim": 8,
        "attention_chunk_size": 5,
        "num_local_experts": 2,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 48,
    },
    "GptOss": {**_COMMON, "head_dim": 8, "num_local_experts": 4, "sliding_window": 5},
}
FURTHER = {
    "Olmo2": _COMMON,
    "SmolLM3": _COMMON,
    "Glm4": {**_COMMON, "head_dim": 8},
    "Falcon": {**_COMMON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "XGLM": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "BioGpt": _COMMON,
}
STATEFUL = {
    "FalconH1": FAMILIES["FalconH1"],
    "Mamba": FAMILIES["Mamba"],
    "Inkling": FAMILIES["Inkling"],
    "Jamba": {
        **_COMMON,
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "num_experts": 2,
    },
    "Lfm2": {**_COMMON, "layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {**_COMMON, "lru_width": 32, "num_hidden_layers": 3},
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
}
PACKABLE = [name for name in FAMILIES if name not in STATEFUL] + list(FURTHER)


def made(family, **overrides):
    known = {**FAMILIES, **FURTHER, **STATEFUL, **WINDOWS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, FAMILIES.get(family) or known[family])
        try:
            return build(family, **overrides)
        except ValueError as error:
            if "does not support an attention implementation" in str(error):
                pytest.skip(str(error))
            raise


def pairs(sizes=((6, 5, 3), (2, 7, 6), (9, 1, 4), (4, 4, 4)), seed=0):
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(3, 50) for _ in range(n)]

    return [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in sizes
    ]


def assert_like_padded(model, layout, attention="sdpa", **options):
    results = []
    for used in ("padded", layout):
        collator = PairCollator(0, used, attention=attention)
        out = hf.dpo_loss(model, collator(pairs()), **{"reference_free": True, **options})
        out.loss.backward()
        results.append((out, gradients(model)))
    (expected, expected_gradients), (found, found_gradients) = results
    for name in ("loss", "chosen_logps", "rejected_logps"):
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert_same_gradients(found_gradients, expected_gradients)


CASES = [(f, la, at) for f in PACKABLE for la in LAYOUTS for at in ("sdpa", "eager")]
# One each: rotations, tied, positions by the mask, learned positions, kinds of layers, experts.
KEPT = [(f, "shared_prompts", "sdpa") for f in ("Llama", "Qwen2", "OPT", "GPT2", "Gemma3")]
KEPT += [("Mixtral", "packed", "eager")]


@pytest.mark.parametrize("case", sampled(CASES, KEPT), ids="-".join)
def test_families(case):
    family, layout, attention = case
    assert_like_padded(made(family, attn_implementation=attention), layout, attention)


WINDOWED = [(f, la, at) for f in WINDOWS for la in LAYOUTS for at in ("sdpa", "eager")]
WINDOWED_KEPT = [(f, "shared_prompts", "sdpa") for f in ("Mistral", "Gemma3", "Llama4")]


@pytest.mark.parametrize("case", sampled(WINDOWED, WINDOWED_KEPT), ids="-".join)
def test_windows_and_chunks(case):
    family, layout, attention = case
    options = WINDOWS[family] if family in FAMILIES else {}
    assert_like_padded(made(family, attn_implementation=attention, **options), layout, attention)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", STATEFUL)
def test_models_that_carry_a_state_are_refused(family, layout):
    model = made(family)
    with pytest.raises(hf.UnsupportedModel, match=r"layout='padded'"):
        hf.dpo_loss(model, PairCollator(0, layout)(pairs()), reference_free=True)


def gpt_neo(window):
    """Its local layers count a window along the row."""
    family = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": window,
        "max_position_embeddings": 2048,
        "intermediate_size": 48,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "GPTNeo", family)
        return build("GPTNeo")


@pytest.mark.parametrize("window", [5, 70])
def test_a_model_that_nobody_knows_to_be_wrong_is_found_out(window):
    model = gpt_neo(window)
    model.config.attention_layers = None  # its layers know
    assert_like_padded(model, "packed", "eager")
    with pytest.raises(hf.UnsupportedModel, match="is not right about rows of layout='shared"):
        hf.dpo_loss(model, PairCollator(0, "shared_prompts")(pairs()), reference_free=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_along_the_row(dtype):
    """Wider than what is tried, and in 16 bits lost in the roundings."""
    model = gpt_neo(256).to(dtype)
    with pytest.raises(hf.UnsupportedModel, match=r"window along the row, .* instead of 'shared_"):
        hf.dpo_loss(model, PairCollator(0, "shared_prompts")(pairs()), reference_free=True)
    hf.dpo_loss(model, PairCollator(0, "packed", attention="eager")(pairs()), reference_free=True)


def test_attention_that_is_scaled_by_the_place_in_the_row():
    """Llama 4's, from `floor_scale` tokens on: more than what is tried."""
    model = made("Llama4", floor_scale=45)
    collator = PairCollator(0, "shared_prompts")
    hf.dpo_loss(model, collator(pairs()), reference_free=True)
    long = collator(pairs(sizes=((9, 20, 20), (2, 7, 6))))
    with pytest.raises(hf.UnsupportedModel, match="45 tokens or more, got 49: make rows shorter"):
        hf.dpo_loss(model, long, reference_free=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_check_is_made_once(layout, monkeypatch):
    model, calls = build("Llama"), []
    real = layout_check._trial
    monkeypatch.setattr(layout_check, "_trial", lambda *a: calls.append(1) or real(*a))
    for _ in range(3):
        hf.dpo_loss(model, PairCollator(0, layout)(pairs()), reference_free=True)
    assert len(calls) == 1


def test_the_check_sees_a_mask_that_is_wrong(monkeypatch):
    """Of each kind of mistake: another document, another answer, the future."""
    from fastdpo.integrations import packing

    real = packing.visible

    def seeing(mistake):
        def visible(batch, kind):
            columns = torch.arange(batch.input_ids.shape[1])
            causal = columns[:, None] >= columns[None, :]
            document = batch.document_ids
            same = document[:, :, None] == document[:, None, :]
            return {
                "documents": causal.expand(len(document), -1, -1),
                "answers": same & causal,
                "future": real(batch, kind) | (same & (columns[:, None] + 1 == columns)),
            }[mistake]

        return visible

    for mistake in ("documents", "answers", "future"):
        monkeypatch.setattr(packing, "visible", seeing(mistake))
        with pytest.raises(hf.UnsupportedModel, match="is not right about rows"):
            hf.dpo_loss(
                build("Llama"), PairCollator(0, "shared_prompts")(pairs()), reference_free=True
            )


def test_flex_attention_forward_on_a_cpu():
    model = build("Llama", attn_implementation="flex_attention", head_dim=16, hidden_size=64)
    twin = build("Llama", attn_implementation="sdpa", head_dim=16, hidden_size=64)
    for layout in LAYOUTS:
        batch = PairCollator(0, layout, attention="flex_attention")(pairs())
        with torch.no_grad():
            found = hf.sequence_logps(model, **batch)
            expected = hf.sequence_logps(twin, **batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        with pytest.raises(hf.UnsupportedModel, match="no backward on a CPU"):
            hf.dpo_loss(model, batch, reference_free=True)


def _varlen_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """What flash-attn's kernel computes, from the arguments that transformers hands it."""
    assert attention_mask is None
    ends = options["cu_seq_lens_q"].tolist()
    assert options["cu_seq_lens_k"].tolist() == ends
    assert options["max_length_q"] == max(b - a for a, b in pairwise(ends))
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in pairwise(ends)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def test_flash_attentions_arguments():
    """On a stand-in for its kernel, which runs on GPUs alone."""
    import transformers

    def padded(module, query, key, value, attention_mask, **options):
        if options.get("cu_seq_lens_q") is not None:
            return _varlen_attention(module, query, key, value, attention_mask, **options)
        return transformers.AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, **options
        )

    transformers.AttentionInterface.register("flash_stand_in", padded)
    sdpa_mask = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask(*args, **kwargs):
        return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)

    transformers.AttentionMaskInterface.register("flash_stand_in", mask)
    results = []
    for attention, layout, name in (
        ("sdpa", "padded", "sdpa"),
        ("flash_attention_2", "packed", "flash_stand_in"),
    ):
        model = build("Llama", attn_implementation="sdpa")
        model.config._attn_implementation_internal = name
        batch = PairCollator(0, layout, attention=attention, pad_to_multiple_of=16)(pairs())
        out = hf.dpo_loss(model, batch, reference_free=True)
        out.loss.backward()
        results.append((out.chosen_logps, gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=2e-5)
    assert_same_gradients(results[1][1], results[0][1])


OBJECTIVES = [
    {"objective": "ipo", "average_log_prob": True},
    {"objective": "sigmoid_norm"},
    {"objective": {"sigmoid": 1.0, "sft": 0.5}},
    {"ld_alpha": 0.3},
    {"use_weighting": True},
    {"label_smoothing": 0.1, "num_pairs": 7},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: str(next(iter(o.values()))))
def test_objectives(options, layout):
    assert_like_padded(
        build("Qwen2"), layout, reference_free=False, ref_model=_reference(), **options
    )


def test_rankings_and_single_answers():
    """With a reference, of which everything is known by itself: K·B and an odd number."""
    rng = random.Random(3)

    def ids(n):
        return [rng.randrange(3, 50) for _ in range(n)]

    ranked = [{"prompt_ids": ids(4), "answer_ids": [ids(3), ids(5), ids(2)]} for _ in range(3)]
    single = [
        {"prompt_ids": ids(3), "completion_ids": ids(n), "label": n % 2 == 0} for n in range(1, 6)
    ]
    cases = [
        (RankingCollator, ranked, {"objective": "plackett_luce", "num_candidates": 3}),
        (CompletionCollator, single, {"objective": "kto", "kl": 0.1}),
        (CompletionCollator, single, {"objective": "bco", "delta": 0.2}),
    ]
    for collator, examples, options in cases:
        model = build("Qwen2")
        results = []
        for layout in ("padded", *LAYOUTS):
            batch = collator(0, layout)(examples)
            out = hf.preference_loss(model, batch, _reference(), **options)
            out.loss.backward()
            results.append((out.loss.detach(), gradients(model)))
        for loss, grads in results[1:]:
            torch.testing.assert_close(loss, results[0][0])
            assert_same_gradients(grads, results[0][1])


@pytest.mark.parametrize("objective", ["sigmoid", "ipo", "hinge"])
def test_micro_batches_of_1_and_3_pairs(objective):
    """Weighted, give the gradient of 4."""
    weights = [0.5, 2.0, 0.0, 1.0]
    examples = [{**e, "sample_weight": w} for e, w in zip(pairs(), weights, strict=True)]
    model, reference = build("Qwen2"), _reference()
    options = {"objective": objective, "num_pairs": 4}

    def step(parts):
        total = 0.0
        for part in parts:
            batch = PairCollator(0, "shared_prompts")(part)
            loss = hf.dpo_loss(model, batch, reference, **options).loss
            loss.backward()
            total += loss.item()
        return total, gradients(model)

    whole, parts = step([examples]), step([examples[:1], examples[1:]])
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert_same_gradients(parts[1], whole[1])
    alone = [
        hf.dpo_loss(model, PairCollator(0)([e]), reference, objective=objective).loss.item()
        for e in pairs()
    ]
    expected = sum(w * loss for w, loss in zip(weights, alone, strict=True)) / 4
    assert whole[0] == pytest.approx(expected, rel=1e-5)


def test_options_both_in_the_batch_and_beside_it():
    batch = {**PairCollator(0)(pairs()), "sample_weights": torch.ones(4)}
    for options, message in (
        ({"sample_weights": torch.ones(4)}, "in the batch or as an argument"),
        ({"sft_weight": 0.1}, "sample_weights should be None with an NLL term"),
        ({"objective": "aot"}, "sample_weights is not defined for aot"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.dpo_loss(build("Llama"), batch, build("Llama"), **options)
    for wrong in (torch.ones(3), -torch.ones(4), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="sample_weights should"):
            hf.dpo_loss(build("Llama"), {**batch, "sample_weights": wrong}, build("Llama"))


def _reference():
    model = build("Qwen2")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_reference_is_margin_zero(layout, dtype):
    batch = PairCollator(0, layout)(pairs())
    model, reference = build("Llama").to(dtype), build("Llama").to(dtype)
    out = hf.dpo_loss(model, batch, reference)
    assert (out.chosen_rewards == 0).all()
    assert (out.rejected_rewards == 0).all()
    # And the same where it was computed beforehand.
    with torch.no_grad():
        logps = hf.sequence_logps(reference, **batch)
    chosen, rejected = logps.chunk(2)
    known = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    out = hf.dpo_loss(model, {**batch, **known})
    assert (out.chosen_rewards == 0).all()
    assert (out.rejected_rewards == 0).all()


def test_padded_reference_computed_beforehand_is_margin_zero():
    batch = PairCollator(0)(pairs())
    model = build("Llama").to(torch.bfloat16)
    labels = torch.where(batch["completion_mask"].bool(), batch["input_ids"], -100)
    with torch.no_grad():
        logps = hf.sequence_logps(model, batch["input_ids"], labels, batch["attention_mask"])
    chosen, rejected = logps.chunk(2)
    known = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    out = hf.dpo_loss(model, {**batch, **known})
    assert (out.chosen_rewards == 0).all()
    assert (out.rejected_rewards == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_in_the_order_of_the_labels(layout):
    model, batch = build("Llama"), PairCollator(0, layout)(pairs())
    per_token = hf.sequence_logps(model, **batch, per_token=True, stats=("entropy",))
    assert per_token.logps.shape == per_token.entropy.shape == batch["row_labels"].shape
    sums = torch.stack([p.sum() for p in per_token.logps.split(batch["row_lengths"].tolist())])
    torch.testing.assert_close(sums, hf.sequence_logps(model, **batch))
    average = hf.sequence_logps(model, **batch, average_log_prob=True)
    torch.testing.assert_close(average, sums / batch["row_lengths"])
    out = hf.dpo_loss(model, batch, reference_free=True, stats=("entropy",))
    assert torch.equal(out.tokens.entropy, per_token.entropy.detach())


def test_two_steps_agree_to_the_bit():
    """The gradient of a row with two labels is a sum in a fixed order."""
    batch = PairCollator(0, "shared_prompts")(pairs())
    results = []
    for _ in range(2):
        model = build("Llama")
        hf.dpo_loss(model, batch, reference_free=True).loss.backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name])


def test_positions_that_count_from_the_paddings_id():
    """As BioGPT's and XGLM's do not, and RoBERTa's do."""
    import transformers

    config = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
    config = transformers.RobertaConfig(**{**config, "is_decoder": True, "pad_token_id": 3})
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(config).eval()
    for layout in LAYOUTS:
        assert_like_padded(model, layout, "sdpa")


def test_compiled():
    model = build("Llama")
    expected = hf.dpo_loss(model, PairCollator(0, "shared_prompts")(pairs()), reference_free=True)
    compiled = torch.compile(model, backend="aot_eager")
    found = hf.dpo_loss(compiled, PairCollator(0, "shared_prompts")(pairs()), reference_free=True)
    found = hf.dpo_loss(compiled, PairCollator(0, "shared_prompts")(pairs()), reference_free=True)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    found_gradients = gradients(model)
    expected.loss.backward()
    assert_same_gradients(found_gradients, gradients(model))


class TestRefused:
    def refuses(self, message, batch=None, model=None, error=ValueError, **options):
        model = build("Llama") if model is None else model
        batch = PairCollator(0, "packed")(pairs()) if batch is None else batch
        with pytest.raises(error, match=message):
            hf.dpo_loss(model, batch, **{"reference_free": True, **options})

    def test_packed_rows_given_to_a_padded_path(self):
        batch = PairCollator(0, "packed")(pairs())
        labels = torch.full_like(batch["input_ids"], 5)
        keys = ("input_ids", "position_ids")
        packed = {**{k: batch[k] for k in keys}, "labels": labels}
        packed = {k: torch.cat([v, v])[:4] for k, v in packed.items()}
        self.refuses("position_ids should not start again", packed)
        self.refuses(
            "attention='flash_attention_2'",
            {**packed, "position_ids": None, "cu_seq_lens_q": torch.tensor([0, 3])},
        )
        with pytest.raises(ValueError, match="position_ids should not start again"):
            hf.sequence_logps(build("Llama"), **packed)

    def test_positions_of_padding_may_be_anything(self):
        batch = PairCollator(0)(pairs())
        mask = batch["attention_mask"]
        place = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        for _ in range(2):
            hf.dpo_loss(build("Llama"), {**batch, "position_ids": place}, reference_free=True)
            batch.pop("row_index", None)
            batch = {k: v.flip(-1) for k, v in batch.items()}
            mask = batch["attention_mask"]
            place = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)

    def test_an_attention_that_cannot_do_the_layout(self):
        model = build("Llama")
        # As transformers has it after loading; to set it here would look for the kernels.
        config = model.config
        config._attn_implementation_internal = "flash_attention_2"
        self.refuses("cannot do layout='shared", PairCollator(0, "shared_prompts")(pairs()), model)
        self.refuses("attention='flash_attention_2'", None, model)
        config._attn_implementation_internal = "something_else"
        self.refuses("cannot do layout='packed'", None, model)
        flash = PairCollator(0, "packed", attention="flash_attention_2")(pairs())
        self.refuses("give PairCollator attention='sdpa'", flash)

    @pytest.mark.parametrize("key", ["row_index", "row_lengths", "position_ids", "input_ids"])
    def test_a_key_is_missing(self, key):
        batch = PairCollator(0, "packed")(pairs())
        del batch[key]
        self.refuses(f"should have the tensor '{key}'", batch)

    @pytest.mark.parametrize("key", ["labels", "attention_mask", "completion_mask"])
    def test_a_key_is_superfluous(self, key):
        batch = PairCollator(0, "packed")(pairs())
        self.refuses(f"should not have '{key}'", {**batch, key: batch["input_ids"]})

    @pytest.mark.parametrize(
        ("key", "change", "message"),
        [
            ("row_lengths", lambda v: v + 1, "row_lengths should add up"),
            ("row_lengths", lambda v: v[:3], "row_lengths should"),
            ("row_index", lambda v: v + 10_000, "row_index should be positions"),
            ("row_index", lambda v: v[1:], "row_index and row_labels should have one shape"),
            ("row_labels", lambda v: v + 1000, "labels should be in"),
            ("document_ids", lambda v: v[:, 1:], "document_ids should have the shape"),
        ],
    )
    def test_values_that_do_not_fit(self, key, change, message):
        batch = PairCollator(0, "packed")(pairs())
        self.refuses(message, {**batch, key: change(batch[key])})

    def test_options_that_do_not_go_with_it(self):
        self.refuses("router_aux_loss_coef should be None", router_aux_loss_coef=0.1)

    def test_virtual_tokens(self):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(build("Llama"), config)
        self.refuses("virtual tokens", None, model)

    def test_an_adapter_that_begins_in_the_row(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]
        )
        model = peft.get_peft_model(build("Llama"), config)
        self.refuses("begins at a place in each row", None, model)


def test_nothing_is_asked_before_bad_input_is_refused(monkeypatch):
    monkeypatch.setattr(tokens, "check_layout", pytest.fail)
    batch = PairCollator(0, "packed")(pairs())
    with pytest.raises(ValueError, match="labels should be in"):
        hf.dpo_loss(build("Llama"), {**batch, "row_labels": batch["row_labels"] + 99}, None)
