"""The seam for Liger-Kernel's loss in TRL's older trainers: on such a TRL where one is installed,
and on a stand-in that calls it the same way everywhere.
"""

from __future__ import annotations

import copy
import importlib.metadata
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastdpo.integrations.trl_liger import use_fastdpo_loss
from fastdpo.integrations.unwrap import UnsupportedModel
from fastdpo.loss import FusedLinearDPOLoss

transformers = pytest.importorskip("transformers", reason="needs transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
LOSSES = {
    "sigmoid": {},
    "sigmoid, which has no smoothing in TRL": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.5},
    "sft": {},
    "sigmoid_norm": {},
    "sigmoid, weighted": {"use_weighting": True},
    "sigmoid, desensitized to length": {"ld_alpha": 0.4},
}
# Of them, those whose name and β say all.
ALONE = (
    *("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "sft"),
)


# ---- A TRL that has it


def has_the_seam() -> bool:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (1, 8) <= tuple(int(part) for part in version.split(".")[:2]) <= (1, 12)


old_trl = pytest.mark.skipif(
    not has_the_seam(),
    reason="needs TRL 1.8 to 1.12: pip install --no-deps --target DIR trl==1.8.0, PYTHONPATH=DIR",
)


def trained(folder, monkeypatch, loss_type, liger, change=None, model=None, **options):
    """Five steps; what was logged, and the model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    import tiny
    import trl

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    policy = tiny.model(len(tokenizer)) if model is None else model(len(tokenizer))
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    # Liger-Kernel's layers need a GPU.
    layers = ("rope", "rms_norm", "swiglu", "geglu", "cross_entropy", "fused_linear_cross_entropy")
    args = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=5,
        optim="sgd",
        learning_rate=0.1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        loss_type=[loss_type],
        use_liger_kernel=liger,
        liger_kernel_config=dict.fromkeys(layers, False),
        **options,
    )
    rows = tiny.read_pairs(None, 20)
    for i, row in enumerate(rows):  # of several lengths
        row["chosen"] += " they" * (i % 4)
        row["rejected"] += " cares" * (i % 3)
    trainer = trl.DPOTrainer(
        policy,
        reference,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    if change is not None:
        change(trainer)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], policy


def compare(found, expected, same_logits=True):
    (ours, model), (theirs, their_model) = found, expected
    assert len(ours) == len(theirs) == 5
    for a, b in zip(ours, theirs, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-6, abs=1e-6)
        prefixes = ("rewards", "logps", *(["logits"] if same_logits else []))
        kept = {k for k in b if k.startswith(prefixes)}
        assert kept <= a.keys()
        for key in kept:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-4), key
    for a, b in zip(model.parameters(), their_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@old_trl
@pytest.mark.parametrize("case", LOSSES)
def test_losses_metrics_and_weights_are_those_of_the_logits(case, tmp_path, monkeypatch):
    name, options = case.split(",")[0], LOSSES[case]
    monkeypatch.setattr("trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss", NotCalled)
    theirs = trained(tmp_path, monkeypatch, name, False, **options)
    ours = trained(tmp_path, monkeypatch, name, True, use_fastdpo_loss, **options)
    compare(ours, theirs)


@old_trl
def test_what_a_family_does_to_its_logits(tmp_path, monkeypatch):
    def gemma(vocab_size):
        torch.manual_seed(0)
        config = transformers.Gemma2Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            final_logit_softcapping=0.1,
            tie_word_embeddings=False,
        )
        return transformers.Gemma2ForCausalLM(config)

    monkeypatch.setattr("trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss", NotCalled)
    theirs = trained(tmp_path, monkeypatch, "sigmoid", False, model=gemma)
    ours = trained(tmp_path, monkeypatch, "sigmoid", True, use_fastdpo_loss, model=gemma)
    compare(ours, theirs)


@old_trl
@pytest.mark.parametrize("name", ALONE)
def test_the_name_alone(name, tmp_path, monkeypatch):
    seam = "trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss"
    monkeypatch.setattr(seam, FusedLinearDPOLoss)
    theirs = trained(tmp_path, monkeypatch, name, False)
    ours = trained(tmp_path, monkeypatch, name, True)
    compare(ours, theirs, same_logits=False)  # Liger's mean of the logits is over all positions


class NotCalled(torch.nn.Module):
    """Takes what TRL gives, as Liger's does."""

    def __init__(self, beta, loss_type):
        super().__init__()


# ---- A stand-in


class Trainer:
    """What `use_fastdpo_loss` reads of a trainer, and its call."""

    is_fsdp_enabled = False

    def __init__(self, loss_type="sigmoid", made=NotCalled, model=None, **changes):
        self.model, self.ref_model = model or llama(0), llama(1)
        self.loss_types, self.loss_weights, self.beta = [loss_type], [1.0], 0.1
        self.label_smoothing, self.ld_alpha, self.use_weighting = 0.0, None, False
        self.f_divergence_type = "reverse_kl"
        self.args = types.SimpleNamespace(discopop_tau=0.05)
        state = types.SimpleNamespace(deepspeed_plugin=None)
        self.accelerator = types.SimpleNamespace(state=state)
        self.liger_loss = made(beta=self.beta, loss_type=loss_type)
        for name, value in changes.items():
            setattr(self, name, value)

    def compute_loss(self, ids, mask):
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        given = []
        for model in (self.model, self.ref_model):
            head = model.get_output_embeddings()
            with torch.set_grad_enabled(model is self.model):
                hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].contiguous()
            given.append((head.weight, hidden, head.bias))
        (weight, hidden, bias), (ref_weight, ref_hidden, ref_bias) = given
        return self.liger_loss(weight, hidden, labels, bias, ref_hidden, ref_weight, ref_bias)


def llama(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def expected(trainer, ids, mask):
    """-log σ(β · margin) and what is logged of it, from logits."""
    logps, kept = [], mask[:, 1:].bool()
    for model in (trainer.ref_model, trainer.model):
        logits = model(input_ids=ids).logits[:, :-1]
        token = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        logps.append((token * kept).sum(-1))
    means = [half[at].mean() for half, at in zip(logits.chunk(2), kept.chunk(2), strict=True)]
    ref_logps, own_logps = logps[0].detach(), logps[1]
    chosen, rejected = (trainer.beta * (own_logps - ref_logps)).chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean()
    return loss, (*own_logps.chunk(2), *means, chosen, rejected)


def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 61, (4, 9), generator=generator)
    mask = (torch.arange(9) > 3).long().repeat(4, 1)
    mask[1, 7:] = 0
    return ids, mask


@pytest.mark.parametrize("seam", ["the trainer", "the name alone"])
def test_a_stand_in_that_calls_it_as_trl_does(seam):
    alone = seam == "the name alone"
    trainer = Trainer(made=FusedLinearDPOLoss if alone else NotCalled)
    if not alone:
        assert use_fastdpo_loss(trainer) is trainer
    loss, logged = expected(trainer, *batch())
    weights = list(trainer.model.parameters())
    grads = torch.autograd.grad(loss, weights)
    found, metrics = trainer.compute_loss(*batch())
    assert len(metrics) == 7
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(found, weights), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    metrics = [m for i, m in enumerate(metrics) if i != 4]  # an NLL that nobody reads
    for i, (a, b) in enumerate(zip(metrics, logged, strict=True)):
        assert not a.requires_grad
        if not (alone and i in (2, 3)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("trainer should be a trl.DPOTrainer", {"liger_loss": None}),
        ("without FSDP and ZeRO-3", {"is_fsdp_enabled": True}),
        ("trainer.f_divergence_type should be", {"f_divergence_type": "js_divergence"}),
        ("workspace_bytes should be", {}),
    ],
)
def test_bad_input(message, changes):
    options = {} if changes else {"workspace_bytes": -1}
    with pytest.raises(ValueError, match=message):
        use_fastdpo_loss(Trainer(**changes), **options)


def test_logits_that_nobody_knows_are_refused():
    """The seam hands over hidden states and a head, and never the logits."""

    class InventedForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 1.1 * outputs.logits
            return outputs

    model = InventedForCausalLM(llama(0).config)
    for trainer in (Trainer(model=model), Trainer(ref_model=model)):
        with pytest.raises(UnsupportedModel, match="InventedForCausalLM does something to its log"):
            use_fastdpo_loss(trainer)


def test_a_reference_whose_logits_are_others_is_refused():
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, final_logit_softcapping=3.0,
    )  # fmt: skip
    trainer = Trainer(model=transformers.Gemma2ForCausalLM(config))
    with pytest.raises(ValueError, match=r"trainer\.ref_model should be one whose logits"):
        use_fastdpo_loss(trainer)
