"""TRL's DPOTrainer with a reference that `reference_logps` has computed."""

from __future__ import annotations

import copy

import pytest
import torch
from test_trl import (
    BATCH,
    SETTINGS,
    STEPS,
    datasets,
    disturbed,
    model,
    needs_an_order,
    pairs,
    tokenizer,
    trl,
)
from test_trl import _fresh_accelerate as _fresh_accelerate

from fastdpo.data import PairCollator, load_reference, prepare, reference_logps
from fastdpo.integrations.trl import FastDPOConfig, FastDPOTrainer, patched
from fastdpo.integrations.trl_reference import take_known_references


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def trainer(folder, policy, rows, reference=None, **args):
    settings = {**SETTINGS, "per_device_train_batch_size": BATCH, **args}
    return trl.DPOTrainer(
        policy,
        reference,
        args=trl.DPOConfig(output_dir=str(folder), **settings),
        train_dataset=rows,
        processing_class=tokenizer(),
    )


def logged(built):
    built.train()
    return [row for row in built.state.log_history if "loss" in row]


def known(tmp_path, reference, batches=None, layout="padded", **options):
    rows = list(prepare(pairs(), tokenizer()))
    collator = PairCollator(0, layout, **options)
    reference_logps(reference, rows, collator, tmp_path / "r", batches=batches, progress=False)
    return load_reference(tmp_path / "r", model=reference)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompts"])
def test_the_run_is_that_of_a_reference_beside_the_policy(layout, tmp_path):
    reference = disturbed(model())
    rows = known(tmp_path, reference, layout=layout)
    with patched():
        expected = trainer(tmp_path, model(), pairs(), copy.deepcopy(reference))
        found = trainer(tmp_path, model(), rows, precompute_ref_log_probs=True)
    assert found.ref_model is None
    assert found.train_dataset is rows
    for a, b in zip(logged(found), logged(expected), strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5)
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_it_is_that_of_trls_own_precomputation(tmp_path):
    reference = disturbed(model())
    rows = known(tmp_path, reference)
    with patched():
        theirs = trainer(
            tmp_path, model(), pairs(), copy.deepcopy(reference), precompute_ref_log_probs=True
        )
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert theirs.train_dataset[name][:] == pytest.approx(rows[name][:], rel=1e-5)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert theirs.train_dataset[name][:] == rows[name][:]


@needs_an_order
def test_the_first_step_starts_at_the_reference(tmp_path):
    """In the trainer's own batches, up to the order in which TRL adds tokens."""
    given = [list(range(i, i + BATCH)) for i in range(0, STEPS * BATCH, BATCH)]
    rows = known(tmp_path, model(), given)
    with patched():
        built = trainer(
            tmp_path, model(), rows, precompute_ref_log_probs=True, learning_rate=0.0,
            train_sampling_strategy="sequential",
        )  # fmt: skip
    for row in logged(built):
        assert abs(row["rewards/margins"]) < 1e-6
        assert row["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_in_the_layout_of_the_trainer(tmp_path):
    """FastDPOTrainer, on the rows in which the reference was computed."""
    rows = known(tmp_path, model(), layout="shared_prompts")
    args = FastDPOConfig(
        output_dir=str(tmp_path),
        layout="shared_prompts",
        precompute_ref_log_probs=True,
        **{**SETTINGS, "learning_rate": 0.0, "per_device_train_batch_size": BATCH},
    )
    built = FastDPOTrainer(model(), args=args, train_dataset=rows, processing_class=tokenizer())
    assert built.train_dataset is rows
    for row in logged(built):
        assert abs(row["rewards/margins"]) < 1e-5


def test_evaluation_takes_them_too(tmp_path):
    rows = known(tmp_path, model())
    with patched():
        built = trainer(tmp_path, model(), rows, precompute_ref_log_probs=True)
        assert abs(built.evaluate(rows)["eval_rewards/margins"]) < 1e-5


def test_what_is_refused(tmp_path):
    rows = known(tmp_path, model())
    longest = max(
        len(r["prompt_ids"] + max(r["chosen_ids"], r["rejected_ids"], key=len)) for r in rows
    )
    with patched():
        message = rf"max_length should be None or at least {longest}, .* train rows .* got"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, model(), rows, precompute_ref_log_probs=True, max_length=longest - 1)
        trainer(tmp_path, model(), rows, precompute_ref_log_probs=True, max_length=longest)
        with pytest.raises(ValueError, match=r"ld_alpha should be None for rows .* got 0\.5"):
            trainer(tmp_path, model(), rows, precompute_ref_log_probs=True, ld_alpha=0.5)
        with pytest.raises(ValueError, match="precompute_ref_log_probs should be True for a data"):
            trainer(tmp_path, model(), rows)


def test_outside_it_is_trls_trainer(tmp_path):
    names = ("_prepare_dataset", "_precompute_ref_logps")
    before = [getattr(trl.DPOTrainer, name) for name in names]
    undo = take_known_references()
    with patched():
        pass
    assert getattr(trl.DPOTrainer, names[0]) is not before[0]
    undo()
    assert [getattr(trl.DPOTrainer, name) for name in names] == before
    with pytest.raises(ValueError), patched(backend="nobody"):
        pass
    assert [getattr(trl.DPOTrainer, name) for name in names] == before
