"""A reference computed once: its numbers, its folder, and what it is refused for."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("datasets", reason="needs datasets")

import datasets
from hf_models import build
from small_tokenizers import beginning, byte_level

from fastdpo.data import (
    PairCollator,
    TokenBudgetSampler,
    load_reference,
    reference_batches,
    reference_logps,
)
from fastdpo.data import reference as module
from fastdpo.data.reference_folder import Folder
from fastdpo.integrations import hf

LAYOUTS = ("padded", "packed", "shared_prompts")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
QUIET = {"progress": False, "max_tokens_per_batch": 200}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pairs(count=24, seed=0, longest=12):
    rng = random.Random(seed)

    def ids():
        return [rng.randrange(3, 50) for _ in range(rng.randrange(1, longest))]

    return [dict(zip(IDS, (ids(), ids(), ids()), strict=True)) for _ in range(count)]


def margins(model, batches, rows, collator):
    """Log-ratios of every answer, of the policy that is its reference."""
    found = []
    for indices in batches:
        batch = collator([rows[i] for i in indices])
        assert "ref_chosen_logps" in batch
        out = hf.dpo_loss(model, batch, beta=1.0)
        found += [out.chosen_rewards, out.rejected_rewards]
    return torch.cat(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_numbers_are_those_of_sequence_logps(layout, dtype, tmp_path):
    model, examples, collator = build("Llama").to(dtype), pairs(), PairCollator(0, layout)
    rows = reference_logps(model, examples, collator, tmp_path / "r", **QUIET)
    assert [{name: row[name] for name in IDS} for row in rows] == examples
    assert rows.features["ref_chosen_logps"].dtype == str(
        torch.promote_types(dtype, torch.float32)
    ).removeprefix("torch.")
    batches = reference_batches(tmp_path / "r")
    assert len(batches) > 1
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for indices in batches:
        batch = collator([examples[i] for i in indices])
        with torch.no_grad():
            sums = hf.sequence_logps(model, **batch).view(2, -1).tolist()
        for side, own in zip(("chosen", "rejected"), sums, strict=True):
            assert [rows[i][f"ref_{side}_logps"] for i in indices] == own
    for row in rows:
        for side in ("chosen", "rejected"):
            tokens = row[f"ref_{side}_token_logps"]
            assert len(tokens) == len(row[f"{side}_ids"])
            assert sum(tokens) == pytest.approx(row[f"ref_{side}_logps"], rel=1e-5)


def test_every_token_has_its_own(tmp_path):
    model, (example,) = build("Llama"), pairs(1)
    (row,) = reference_logps(model, [example], PairCollator(0), tmp_path / "r", **QUIET)
    for side in ("chosen", "rejected"):
        ids = torch.tensor([*example["prompt_ids"], *example[f"{side}_ids"]])
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        own = logps[-len(example[f"{side}_ids"]) :]
        torch.testing.assert_close(torch.tensor(row[f"ref_{side}_token_logps"]), own.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
def test_in_the_same_batches_the_margin_is_zero_to_the_bit(layout, how, tmp_path):
    """Whatever order they come in, and with gradients."""
    model = build("Llama").to(torch.bfloat16 if how == "bfloat16" else torch.float32).train()
    autocast = torch.bfloat16 if how == "autocast" else None
    collator = PairCollator(0, layout)
    rows = reference_logps(model, pairs(), collator, tmp_path / "r", autocast=autocast, **QUIET)
    assert model.training
    batches = reference_batches(tmp_path / "r")[::-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        assert (margins(model, batches, rows, collator) == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_the_batches_of_a_sampler(layout, tmp_path):
    model, examples, collator = build("Llama").bfloat16(), pairs(), PairCollator(0, layout)
    sampler = TokenBudgetSampler(examples, collator, 150, seed=3)
    batches = sampler.batches()
    rows = reference_logps(model, examples, collator, tmp_path / "r", batches=batches, **QUIET)
    assert (margins(model, sampler, rows, collator) == 0).all()
    assert reference_batches(tmp_path / "r") == batches


def test_in_other_batches_it_is_zero_up_to_rounding(tmp_path):
    examples, collator = pairs(), PairCollator(0, "packed")
    model = build("Llama")
    rows = reference_logps(model, examples, collator, tmp_path / "r", **QUIET)
    found = margins(model, [[i] for i in range(len(examples))], rows, collator)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-4)


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
ROTATIONS = {
    "longrope": {**LONG, "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_that_depend_on_the_longest_of_a_batch(kind, tmp_path):
    """A short sequence beside a long one is worth 12 nats less here."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **ROTATIONS[kind]}
    model = build("Llama", rope_parameters=rope, max_position_embeddings=16)
    collator, batches = PairCollator(0), [[0, 1], [2]]
    short, long = pairs(2, longest=7), pairs(1, seed=3, longest=3)
    long[0]["prompt_ids"] = [7] * 20
    with pytest.raises(ValueError, match=rf"should have at most 16 tokens.*rotations \({kind}\)"):
        reference_logps(model, short + long, collator, tmp_path / "r", **QUIET)
    reference_logps(model, short, collator, tmp_path / "short", **QUIET)
    reference_logps(model, short + long, collator, tmp_path / "r", batches=batches, **QUIET)


def test_batches_that_repeat_and_leave_out(tmp_path):
    """As a sampler's do, for several processes."""
    model, examples, collator = build("Llama"), pairs(7), PairCollator(0, "packed")
    given = [[0, 1], torch.tensor([2, 3]), [0, 1], (3, 4)]
    rows = reference_logps(model, examples, collator, tmp_path / "r", batches=given, **QUIET)
    found = reference_batches(tmp_path / "r")
    assert found[:3] == [[0, 1], [2, 3], [3, 4]]
    assert sorted(i for batch in found[3:] for i in batch) == [5, 6]
    assert len(rows) == 7
    assert (margins(model, [[2, 3]], rows, collator) == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_fill_the_budget_longest_first(layout):
    collator = PairCollator(0, layout)
    lengths = [collator.length_of(example) for example in pairs(300)]
    batches = module._planned(lengths, collator, 120, None)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    tokens = [collator.tokens_in([lengths[i] for i in batch]) for batch in batches]
    assert max(tokens) <= 120
    for batch, after in pairwise(batches):
        more = collator.tokens_in([lengths[i] for i in (*batch, after[0])])
        assert more > 120
    alone = [collator.tokens_in([lengths[i]]) for batch in batches for i in batch]
    assert alone == sorted(alone, reverse=True)


def test_truncated_rows_are_what_the_numbers_are_of(tmp_path):
    model, examples = build("Llama"), pairs()
    for mode in ("keep_start", "keep_end"):
        collator = PairCollator(0, "packed", max_length=14, truncation_mode=mode)
        rows = reference_logps(model, examples, collator, tmp_path / mode, **QUIET)
        cut = [len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in rows]
        assert max(cut) <= 14
        whole = PairCollator(0, "packed")  # cuts nothing more
        assert (margins(model, reference_batches(tmp_path / mode), rows, whole) == 0).all()
        for same in (examples, rows):
            load_reference(tmp_path / mode, examples=same, collator=collator)


def test_a_data_set_and_a_list_are_the_same(tmp_path, monkeypatch):
    model, examples, collator = build("Llama"), pairs(), PairCollator(0)
    monkeypatch.setattr("fastdpo.data.reference_folder.ROWS_PER_FILE", 10)
    given = datasets.Dataset.from_list([{**e, "ref_chosen_logps": 1.0} for e in examples])
    first = reference_logps(model, examples, collator, tmp_path / "a", **QUIET)
    second = reference_logps(model, given, collator, tmp_path / "b", **QUIET)
    third = reference_logps(model, given.with_format("torch"), collator, tmp_path / "c", **QUIET)
    assert first.to_list() == second.to_list() == third.to_list()
    assert len(Folder(tmp_path / "a").files()) == 3
    whole = datasets.load_dataset(str(tmp_path / "a"))["train"]  # without us, too
    assert whole.to_list() == first.to_list()


# ---- A run that was finished, stopped, or is running


def test_a_finished_run_does_nothing(tmp_path, monkeypatch):
    model, examples, collator = build("Llama"), pairs(), PairCollator(0)
    first = reference_logps(model, examples, collator, tmp_path / "r", **QUIET)
    monkeypatch.setattr(hf, "sequence_logps", pytest.fail)
    second = reference_logps(model, examples, collator, tmp_path / "r", **QUIET)
    assert first.to_list() == second.to_list()
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        *("reference.json", "batches.json", "data", ".lock")
    }


def test_what_was_computed_before_an_interrupt_stays(tmp_path):
    model, examples, collator = build("Llama"), pairs(), PairCollator(0)

    def interrupting(done, total):
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_logps(
            model, examples, collator, tmp_path / "r", **{**QUIET, "progress": interrupting}
        )
    assert Folder(tmp_path / "r").done() > 0
    with pytest.raises(ValueError, match=r"should be finished, got \d+ of \d+ batches"):
        load_reference(tmp_path / "r")
    calls = []
    reference_logps(
        model, examples, collator, tmp_path / "r",
        **{**QUIET, "progress": lambda done, total: calls.append((done, total))},
    )  # fmt: skip
    assert calls[0][0] > 8
    assert calls[-1] == (24, 24)


def test_a_folder_that_another_process_writes(tmp_path):
    arguments = (build("Llama"), pairs(4), PairCollator(0), tmp_path / "r")
    with (
        Folder(tmp_path / "r").locked("out"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        reference_logps(*arguments, **QUIET)
    assert len(reference_logps(*arguments, **QUIET)) == 4


def test_before_anything_is_computed_options_may_change(tmp_path, monkeypatch):
    """After memory did not suffice, say."""
    model, examples, collator = build("Llama"), pairs(), PairCollator(0)
    real, calls = hf.sequence_logps, []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(hf, "sequence_logps", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        reference_logps(model, examples, collator, tmp_path / "r", **QUIET)
    fewer = {**QUIET, "max_tokens_per_batch": 100}
    assert len(reference_logps(model, examples, collator, tmp_path / "r", **fewer)) == 24
    with pytest.raises(ValueError, match="max_tokens_per_batch: 100 there, 200 here; batches: "):
        reference_logps(model, examples, collator, tmp_path / "r", **QUIET)


# ---- The key

BASE = PairCollator(0, "packed", 20)
OTHERS = {
    "weights": lambda call: call["model"].lm_head.weight.data[0, 0].add_(1e-3),
    "config.rms_norm_eps": lambda call: setattr(call["model"].config, "rms_norm_eps", 1e-3),
    "dtype": lambda call: call["model"].bfloat16(),
    "autocast": lambda call: call.update(autocast=torch.bfloat16),
    "attention": lambda call: call.update(model=build("Llama", attn_implementation="eager")),
    "model": lambda call: call.update(model=build("Mistral")),
    "tokenizer": lambda call: call.update(tokenizer=beginning()),
    "data": lambda call: call["examples"][5]["chosen_ids"].append(7),
    "layout": lambda call: call.update(collator=PairCollator(0, "shared_prompts", 20)),
    "max_length": lambda call: call.update(collator=PairCollator(0, "packed", 19)),
    "truncation_mode": lambda call: call.update(collator=PairCollator(0, "packed", 20, "keep_end")),
    "pad_to_multiple_of": lambda call: call.update(
        collator=PairCollator(0, "packed", 20, pad_to_multiple_of=8)
    ),
    "temperature": lambda call: call.update(temperature=0.5),
}


def call_of(**changed):
    return {
        "model": build("Llama"),
        "examples": pairs(8),
        "collator": BASE,
        "tokenizer": byte_level(),
        "temperature": 1.0,
        **changed,
    }


@pytest.mark.parametrize("part", OTHERS)
def test_another_part_is_refused_by_name(part, tmp_path):
    call = call_of()
    reference_logps(**call, out=tmp_path / "r", **QUIET)
    load_reference(tmp_path / "r", **call)
    OTHERS[part](call)
    with pytest.raises(ValueError, match=rf"holds the reference of .*\b{part}: .* there, .* here"):
        reference_logps(**call, out=tmp_path / "r", **QUIET)
    with pytest.raises(ValueError, match=rf"holds the reference of .*\b{part}: .* there, .* here"):
        load_reference(tmp_path / "r", **call)


def test_what_changes_no_number_is_no_difference(tmp_path):
    call = call_of()
    reference_logps(**call, out=tmp_path / "r", **QUIET)
    call["model"].config.update({"use_cache": False, "pad_token_id": 7, "_name_or_path": "x"})
    call["model"].train().requires_grad_(False)
    call["tokenizer"](["a b c", "a"], padding=True, truncation=True, max_length=2)
    call["collator"] = PairCollator(1, "packed", 20)
    load_reference(tmp_path / "r", **call)
    load_reference(tmp_path / "r", model=torch.compile(call["model"]))


def test_a_saved_model_is_the_same_one(tmp_path):
    from transformers import AutoModelForCausalLM

    call = call_of(model=build("Qwen2").bfloat16())  # tied
    reference_logps(**call, out=tmp_path / "r", **QUIET)
    call["model"].save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    load_reference(tmp_path / "r", model=loaded)


def test_entries_that_another_transformers_knows_lose_nothing(tmp_path, monkeypatch):
    call = call_of()
    first = reference_logps(**call, out=tmp_path / "r", **QUIET)
    path = tmp_path / "r" / "reference.json"
    stored = json.loads(path.read_text())
    del stored["key"]["config"]["mlp_bias"]
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(hf, "sequence_logps", pytest.fail)
    assert reference_logps(**call, out=tmp_path / "r", **QUIET).to_list() == first.to_list()


def test_another_version_is_another_reference(tmp_path):
    call = call_of()
    reference_logps(**call, out=tmp_path / "r", **QUIET)
    path = tmp_path / "r" / "reference.json"
    path.write_text(path.read_text().replace('"fastdpo": "0.', '"fastdpo": "99.'))
    with pytest.raises(ValueError, match=r"fastdpo: 99\S* there, \S+ here"):
        load_reference(tmp_path / "r", model=call["model"])
    assert len(load_reference(tmp_path / "r")) == 8  # nothing was to be compared


class TestAdapters:
    def adapted(self, scale=1.0):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(build("Llama"), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_().mul_(0.3 * scale)
        return model

    def test_without_it_it_is_the_model_before(self, tmp_path):
        model, examples = self.adapted(), pairs(8)
        rows = reference_logps(build("Llama"), examples, BASE, tmp_path / "r", **QUIET)
        load_reference(tmp_path / "r", model=model, ref_adapter="__base__")
        again = reference_logps(
            model, examples, BASE, tmp_path / "s", ref_adapter="__base__", **QUIET
        )
        assert again.to_list() == rows.to_list()
        out = hf.dpo_loss(model, BASE([rows[i] for i in reference_batches(tmp_path / "r")[0]]))
        assert (out.chosen_rewards != 0).all()  # the adapter is on

    def test_with_it_the_margin_is_zero(self, tmp_path):
        model = self.adapted()
        rows = reference_logps(
            model, pairs(8), BASE, tmp_path / "r", ref_adapter="default", **QUIET
        )
        assert (margins(model, reference_batches(tmp_path / "r"), rows, BASE) == 0).all()
        assert any(p.requires_grad for p in model.parameters())
        model.add_adapter("other", model.peft_config["default"])
        state = {k: v for k, v in model.state_dict().items() if "default" in k}
        state = {k.replace("default", "other"): v for k, v in state.items()}
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        load_reference(tmp_path / "r", model=model, ref_adapter="other")  # whatever it is called
        with pytest.raises(ValueError, match=r"weights: .* adapter: an adapter there, none here"):
            load_reference(tmp_path / "r", model=model, ref_adapter="__base__")
        with pytest.raises(ValueError, match="of something else: weights: "):
            load_reference(tmp_path / "r", model=self.adapted(2.0), ref_adapter="default")
        model.peft_config["default"].lora_alpha = 99
        with pytest.raises(ValueError, match=r"of something else: adapter.lora_alpha: 8 there, 99"):
            load_reference(tmp_path / "r", model=model, ref_adapter="default")

    def test_which_one_is_asked(self, tmp_path):
        model = self.adapted()
        for name in (None, "nobody"):
            with pytest.raises(ValueError, match="ref_adapter should be the adapter that is the"):
                reference_logps(model, pairs(2), BASE, tmp_path / "r", ref_adapter=name, **QUIET)
        with pytest.raises(ValueError, match="ref_adapter should be None for a model that is no"):
            reference_logps(
                build("Llama"), pairs(2), BASE, tmp_path / "r", ref_adapter="default", **QUIET
            )
        model.merge_adapter()
        with pytest.raises(ValueError, match="adapters unmerged"):
            reference_logps(model, pairs(2), BASE, tmp_path / "r", ref_adapter="default", **QUIET)


# ---- Bad input


def nan_in_the_head(call):
    call["model"].lm_head.weight.data[5] = float("nan")


BAD = [
    (lambda c: c.update(model=7), "model should be a model"),
    (lambda c: c.update(model=torch.nn.Linear(2, 2)), "model: expected a Hugging Face"),
    (lambda c: c.update(model=build("Mamba")), "use layout='padded'"),
    (lambda c: c.update(collator=7), "collator should be a fastdpo.data.PairCollator"),
    (lambda c: c.update(examples=[]), "examples should not be empty"),
    (lambda c: c.update(examples=iter(pairs(2))), "examples should be a list or a datasets"),
    (lambda c: c["examples"][1].pop("chosen_ids"), r"examples\[1\] should have the key 'chosen"),
    (lambda c: c["examples"][1]["prompt_ids"].append(53), r"examples\[1\] .* in \[0, 53\)"),
    (lambda c: c.update(collator=PairCollator(0, "packed", 2)), "leaves nothing of the answers"),
    (lambda c: c.update(max_tokens_per_batch=0), "max_tokens_per_batch should be an integer"),
    (lambda c: c.update(max_tokens_per_batch=3), r"max_tokens_per_batch .* which examples\[\d"),
    (lambda c: c.update(batches=[[0, 99]]), r"batches should be .* got 99 in batch 0"),
    (lambda c: c.update(batches=[[0], [1, 1]]), r"batches should be .* twice in batch 1"),
    (lambda c: c.update(batches=[[]]), r"batches should be .* none in batch 0"),
    (lambda c: c.update(batches=[3]), r"batches should be lists of indices, got int"),
    (lambda c: c.update(autocast="bfloat16"), "autocast should be None, torch.bfloat16"),
    (lambda c: c.update(temperature=0.0), "temperature should be"),
    (lambda c: c.update(backend="nobody"), "backend should be"),
    (lambda c: c.update(progress=3), "progress should be True, False or a function"),
    (lambda c: c.update(out=__file__), "out should be a folder, got the file"),
    (nan_in_the_head, r"finite log-probabilities, got nan and nan of .* examples\[\d+\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_bad_input_is_refused_before_anything_is_written(change, message, tmp_path):
    call = {**call_of(), "out": tmp_path / "r", **QUIET}
    change(call)
    with pytest.raises(ValueError, match=message):
        reference_logps(**call)
    assert not (tmp_path / "r").exists()


def test_folders_that_are_none(tmp_path):
    arguments = (build("Llama"), pairs(2), BASE)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out should be a new folder, .* holds something else"):
        reference_logps(*arguments, tmp_path, **QUIET)
    (tmp_path / "reference.json").write_text(json.dumps({"format": 99}))
    for call in (
        lambda: reference_logps(*arguments, tmp_path, **QUIET),
        lambda: load_reference(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"reference\.json' should be one that this version"):
            call()
    for function in (load_reference, reference_batches):
        with pytest.raises(ValueError, match="folder should be one that reference_logps has"):
            function(tmp_path / "nothing")
    reference_logps(*arguments, tmp_path / "r", **QUIET)
    with pytest.raises(ValueError, match="autocast should come with model"):
        load_reference(tmp_path / "r", autocast=torch.bfloat16)


def test_several_processes_are_refused(monkeypatch, tmp_path):
    group = torch.distributed
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_world_size", lambda *_: 2)
    with pytest.raises(ValueError, match=r"torch.distributed has one process, got 2"):
        reference_logps(build("Llama"), pairs(2), BASE, tmp_path / "r", **QUIET)
