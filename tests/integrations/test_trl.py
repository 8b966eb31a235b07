"""TRL's DPOTrainer as it ships and with fastdpo: the same losses, metrics and weights."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from fastdpo.integrations.trl import use_fastdpo

trl = pytest.importorskip("trl", "1.16", reason="needs trl 1.16, and that Python 3.11")
datasets = pytest.importorskip("datasets", reason="needs datasets")
transformers = pytest.importorskip("transformers", reason="needs transformers")


V, STEPS, BATCH = 97, 4, 2


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(V - 2))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>"
    )


def model(name="Llama", **config):
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}Config")
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        **config,
    }
    return transformers.AutoModelForCausalLM.from_config(cls(**settings))


def pairs():
    g = torch.Generator().manual_seed(0)

    def text(low, high):
        length = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(f"w{int(i)}" for i in torch.randint(0, V - 2, (length,), generator=g))

    rows = [(text(2, 6), " " + text(1, 9), " " + text(1, 9)) for _ in range(STEPS * BATCH)]
    columns = ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])


FIELDS = {field.name for field in dataclasses.fields(trl.DPOConfig)}
needs_an_order = pytest.mark.skipif(
    "train_sampling_strategy" not in FIELDS,
    reason="this transformers always shuffles: needs a newer one",
)
SETTINGS = {  # of every trainer's configuration
    "max_steps": STEPS,
    "optim": "sgd",  # Adam turns roundings of vanishing gradients into whole steps
    "learning_rate": 0.1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
}


def built(folder, policy, fast, reference=None, peft_config=None, **args):
    settings = {**SETTINGS, "per_device_train_batch_size": BATCH, **args}
    config = trl.DPOConfig(output_dir=str(folder), **settings)
    trainer = trl.DPOTrainer(
        policy,
        reference,
        args=config,
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    if fast:
        assert use_fastdpo(trainer) is trainer
    return trainer


def train(*args, **options):
    trainer = built(*args, **options)
    trainer.train()
    assert not torch.is_autocast_enabled("cpu")
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return logged, trainer.model


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """The mixed precision of one trainer stays in accelerate's state and in the environment."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def disturbed(reference):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return reference


CASES = {
    "sigmoid": {},
    "wpo and ipo": {"loss_type": "ipo", "use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "ld": {"ld_alpha": 0.4},
    "precomputed": {"precompute_ref_log_probs": True},
    "autocast": {"bf16": True},
}


def compare(tmp_path, make, tolerance=2e-4, **args):
    def run(fast):
        policy = make()
        own_reference = "peft_config" in args or "precompute_ref_log_probs" in args
        reference = None if own_reference else disturbed(make())
        return train(tmp_path, policy, fast, reference=reference, **copy.deepcopy(args))

    base, ours = run(False), run(True)
    compared(ours, base, tolerance)


def compared(found, expected, tolerance=2e-4, steps=STEPS, without=()):
    """What two runs logged, and their weights."""
    (ours, our_model), (base, base_model) = found, expected
    assert len(ours) == len(base) == steps
    for a, b in zip(ours, base, strict=True):
        timed = {k for k in b if "runtime" in k or "per_second" in k} | set(without)
        assert a.keys() == b.keys()
        if abs(b["rewards/margins"]) < 1e-5:  # which of two equal rewards is larger is chance
            timed.add("rewards/accuracies")
        for key in b.keys() - timed:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key
    for a, b in zip(our_model.parameters(), base_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2 * tolerance, rtol=20 * tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_same_training_run(case, tmp_path):
    loose = case == "autocast"
    compare(tmp_path, model, tolerance=0.03 if loose else 2e-4, **CASES[case])


def test_softcapped_logits(tmp_path):
    def gemma():
        return model("Gemma2", head_dim=16, final_logit_softcapping=5.0)

    compare(tmp_path, gemma)


def adapter_config():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM")


def test_an_adapter(tmp_path):
    compare(tmp_path, model, peft_config=adapter_config())


def continued(**options):
    """An adapter that was trained before; the trainer makes its copy, "ref"."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM")
    policy = peft.get_peft_model(model(**options), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return policy


def test_an_adapter_that_is_trained_further(tmp_path):
    (base, base_model), (ours, our_model) = (train(tmp_path, continued(), f) for f in (0, 1))
    assert ours[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    for a, b in zip(ours, base, strict=True):
        for key in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-4), key
    assert list(our_model.peft_config) == ["default", "ref"]
    for a, b in zip(our_model.parameters(), base_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=4e-4, rtol=4e-3)


def test_the_same_adapter_is_the_reference_outside_the_trainer(tmp_path):
    from fastdpo.integrations import hf

    trainer = built(tmp_path, continued(), True)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    names = {"input_ids", "attention_mask", "completion_mask"}
    out = hf.dpo_loss(trainer.model, {k: v for k, v in batch.items() if k in names})
    assert out.loss.item() == torch.tensor(math.log(2.0)).item()


@pytest.mark.parametrize("adapter", [False, True])
def test_attention_drops_nothing_in_the_reference(adapter, tmp_path):
    """TRL's disable_dropout sets modules to 0; attention reads its rate from the configuration."""
    policy = continued(attention_dropout=0.5) if adapter else model(attention_dropout=0.5)
    trainer = built(tmp_path, policy, True, None if adapter else copy.deepcopy(policy))
    batch = next(iter(trainer.get_train_dataloader()))
    lm = trainer.model if adapter else trainer.ref_model
    expected = trainer.compute_ref_log_probs(lm.eval(), batch)
    got = trainer.compute_ref_log_probs(lm.train(), batch)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(m.training for m in lm.modules())


def test_padding_on_the_left(tmp_path):
    """Of a collator of one's own: positions are counted from the first token, as without it."""
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    trainer = built(tmp_path, model("GPT2", **gpt2), True, model("GPT2", **gpt2))
    ids = torch.randint(2, V, (2, 9))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    mask[0, :3] = 0
    lm = trainer.model.eval()
    padded = lm(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    alone = lm(input_ids=ids[:1, 3:], labels=labels[:1, 3:], fused_lm_head=True)
    torch.testing.assert_close(padded.log_probs[:1, 3:], alone.log_probs)


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_what_is_not_causal_is_refused_when_it_is_attached(which, tmp_path):
    trainer = built(tmp_path, model(), False, model())
    bert = model("Roberta", max_position_embeddings=64)  # is_decoder=False
    trl.trainer.utils.add_fused_lm_head(bert)
    setattr(trainer, "model" if which == "policy" else "ref_model", bert)
    with pytest.raises(ValueError, match="RobertaForCausalLM is not causal"):
        use_fastdpo(trainer)


def test_mixture_of_experts_keeps_its_balancing_loss(tmp_path):
    def mixtral():
        return model(
            "Mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
        )

    compare(tmp_path, mixtral)


def test_other_calls_reach_the_models_own_forward(tmp_path):
    _, trained = train(tmp_path, model(), fast=True, reference=model())
    ids = torch.tensor([[2, 3, 4]])
    assert trained(input_ids=ids).logits.shape == (1, 3, V)
    assert trained.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 5


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="transformers 5.0 itself waits for its mask"
)
def test_policy_and_reference_look_for_the_rows_once(tmp_path):
    """And so a step waits for the GPU once; labels that changed are looked at again."""
    fake_gpu = pytest.importorskip("benchmarks.instruments.fake_gpu", reason="needs triton")
    # Eager attention and a mask: else transformers itself would wait.
    policy, reference = (model(attn_implementation="eager") for _ in range(2))
    trainer = built(tmp_path, policy, True, disturbed(reference))
    policy, reference = trainer.model, trainer.ref_model
    ids = torch.randint(2, V, (4, 9))
    labels = ids.clone()
    labels[:, :4] = -100

    def call(lm, labels):
        mask = torch.ones_like(on_gpu)
        return lm(input_ids=on_gpu, attention_mask=mask, labels=labels, fused_lm_head=True)

    on_gpu = ids
    expected = [call(lm, labels).log_probs.detach() for lm in (policy, reference)]
    with fake_gpu.FakeGPU() as gpu:
        for lm in (policy, reference):
            lm._apply(gpu.put)
        on_gpu, labels = gpu.put(ids), gpu.put(labels)
        for lm in (policy, reference):
            call(lm, labels.clone())  # probed again: the weights have moved
        gpu.waits.clear()
        found = [call(lm, labels) for lm in (policy, reference)]
        (-found[0].log_probs.sum()).backward()
        assert len(gpu.waits) == 1
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(gpu.get(a.log_probs), b)
        labels[:, 4] = -100
        again = call(reference, labels)
        assert len(gpu.waits) == 2
        assert not gpu.get(again.log_probs)[:, 3].any()
        assert gpu.get(found[1].log_probs)[:, 3].all()


def test_labels_that_were_refused_are_refused_again(tmp_path):
    """And not taken for the rows of those before, among which the bad one was no row."""
    trainer = built(tmp_path, model(), True, model())
    ids = torch.randint(2, V, (2, 5))
    good, bad = ids.clone(), ids.clone()
    good[:, :3], bad[:, 1] = -100, V
    trainer.model(input_ids=ids, labels=good, fused_lm_head=True)
    for lm in (trainer.model, trainer.ref_model):
        with pytest.raises(ValueError, match="labels should be"):
            lm(input_ids=ids, labels=bad, fused_lm_head=True)


def fused(lm, ids, labels, **kwargs):
    mask = torch.ones_like(ids)
    return lm(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **kwargs)


def eager(lm, ids, labels):
    with torch.no_grad():
        logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])
    return picked.squeeze(-1) * (labels[:, 1:] != -100)


@pytest.mark.parametrize("after", ["use_fastdpo", "accelerate", "an adapter"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_copy_answers_for_itself(family, after, tmp_path):
    """An average of the weights, a snapshot, create_reference_model."""
    options = {"head_dim": 16, "final_logit_softcapping": 5.0} if family == "Gemma2" else {}
    policy, adapter = model(family, **options), None
    if after == "an adapter":
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    reference = None if adapter else model(family, **options)
    trainer = built(tmp_path, policy, True, reference, peft_config=adapter)
    if after == "accelerate":
        trainer.train()
    original = trainer.model.eval()
    ids = torch.randint(2, V, (4, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    before = fused(original, ids, labels).log_probs.detach()
    twin = copy.deepcopy(original)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    found = fused(twin, ids, labels)
    torch.testing.assert_close(found.log_probs.detach(), eager(twin, ids, labels))
    assert (found.log_probs - before).abs().max() > 1e-3
    found.log_probs.sum().backward()
    assert all(p.grad is None for p in original.parameters())
    assert any(p.grad is not None for p in twin.parameters())
    assert torch.equal(fused(original, ids, labels).log_probs, before)
    torch.testing.assert_close(before, eager(original, ids, labels))
    del trainer, original, policy
    again = fused(twin, ids, labels).log_probs
    assert torch.equal(again, found.log_probs)


def test_create_reference_model_and_saving(tmp_path):
    from trl.experimental.utils import create_reference_model

    trainer = built(tmp_path, model(), True, model())
    policy = trainer.model.eval()
    ids = torch.randint(2, V, (4, 9))
    made = create_reference_model(policy)
    expected = fused(policy, ids, ids).log_probs
    assert torch.equal(fused(made, ids, ids).log_probs, expected)
    policy.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(eager(loaded, ids, ids), expected.detach())
    torch.save(policy, tmp_path / "pickled")  # a plain model, as TRL's own fused head pickles
    loaded = torch.load(tmp_path / "pickled", weights_only=False)
    torch.testing.assert_close(eager(loaded, ids, ids), expected.detach())


def test_a_copy_of_a_forward_that_belongs_to_another_is_refused(tmp_path):
    policy = model()
    own = policy.forward

    def patched(*args, **kwargs):
        return own(*args, **kwargs)

    policy.forward = patched
    trainer = built(tmp_path, policy, True, model())
    ids = torch.randint(2, V, (2, 5))
    assert fused(trainer.model, ids, ids).log_probs.isfinite().all()
    twin = copy.deepcopy(trainer.model)
    for call in (lambda: fused(twin, ids, ids), lambda: twin(input_ids=ids)):
        with pytest.raises(ValueError, match="copy of a LlamaForCausalLM whose forward had been"):
            call()


def test_a_compiled_model_is_probed_once_per_mode_and_compiled_no_more_for_it(
    tmp_path, monkeypatch
):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    from fastdpo.integrations import probe

    verdicts, verify = [], probe.verify
    monkeypatch.setattr(probe, "verify", lambda *args: verdicts.append(args) or verify(*args))
    torch._dynamo.reset()
    trainer, counter = built(tmp_path, model(), True, model()), CompileCounter()
    compiled = torch.compile(trainer.model, backend=counter, dynamic=False)
    ids = torch.randint(2, V, (4, 9))
    expected, frames = eager(trainer.model, ids, ids), []
    for _ in range(4):
        for mode in (compiled.train, compiled.eval):
            found = fused(mode(), ids, ids).log_probs
            torch.testing.assert_close(found.detach(), expected)
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 3
    assert len(verdicts) == 2


def test_bad_input():
    with pytest.raises(ValueError, match="trainer should be"):
        use_fastdpo(object())
