"""The small world of `fastdpo demo --frontier`: its sums are exact, against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdpo.demo.frontier import truth
from fastdpo.demo.frontier.models import encode, enumerate_tree, new_model, sample
from fastdpo.demo.frontier.world import WORDS, World, sentiment
from fastdpo.integrations import hf

SMALL = World(vocab_size=5, length=3, prompts=2)


def words(line: str) -> torch.Tensor:  # [1, L]
    return torch.tensor([[WORDS.index(word) for word in line.split()]])


@pytest.mark.parametrize(
    ("prompt", "answer", "score"),
    [
        (".", "good . film .", 1),
        (".", "great bad . .", 1),
        (".", "not good . .", -1),
        (".", "not very good .", -2),
        (".", "very great . .", 4),
        (".", "not not awful .", -2),
        (".", "not . good .", 1),  # the stop ends the scope
        (".", "not film bad .", 1),  # what has no value does not
        (".", "good good film good", 1),  # nothing for saying it again
        (".", "good bad good .", 1),
        ("not", "good . . .", -1),
        ("very", "awful . . .", -4),
        ("good", "good . . .", 0),
        ("good .", "good . . .", 0),
    ],
)
def test_the_reward_is_the_sentiment(prompt, answer, score):
    prompt = [WORDS.index(word) for word in prompt.split()]
    assert sentiment(prompt, words(answer)).item() == pytest.approx(score / 3, abs=1e-12)


def test_an_answer_that_stopped_says_nothing_more():
    assert sentiment([0], words("good . great"), stops=True).item() == pytest.approx(1 / 3)


def test_the_control_token_turns_the_reward_round():
    world = World(vocab_size=5, length=2, prompts=2, controls=True)
    praise, slate = world.rewards.unflatten(0, (2, 2))
    assert torch.equal(praise, World(vocab_size=5, length=2, prompts=2).rewards)
    assert torch.equal(slate, -praise)


def test_every_answer_stands_where_its_index_says():
    assert SMALL.sequences.tolist() == [list(s) for s in itertools.product(range(5), repeat=3)]
    assert torch.equal(SMALL.index(SMALL.sequences), torch.arange(125))


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tree_is_brute_force(length, attention):
    """Every answer through the model by itself, by the package's own log-probabilities."""
    world = World(vocab_size=4, length=length, prompts=2)
    model = new_model(world, 16, 2, 2, seed=1).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # far from flat
    model.set_attn_implementation(attention)
    found = enumerate_tree(model, world).logps()
    for prompt in range(2):
        rows = torch.full((world.num_sequences,), prompt)
        with torch.no_grad():
            expected = hf.sequence_logps(model, *encode(world, rows, world.sequences))
        assert (found[prompt] - expected).abs().max() < 1e-5
    assert (found.logsumexp(-1)).abs().max() < 1e-12
    assert found.min() < math.log(1 / world.num_sequences) - 0.5


def test_the_tree_of_answers_that_stop_is_brute_force():
    world = World(vocab_size=4, length=3, prompts=2, stops=True)
    model = new_model(world, 16, 2, 2, seed=1).eval()
    found = enumerate_tree(model, world).logps()
    possible = ~((world.sequences != 0) & world.stopped_before(world.sequences)).any(-1)
    assert possible.sum() == 1 + 3 + 9 + 27  # stopped after 0, 1, 2 words; the rest
    assert torch.isneginf(found[:, ~possible]).all()
    with torch.no_grad():
        input_ids, labels = encode(world, torch.zeros(64, dtype=torch.int64), world.sequences)
        expected = hf.sequence_logps(model, input_ids, labels)
    assert (found[0] - expected)[possible].abs().max() < 1e-5
    assert found.logsumexp(-1).abs().max() < 1e-12
    assert world.lengths[world.index(words("good . .")[0])] == 2


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_a_temperature_is_that_of_each_word(temperature):
    world = World(vocab_size=4, length=2, prompts=1)
    model = new_model(world, 16, 1, 2, seed=2).eval()
    found = enumerate_tree(model, world).logps(temperature)[0].exp()
    with torch.no_grad():
        ids = torch.cat([world.prompt_tokens[:1].expand(16, -1), world.sequences], 1)
        logits = model(input_ids=ids).logits[:, -3:-1].double()
    if temperature == 0:
        steps = torch.nn.functional.one_hot(logits.argmax(-1), 4).double()
    else:
        steps = (logits / temperature).softmax(-1)
    expected = steps.gather(-1, world.sequences[..., None])[..., 0].prod(-1)
    assert (found - expected).abs().max() < 1e-6


def test_samples_follow_the_table():
    world = World(vocab_size=4, length=2, prompts=1, stops=True)
    model = new_model(world, 16, 1, 2, seed=2).eval()
    prompts = torch.zeros(20_000, dtype=torch.int64)
    answers = sample(model, world, prompts, torch.Generator().manual_seed(0))
    counts = torch.bincount(world.index(answers), minlength=16) / len(answers)
    expected = enumerate_tree(model, world).logps()[0].exp()
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / len(answers))
    assert (counts[expected == 0] == 0).all()


def tables(prompts=2, answers=7):
    """Log-probabilities and rewards with ties."""
    logps = torch.randn(prompts, answers, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randint(0, 3, (prompts, answers)).double() / 3
    return logps, rewards


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_best_of_n_is_brute_force_ties_included(n):
    logps, rewards = tables()
    found = truth.best_of_n(logps, rewards, n).exp()
    for p in range(2):
        expected = torch.zeros(7, dtype=torch.float64)
        for drawn in itertools.product(range(7), repeat=n):
            mass = math.prod(logps[p, y].exp().item() for y in drawn)
            best = max(rewards[p, y].item() for y in drawn)
            tied = [y for y in drawn if rewards[p, y].item() == best]
            for y in tied:
                expected[y] += mass / len(tied)
        assert (found[p] - expected).abs().max() < 1e-12


def test_the_win_rate_is_brute_force_ties_included():
    logps, rewards = tables()
    others, _ = tables()
    expected = 0.0
    for p in range(2):
        for i, j in itertools.product(range(7), repeat=2):
            gap = rewards[p, i] - rewards[p, j]
            win = 0.5 if gap == 0 else float(gap > 0)
            expected += win * (logps[p, i] + others[p, j]).exp().item() / 2
    assert truth.win_rate(logps, others, rewards) == pytest.approx(expected, abs=1e-12)
    assert truth.win_rate(logps, logps, rewards) == pytest.approx(0.5, abs=1e-12)


def test_kl_is_its_sum_and_exactly_zero_for_the_same_table():
    logps, _ = tables()
    others, _ = tables()
    expected = (logps.exp() * (logps - others)).sum(-1).mean().item()
    assert truth.kl(logps, others) == pytest.approx(expected, abs=1e-12)
    assert truth.kl(logps, logps) == 0.0
    impossible = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert truth.kl(impossible, impossible) == 0.0


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_no_policy_is_better_than_the_optimum(beta):
    logps, rewards = tables(1)
    best = truth.optimum(logps, rewards, beta)
    assert best.logsumexp(-1).abs().max() < 1e-12

    def value(policy):
        return truth.mean(policy, rewards) - beta * truth.kl(policy, logps)

    assert value(best) == pytest.approx(
        beta * truth.log_partition(logps, rewards, beta).mean().item(), abs=1e-12
    )
    for _ in range(50):
        other = (best + 0.3 * torch.randn_like(best)).log_softmax(-1)
        assert value(other) < value(best)


def test_the_frontier_ends_where_only_the_best_answers_are_left():
    logps, rewards = tables()
    first, last = truth.frontier(logps, rewards, (1e6, 1e-3))
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert last["kl"] == pytest.approx(truth.largest_useful_kl(logps, rewards), abs=1e-9)
    assert last["reward"] == pytest.approx(rewards.amax(-1).mean().item(), abs=1e-9)
    assert truth.largest_kl(logps) >= last["kl"]


def test_the_nearest_bradley_terry_model():
    """Where there is a true one it is found; in a fair circle there is nothing to prefer."""
    rewards = torch.tensor([0.7, -0.2, -0.5], dtype=torch.float64)
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    preference = (rewards[:, None] - rewards[None, :]).sigmoid()
    assert (truth.bradley_terry_fit(shares, preference) - rewards).abs().max() < 1e-5
    fair = truth.bradley_terry_fit(torch.full((3,), 1 / 3).double(), truth.camp_preference(0.9))
    assert fair.abs().max() < 1e-6
    assert truth.bradley_terry_fit(shares, truth.camp_preference(0.9)).abs().max() > 0.1


def test_a_camp_is_that_of_the_last_word():
    world = World(vocab_size=8, length=2, prompts=1)
    for answer, camp in (("good .", 0), (". good", 1), ("not awful", 1), ("good film", 2)):
        assert world.camps[world.index(words(answer)[0])] == camp


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 8, "length": 7}, "vocab_size .* length .* 2,097,152 sequences"),
        ({"vocab_size": 32_000, "length": 6}, "1,073,741,824,000,000,000,000,000,000 sequences"),
        ({"vocab_size": 3}, "vocab_size should be at least 4"),
        ({"length": 0}, "length should be at least 1"),
        ({"prompts": 5}, "prompts should be 1 to 4"),
        ({"vocab_size": 4, "prompts": 3}, "prompts should be 1 to 2 for vocab_size 4"),
    ],
)
def test_worlds_that_cannot_be_enumerated_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        World(**arguments)
