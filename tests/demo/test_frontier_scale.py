"""The large version of the frontier study, at sizes that a CPU runs in seconds. It has not run on a
GPU."""

from __future__ import annotations

import json

import pytest
import torch

from fastdpo.demo.frontier import scale

TINY = scale.ScaleConfig(
    vocab_size=50,
    prompt_length=3,
    answer_length=6,
    hidden=32,
    intermediate=64,
    layers=1,
    heads=2,
    sft_steps=60,
    sft_batch=32,
    sft_lr=1e-2,
    branches=8,
    prompts=64,
    sample_batch=100,
    steps=30,
    batch=16,
    lr=3e-3,
    betas=(0.1,),
    evaluations=2,
    evaluation_answers=128,
    kl_rows=37,
    device="cpu",
    dtype="float32",
)


def test_reward_and_kl_rise_and_the_start_is_exact(tmp_path):
    told = []
    record = scale.run_scale(TINY, tmp_path / "scale.json", told.append)
    (run,) = record["runs"]
    first, *_, last = run["curve"]
    assert [point["step"] for point in run["curve"]] == [0, 15, 30]
    assert first["kl"] == 0.0
    assert last["kl"] > 0.05
    assert last["reward"] > first["reward"] + 3 * (first["reward_error"] + last["reward_error"])
    written = json.loads((tmp_path / "scale.json").read_text())
    assert written["parameters"] == record["parameters"]
    assert len(told) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kl_is_the_sum_over_the_vocabulary(dtype):
    """Against the models' own logits, whole; the chunks do not divide the tokens evenly."""
    config = scale.dataclasses.replace(TINY, dtype=dtype)
    policy, reference = scale.make_model(config), scale.make_model(config)
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    sequences = scale.Chain(config).text(5, 9)
    found = scale.per_token_kl(config, policy, reference, sequences)
    with torch.no_grad(), config.autocast():
        logits = [model(input_ids=sequences).logits for model in (policy, reference)]
    logps, ref_logps = (z[:, 2:-1].double().log_softmax(-1) for z in logits)
    expected = (logps.exp() * (logps - ref_logps)).sum(-1)
    assert found.shape == (5, 6)
    assert (found - expected).abs().max() < 1e-5
    assert found.min() > 0


def test_pairs_are_ordered_by_the_reward():
    chain = scale.Chain(TINY)
    chosen, rejected = scale.make_pairs(TINY, chain, scale.make_model(TINY))
    assert chosen.shape == (64 * 6, 9)
    assert torch.equal(chosen[:, :3], rejected[:, :3])
    assert (chain.reward(chosen[:, 3:]) >= chain.reward(rejected[:, 3:])).all()


def test_the_default_is_what_it_says():
    """20–100 M parameters, V ≥ 32,000, answers of 256 tokens, without making it."""
    config = scale.ScaleConfig()
    with torch.device("meta"):
        model = scale.make_model(scale.dataclasses.replace(config, device="meta"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 20e6 < count < 100e6
    assert config.vocab_size >= 32_000
    assert config.answer_length == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps should be at least 1"),
        ({"branches": 51}, "branches should be at most vocab_size"),
        ({"heads": 3}, "hidden should be a multiple of heads"),
        ({"completions": 1}, "completions should be at least 2"),
        ({"betas": ()}, "betas should be positive"),
        ({"betas": (0.0,)}, "betas should be positive"),
        ({"dtype": "float8"}, "dtype should be bfloat16 or float32"),
        ({"batch": 385}, "batch should be at most 384 pairs"),
        ({"evaluations": 31}, "evaluations should be at most steps"),
    ],
)
def test_sizes_that_cannot_be_used_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scale.dataclasses.replace(TINY, **change)
