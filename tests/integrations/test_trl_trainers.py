"""Every trainer of TRL with a fused lm_head, as it ships and built under `patched()`: the same
losses, metrics and weights.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from sampling import sampled
from test_trl import (
    BATCH,
    SETTINGS,
    V,
    built,
    datasets,
    disturbed,
    model,
    pairs,
    tokenizer,
    trl,
)
from test_trl import _fresh_accelerate as _fresh_accelerate

from fastdpo.integrations.trl import add_fused_lm_head, patch, patched, use_fastdpo


def texts(count, seed, low=3, high=9):
    g = torch.Generator().manual_seed(seed)

    def text():
        length = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(f"w{int(i)}" for i in torch.randint(0, V - 2, (length,), generator=g))

    return [text() for _ in range(count)]


def dpo(folder, policy, reference=None, peft_config=None, **args):
    return built(folder, policy, False, reference, peft_config=peft_config, **args)


def kto(folder, policy, reference=None, peft_config=None, **args):
    rows = [
        {"prompt": p, "completion": " " + c, "label": bool(i % 2)}
        for i, (p, c) in enumerate(zip(texts(16, 1), texts(16, 2), strict=True))
    ]
    config = trl.KTOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_length=32, **{**SETTINGS, **args}
    )
    return trl.KTOTrainer(
        policy, reference, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def sft(folder, policy, reference=None, peft_config=None, **args):
    rows = [{"text": text} for text in texts(16, 3, 6, 20)]
    config = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        **{**SETTINGS, "max_length": 32, **args},
    )
    return trl.SFTTrainer(
        policy, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def reward(completions, **_):
    return [float(sum(ord(c) for c in text) % 7) for text in completions]


def online(kind):
    def make(folder, policy, reference=None, peft_config=None, **args):
        config = getattr(trl, f"{kind}Config")(
            output_dir=str(folder), per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, **{**SETTINGS, "max_steps": 2, **args},
        )  # fmt: skip
        policy.save_pretrained(folder / "policy")  # its reference is loaded from there
        policy = type(policy).from_pretrained(folder / "policy", dtype=torch.float32)
        prompts = datasets.Dataset.from_list([{"prompt": text} for text in texts(8, 4)])
        return getattr(trl, f"{kind}Trainer")(
            model=policy, reward_funcs=reward, args=config, train_dataset=prompts,
            processing_class=tokenizer(), peft_config=peft_config,
        )  # fmt: skip

    return make


grpo, rloo = online("GRPO"), online("RLOO")


def mixtral():
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    return model("Mixtral", **options)


def adapter(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


def prompts():
    peft = pytest.importorskip("peft")
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


CASES = {
    "dpo": (dpo, {"reference": True}),
    "dpo, wpo": (dpo, {"reference": True, "use_weighting": True}),
    "dpo, precomputed": (dpo, {"precompute_ref_log_probs": True}),
    "dpo, experts": (dpo, {"make": mixtral, "reference": True}),
    "dpo, prompt tuning": (dpo, {"peft_config": prompts}),
    "kto": (kto, {"reference": True}),
    "kto, apo": (kto, {"reference": True, "loss_type": "apo_zero_unpaired"}),
    "kto, lora": (kto, {"peft_config": adapter}),
    "sft": (sft, {}),
    "sft, dft": (sft, {"loss_type": "dft"}),
    "sft, padding-free": (sft, {"padding_free": True, "max_length": None}),
    "sft, packed": (sft, {"packing": True}),
    "sft, accumulation": (sft, {"gradient_accumulation_steps": 2}),
    "sft, experts": (sft, {"make": mixtral}),
    "grpo": (grpo, {}),
    "grpo, temperature and beta": (grpo, {"temperature": 0.7, "beta": 0.1}),
    "grpo, entropy bonus": (grpo, {"entropy_coef": 0.1}),
    "grpo, likely tokens left out": (grpo, {"top_entropy_quantile": 0.37}),
    "grpo, half of the tokens": (grpo, {"top_entropy_quantile": 0.5}),
    "grpo, fp32 head": (grpo, {"cast_lm_head_to_fp32": True}),
    "grpo, lora": (grpo, {"peft_config": adapter}),
    "rloo": (rloo, {"beta": 0.1}),
}


def run(trainer):
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return logged, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


SAMPLE = ["dpo, experts", "kto", "sft, packed", "grpo, entropy bonus", "grpo, half of the tokens"]


@pytest.mark.parametrize("case", sampled(CASES, SAMPLE))
@pytest.mark.filterwarnings("ignore")
def test_the_same_training_run(case, tmp_path):
    trainer, options = CASES[case]
    options = dict(options)
    make, with_reference = options.pop("make", model), options.pop("reference", False)
    peft_config = options.pop("peft_config", None)

    def train():
        return run(
            trainer(
                tmp_path,
                make(),
                reference=disturbed(make()) if with_reference else None,
                peft_config=None if peft_config is None else peft_config(),
                **options,
            )
        )

    torch.manual_seed(7)
    base, base_weights = train()
    with patched():
        torch.manual_seed(7)
        ours, weights = train()
    assert len(ours) == len(base) > 0
    for a, b in zip(ours, base, strict=True):
        assert a.keys() == b.keys()
        skipped = {key for key in b if "runtime" in key or "per_second" in key or "time" in key}
        if abs(b.get("rewards/margins", 1.0)) < 1e-5:  # which of two equals is larger is chance
            skipped.add("rewards/accuracies")
        for key in b.keys() - skipped:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-4), key
    for name, b in base_weights.items():
        torch.testing.assert_close(weights[name], b, atol=4e-4, rtol=4e-3, msg=name)


def test_the_patch_is_taken_back():
    theirs = trl.trainer.utils.add_fused_lm_head
    with patched():
        ours = trl.trainer.utils.add_fused_lm_head
        assert ours is not theirs
        assert trl.trainer.dpo_trainer.add_fused_lm_head is ours
        with patched(backend="torch"):
            assert trl.trainer.utils.add_fused_lm_head is not ours
        assert trl.trainer.dpo_trainer.add_fused_lm_head is ours
    for module in ("utils", "dpo_trainer", "sft_trainer"):
        assert getattr(trl.trainer, module).add_fused_lm_head is theirs


@pytest.mark.filterwarnings("ignore")
def test_async_grpo_holds_it_too():
    """Also where it is imported meanwhile; its trainer needs a server, and is not run."""
    theirs = trl.trainer.utils.add_fused_lm_head
    with patched():
        name = "trl.experimental.async_grpo.async_grpo_trainer"
        module = importlib.import_module(name)
        assert module.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head is not theirs
    assert module.add_fused_lm_head is theirs


def test_an_error_takes_it_back_too():
    theirs = trl.trainer.utils.add_fused_lm_head
    with pytest.raises(KeyError), patched():
        raise KeyError
    assert trl.trainer.utils.add_fused_lm_head is theirs


def test_the_first_margin_of_a_precomputed_reference_is_zero_in_16_bits(tmp_path):
    """The reference is computed in the trainer's constructor: through the same operations."""
    with patched():
        logged, _ = run(dpo(tmp_path, model().bfloat16(), precompute_ref_log_probs=True))
    assert logged[0]["rewards/margins"] == 0.0
    assert logged[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)


def test_a_trainer_that_was_built_under_the_patch_can_be_attached_again(tmp_path):
    with patched():
        trainer = dpo(tmp_path, model(), model())
    ids = torch.randint(2, V, (2, 5))
    before = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    use_fastdpo(trainer, workspace_bytes=0)
    after = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert after.log_probs.equal(before.log_probs)
    assert after.is_top1.equal(before.is_top1)


def test_the_contract_of_the_fused_forward():
    """Columns, masks and losses, as TRL's own function gives them."""
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ours, theirs = model().eval(), model().eval()
    add_fused_lm_head(ours, temperature=0.7, outputs=outputs)
    trl.trainer.utils.add_fused_lm_head(theirs, temperature=0.7, outputs=outputs)
    ids = torch.randint(2, V, (3, 7))
    labels = ids.clone()
    labels[:, :2], labels[1] = -100, -100
    shift = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    for given in (
        {"labels": labels},
        {"shift_labels": labels},  # the same tensor, which says something else then
        {"shift_labels": shift},
        {"labels": labels, "num_items_in_batch": torch.tensor(3)},
        {"labels": torch.full_like(labels, -100)},
    ):
        a = ours(input_ids=ids, fused_lm_head=True, **given)
        b = theirs(input_ids=ids, fused_lm_head=True, **given)
        assert a.keys() == b.keys()
        for name in b.keys():  # noqa: SIM118
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)
        assert a.loss.requires_grad
        a.loss.backward()
    assert ours(input_ids=ids).logits.shape == (3, 7, V)
    assert ours(input_ids=ids, labels=labels).loss.isfinite()


@pytest.mark.parametrize("given", [{}, {"labels": 1, "shift_labels": 1}], ids=str)
def test_labels_are_given_once(given):
    lm, ids = model(), torch.randint(2, V, (2, 5))
    add_fused_lm_head(lm)
    with pytest.raises(ValueError, match="labels should be given with fused_lm_head"):
        lm(input_ids=ids, fused_lm_head=True, **dict.fromkeys(given, ids))


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="outputs should be"):
        add_fused_lm_head(model(), outputs=("logits",))
    with pytest.raises(ValueError, match="temperature should be"):
        add_fused_lm_head(model(), temperature=0.0)
    with pytest.raises(ValueError, match="workspace_bytes should be"):
        patch(workspace_bytes=-1)
    with pytest.raises(ValueError, match="trainer should be"):
        use_fastdpo(pairs())
    monkeypatch.delattr(trl.trainer.utils, "add_fused_lm_head")
    with pytest.raises(ValueError, match="trl should be a version"):
        patch()


assert BATCH  # a batch of the pairs that test_trl makes
