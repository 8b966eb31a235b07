"""FastDPOTrainer on packed rows and shared prompts trains as TRL's DPOTrainer on padded ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from sampling import sampled
from test_trl import (
    BATCH,
    FIELDS,
    SETTINGS,
    STEPS,
    adapter_config,
    built,
    compared,
    continued,
    datasets,
    disturbed,
    model,
    needs_an_order,
    pairs,
    tokenizer,
    train,
    trl,
)
from test_trl import _fresh_accelerate as _fresh_accelerate

from fastdpo.data import TokenBudgetSampler
from fastdpo.integrations.trl import FastDPOConfig, FastDPOTrainer
from fastdpo.integrations.unwrap import UnsupportedModel

ORDER = (
    {"train_sampling_strategy": "sequential"}
    if "train_sampling_strategy" in FIELDS
    else {"group_by_length": True}
)
LAYOUTS = ("packed", "shared_prompts")


def fast(folder, policy, layout, reference=None, peft_config=None, data=None, **args):
    args = {"layout": layout, "per_device_train_batch_size": BATCH, **SETTINGS, **args}
    eval_dataset = args.pop("eval_dataset", None)
    return FastDPOTrainer(
        policy,
        reference,
        args=FastDPOConfig(output_dir=str(folder), **args),
        train_dataset=pairs() if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def ran(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer.model


CASES = {
    "sigmoid": {},
    "wpo and ipo": {"loss_type": "ipo", "use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "ld": {"ld_alpha": 0.4},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "precomputed": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 9},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "multiple": {"pad_to_multiple_of": 8},
}


@pytest.mark.parametrize(
    "case",
    sampled(
        [(name, layout) for name in CASES for layout in (*LAYOUTS, "padded")],
        [("sigmoid", "packed"), *((name, "shared_prompts") for name in CASES)],
    ),
    ids="-".join,
)
def test_the_same_training_run(case, tmp_path):
    name, layout = case
    options = CASES[name]

    def reference():
        return None if "precompute_ref_log_probs" in options else disturbed(model())

    base = train(tmp_path, model(), False, reference=reference(), **copy.deepcopy(options))
    ours = ran(fast(tmp_path, model(), layout, reference(), **copy.deepcopy(options)))
    # TRL counts the prompts of both answers.
    compared(ours, base, steps=options.get("max_steps", STEPS), without=("num_tokens",))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters(layout, tmp_path):
    base = train(tmp_path, model(), False, peft_config=adapter_config())
    ours = ran(fast(tmp_path, model(), layout, peft_config=adapter_config()))
    compared(ours, base, without=("num_tokens",))
    # An adapter that is trained further, whose copy is the reference.
    (logged, _) = ran(fast(tmp_path, continued(), layout))
    base = train(tmp_path, continued(), False)
    assert logged[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert logged[-1]["loss"] == pytest.approx(base[0][-1]["loss"], abs=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows(layout, tmp_path):
    def made():
        kinds = ["sliding_attention", "full_attention"]
        return model("Gemma3Text", head_dim=16, sliding_window=4, layer_types=kinds)

    base = train(tmp_path, made(), False, reference=made())
    compared(ran(fast(tmp_path, made(), layout, made())), base, without=("num_tokens",))


@needs_an_order
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_precomputed_reference_is_margin_zero(layout, dtype, tmp_path):
    """The reference's batches are the training's where nothing is shuffled."""
    options = {"precompute_ref_log_probs": True, "train_sampling_strategy": "sequential"}
    logged, _ = ran(fast(tmp_path, model().to(dtype), layout, max_steps=1, **options))
    assert logged[0]["rewards/margins"] == 0.0
    assert logged[0]["rewards/chosen"] == 0.0


def test_a_data_set_that_has_its_reference(tmp_path):
    known = fast(tmp_path, model(), "shared_prompts", precompute_ref_log_probs=True).train_dataset
    data = pairs()
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(key, [value - 1.5 for value in known[key]])
    trainer = fast(
        tmp_path, model(), "shared_prompts", data=data, precompute_ref_log_probs=True, beta=1.0
    )
    assert trainer.train_dataset["ref_chosen_logps"] == data["ref_chosen_logps"]
    logged, _ = ran(trainer)
    assert logged[0]["rewards/chosen"] == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize(
    "case",
    sampled(
        [(kind, layout) for kind in ("model", "adapter") for layout in (*LAYOUTS, "padded")],
        [("model", "padded"), ("adapter", "shared_prompts")],
    ),
    ids="-".join,
)
def test_a_reference_that_is_kept(case, tmp_path, monkeypatch):
    kind, layout = case
    options = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "kept")}
    config = adapter_config() if kind == "adapter" else None

    def made(**further):
        return fast(tmp_path, model(), layout, peft_config=config, **{**options, **further})

    first = made()
    expected = fast(tmp_path, model(), layout, peft_config=config, precompute_ref_log_probs=True)
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        assert first.train_dataset[key] == pytest.approx(expected.train_dataset[key], abs=1e-5)
    base = train(tmp_path, model(), False, peft_config=config, precompute_ref_log_probs=True)
    compared(ran(first), base, without=("num_tokens",))
    # A later run computes nothing; one with another model is told so.
    from fastdpo.data import reference

    monkeypatch.setattr(reference, "_fill", pytest.fail)
    again = made()
    assert again.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    other = disturbed(model())
    with pytest.raises(ValueError, match="weights"):
        fast(tmp_path, other, layout, **options)


def test_what_trl_keeps_is_of_this_layout_and_these_options(tmp_path, monkeypatch):
    """Of one data set and one model, in an order in which they would be mistaken."""
    pairs().save_to_disk(tmp_path / "pairs")
    same, known = tokenizer(), ("ref_chosen_logps", "ref_rejected_logps")
    monkeypatch.setitem(globals(), "tokenizer", lambda: same)

    def made(layout="shared_prompts", **options):
        options |= {"truncation_mode": "keep_end", "precompute_ref_log_probs": True}
        data = datasets.load_from_disk(tmp_path / "pairs")
        trainer = fast(tmp_path, model(), layout, data=data, **options)
        return [value for key in known for value in trainer.train_dataset[key]]

    whole = made(max_length=40)
    assert made(max_length=40, ld_alpha=0.4) != pytest.approx(whole, abs=1e-2)
    padded, cut = made("padded", max_length=11), made(max_length=11)
    assert cut != pytest.approx(padded, abs=1e-4)
    assert cut != pytest.approx(whole, abs=1e-4)
    kept = made(max_length=11, reference_cache=str(tmp_path / "kept"))
    assert cut == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize("layout", ["shared_prompts", "padded"])
def test_a_kept_reference_is_weighted_as_the_policy_is(layout, tmp_path):
    options = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "kept")}
    logged, _ = ran(fast(tmp_path, model(), layout, ld_alpha=0.4, max_steps=1, **options))
    assert logged[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    for key in ("rewards/chosen", "rewards/rejected"):
        assert logged[0][key] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS, "padded"])
def test_a_budget_of_tokens(layout, tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 2, "max_tokens_per_batch": 60}
    trainer = fast(tmp_path, model(), layout, disturbed(model()), **options)
    seen, tokens, real = [], [], trainer.training_step

    def step(model, inputs, *args, **kwargs):
        seen.append(inputs["completion_mask"].shape[0] // 2)
        tokens.append(inputs.get("packed_input_ids", inputs["input_ids"]).numel())
        return real(model, inputs, *args, **kwargs)

    trainer.training_step = step
    logged, _ = ran(trainer)
    assert sum(seen) == 2 * len(pairs())
    assert max(tokens) <= 60
    assert len(set(seen)) > 1  # else nothing has been shown
    assert len(logged) == len(seen) == trainer.state.global_step


def test_every_pair_weighs_the_same_in_an_accumulated_step(tmp_path):
    """Against one batch of all pairs."""
    whole = {"max_steps": 1, "per_device_train_batch_size": len(pairs())}
    base = train(tmp_path, model(), False, reference=disturbed(model()), **whole)
    options = {"max_steps": 1, "gradient_accumulation_steps": 100, "max_tokens_per_batch": 60}
    (logged, trained) = ran(fast(tmp_path, model(), "packed", disturbed(model()), **options))
    assert logged[0]["loss"] == pytest.approx(base[0][0]["loss"], abs=1e-5)
    for a, b in zip(trained.parameters(), base[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_epochs_that_would_have_other_numbers_of_batches(tmp_path, monkeypatch):
    """No pair is left out, and no gradient is left to the next epoch."""
    monkeypatch.setattr("fastdpo.data.sampler._BATCHES_IN_A_BUCKET", 1)  # of so few pairs
    epochs = 12
    options = {
        "max_steps": -1,
        "num_train_epochs": epochs,
        "max_tokens_per_batch": 60,
        "gradient_accumulation_steps": 2,
    }
    trainer = fast(tmp_path, model(), "packed", disturbed(model()), **options)
    counts, seed = set(), trainer.args.seed
    sampler = TokenBudgetSampler(trainer.train_dataset, trainer._collator(), 60, seed=seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts.add(len(sampler))
    assert len(counts) > 1  # else nothing has been shown
    seen, in_step, real = [], [], trainer.training_step

    def step(model, inputs, *args, **kwargs):
        seen.append(inputs["completion_mask"].shape[0] // 2)
        in_step.append(seen[-1])
        return real(model, inputs, *args, **kwargs)

    class Counted(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            assert sum(in_step) == int(trainer._pairs_in_step)
            in_step.clear()

    trainer.training_step = step
    trainer.add_callback(Counted())
    ran(trainer)
    assert sum(seen) == epochs * len(pairs())
    assert not in_step
    assert trainer.state.global_step == trainer.state.max_steps


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    options = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "max_tokens_per_batch": 60,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole, expected = ran(fast(tmp_path / "a", model(), "packed", disturbed(model()), **options))
    trainer = fast(tmp_path / "b", model(), "packed", disturbed(model()), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    rest = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in rest[3:]] == pytest.approx([r["loss"] for r in whole[3:]])
    for a, b in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation(layout, tmp_path):
    arguments = {"eval_dataset": pairs(), "per_device_eval_batch_size": 3}
    found = fast(tmp_path, model(), layout, disturbed(model()), **arguments).evaluate()
    base = fast(tmp_path, model(), "padded", disturbed(model()), **arguments).evaluate()
    for key in base.keys() - {"eval_num_tokens"}:
        if "runtime" not in key and "per_second" not in key:
            assert found[key] == pytest.approx(base[key], abs=2e-4), key


def rows_of_messages():
    def said(role, content):
        return {"role": role, "content": content}

    return datasets.Dataset.from_list(
        [
            {
                "prompt": [said("user", "w1 w2")],
                "chosen": [said("assistant", "w3")],
                "rejected": [said("assistant", "w4 w5")],
            }
        ]
        * 4
    )


class TestRefused:
    def refuses(self, message, folder, policy=None, error=ValueError, data=None, **options):
        layout = options.pop("layout", "shared_prompts")
        with pytest.raises(error, match=message):
            fast(folder, policy or model(), layout, model(), data=data, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layout": "ragged"}, "layout should be one of"),
            ({"padding_free": True}, "padding_free should be False with layout='shared_prompts'"),
            ({"remove_unused_columns": False}, "remove_unused_columns should be True"),
            ({"reference_cache": "x"}, "precompute_ref_log_probs should be True with reference_"),
            (
                {
                    "layout": "padded",
                    "truncation_mode": "keep_end",
                    "precompute_ref_log_probs": True,
                    "reference_cache": "x",
                },
                "truncation_mode should be 'keep_start' with reference_cache",
            ),
            ({"max_tokens_per_batch": 0}, "max_tokens_per_batch should be a positive integer"),
            (
                {"max_tokens_per_batch": 99, **ORDER},
                f"{next(iter(ORDER))} should be (False|'random')",
            ),
            (
                {"max_length": 5, "truncation_mode": "keep_end"},
                r"train_dataset\[\d\]: the longest answer has \d tokens",
            ),
        ],
    )
    def test_options(self, options, message, tmp_path):
        self.refuses(message, tmp_path, **options)

    def test_experts_balancing_loss(self, tmp_path):
        options = {"num_local_experts": 2, "num_experts_per_tok": 1}
        policy = model("Mixtral", output_router_logits=True, **options)
        self.refuses("router_aux_loss_coef should be 0.0", tmp_path, policy)
        ran(fast(tmp_path, policy, "packed", model("Mixtral", **options), router_aux_loss_coef=0.0))

    def test_a_data_set_in_its_own_order(self, tmp_path):
        data = pairs().to_iterable_dataset()
        message = "max_tokens_per_batch should be None"
        self.refuses(message, tmp_path, data=data, max_tokens_per_batch=99)
        logged, _ = ran(fast(tmp_path, model(), "packed", model(), data=data))
        assert len(logged) == STEPS

    def test_a_config_of_trls(self, tmp_path):
        with pytest.raises(ValueError, match="args should be a FastDPOConfig, got DPOConfig"):
            FastDPOTrainer(
                model(), args=trl.DPOConfig(str(tmp_path), use_cpu=True), train_dataset=pairs()
            )

    @pytest.mark.parametrize("name", ["data_collator", "compute_metrics"])
    def test_arguments(self, name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} should be None"):
            FastDPOTrainer(
                model(),
                args=FastDPOConfig(str(tmp_path), use_cpu=True),
                train_dataset=pairs(),
                **{name: print},
            )

    @pytest.mark.parametrize("known", [False, True])
    def test_a_base_that_is_no_reference(self, known, tmp_path):
        peft = pytest.importorskip("peft")

        def made(**options):
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
            options = {"precompute_ref_log_probs": known, "peft_config": config}
            return fast(tmp_path, model(attention_bias=True), "packed", **options)

        with pytest.raises(ValueError, match=r"ref_model should be given: adapter .* by 'pissa'"):
            made(init_lora_weights="pissa")
        if known:  # before anything is trained
            made(bias="all")
        else:
            with pytest.raises(ValueError, match="requires_grad=True: the reference would move"):
                made(bias="all")

    def test_rotations_that_depend_on_the_longest_of_a_batch(self, tmp_path):
        """A reference that is known beforehand is of other batches."""
        rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
        policy = model(rope_parameters=rope, max_position_embeddings=8)
        message = r"should have at most 8 tokens, .*rotations \(dynamic\)"
        with pytest.raises(ValueError, match=message):
            fast(tmp_path, policy, "padded", precompute_ref_log_probs=True)
        fast(tmp_path, policy, "padded", precompute_ref_log_probs=True, max_length=8)

    def test_a_model_that_carries_a_state(self, tmp_path):
        policy = model("Mamba", state_size=8)
        trainer = fast(tmp_path, policy, "packed", model("Mamba", state_size=8))
        with pytest.raises(UnsupportedModel, match="use layout='padded' instead of 'packed'"):
            trainer.train()


def test_use_fastdpo_is_not_needed_and_does_no_harm(tmp_path):
    from fastdpo.integrations.trl import use_fastdpo

    trainer = use_fastdpo(fast(tmp_path, model(), "shared_prompts", disturbed(model())))
    base = built(tmp_path, model(), False, reference=disturbed(model()))
    compared(ran(trainer), ran(base), without=("num_tokens",))
