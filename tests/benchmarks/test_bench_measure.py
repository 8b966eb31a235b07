"""How time and memory are measured, and how the longest pair is searched."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inputs import make_inputs
from benchmarks.loss import longest_pair
from benchmarks.loss.floor import products
from benchmarks.measure import Deadline, Protocol, interleaved, quantiles, timed
from benchmarks.memory import extra
from benchmarks.providers import BASELINES
from benchmarks.scenarios import Scenario, from_dict

CPU = torch.device("cpu")


def test_rounds_interleave_and_begin_one_further_on_each_time():
    calls = []
    steps = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    taken = interleaved(steps, CPU, Protocol(warmup=1, min_rounds=3, max_rounds=3))
    assert [c[0] for c in calls[:3]] == list("abc")  # the warm-up
    assert "".join(name for name, _ in calls[3:]) == "abc" + "bca" + "cab"
    assert [i for _, i in calls[3:]] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(len(t) == 3 for t in taken.values())


def test_each_timed_call_may_be_preceded_by_untimed_ones():
    calls = []
    steps = {name: lambda i, name=name: calls.append(name) for name in "ab"}
    taken = interleaved(steps, CPU, Protocol(warmup=0, min_rounds=2, max_rounds=2, settle=2))
    assert "".join(calls) == "aaabbb" + "bbbaaa"
    assert [len(t) for t in taken.values()] == [2, 2]


def test_rounds_stop_when_there_are_enough_and_time_is_over():
    protocol = Protocol(warmup=0, min_rounds=2, max_rounds=50, seconds=0.0)
    assert len(interleaved({"a": lambda i: None}, CPU, protocol)["a"]) == 2
    late = Deadline(0.0)
    assert len(interleaved({"a": lambda i: None}, CPU, protocol, deadline=late)["a"]) == 1


def test_a_step_that_raises_is_told_and_left_out():
    def broken(i):
        if i == 1:
            raise RuntimeError("no more")

    steps = {"a": lambda i: None, "b": broken, "c": lambda i: None}
    protocol, told = Protocol(warmup=1, min_rounds=4, max_rounds=4), []
    taken = interleaved(steps, CPU, protocol, failed=lambda name, e: told.append((name, str(e))))
    assert told == [("b", "no more")]
    assert {name: len(t) for name, t in taken.items()} == {"a": 4, "c": 4}
    with pytest.raises(RuntimeError, match="no more"):
        interleaved(steps, CPU, protocol)


def test_a_gpu_is_given_the_step_while_it_sleeps(monkeypatch):
    """Else the host's time to queue it would be taken for the device's."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("end" if "step" in order else "begin")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    assert timed(lambda i: order.append("step"), 0, torch.device("cuda")) == 2e-3
    assert order == ["synchronize", "sleep", "begin", "step", "end", "wait"]


def test_quantiles():
    assert quantiles([float(i) for i in range(11)]) == {
        "median": 5.0,
        "p20": 2.0,
        "p80": 8.0,
        "rounds": 11,
    }
    with pytest.raises(ValueError, match="values"):
        quantiles([])


@pytest.mark.parametrize(
    ("trains", "names"),
    [
        ("forward", {"t1"}),
        ("frozen", {"t1", "grad_hidden"}),
        ("head", {"t1", "grad_hidden", "grad_weight"}),
    ],
)
def test_the_floor_runs_the_products_of_the_step_and_no_others(trains, names):
    scenario = Scenario("tiny", 32, share=0.5, dtype="fp32", sequences=4, trains=trains)
    steps = products([make_inputs(scenario, CPU)])
    assert set(steps) == names
    with FlopCounterMode(display=False) as counter:
        for step in steps.values():
            step(0)
    shape = scenario.shape
    one = 2 * scenario.loss_tokens * shape.vocab_size * shape.hidden_size
    assert counter.get_total_flops() == one * len(names) == one * scenario.units


def test_extra_memory_of_eager_is_what_it_writes():
    # Forward alone: the logits and their log_softmax, and nothing else of that size.
    scenario = Scenario("mistral-vocab-d1024", 256, dtype="fp32", sequences=2, trains="forward")
    written = 2 * 4 * scenario.tokens * scenario.shape.vocab_size
    assert 0.9 * written < extra.on_cpu(BASELINES[False], scenario) < 1.2 * written


def test_a_failing_process_tells_why():
    class Nobody(type(BASELINES[False])):
        name = "nobody"

    with pytest.raises(RuntimeError, match="nobody"):
        extra.on_cpu(Nobody(), Scenario("tiny", 16, sequences=2))


@pytest.mark.parametrize("limit", [100, 256, 1000, 5000, 65_536])
def test_the_longest_pair_is_found_to_a_sixteenth(limit):
    found = longest_pair.longest(lambda n: n <= limit)
    assert found <= limit
    assert found >= (0 if limit < 256 else limit * 15 / 16)


def test_the_longest_pair_counts_inputs_and_gradients():
    eager = BASELINES[False]
    scenario = Scenario("tiny", 64, dtype="fp32", sequences=2)
    inputs = make_inputs(scenario, CPU)
    least = 2 * (inputs.weight.nbytes + inputs.hidden.nbytes)
    assert not longest_pair.fits(eager, scenario, CPU, least - 1)
    assert longest_pair.fits(eager, scenario, CPU, 1 << 30)


def test_sizes():
    assert longest_pair.parse_bytes("16GiB") == 16 << 30
    assert longest_pair.parse_bytes("1.5MiB") == 3 << 19
    assert longest_pair.parse_bytes("123") == 123
    for bad in ("16GB", "GiB", "much"):
        with pytest.raises(ValueError, match="16GiB"):
            longest_pair.parse_bytes(bad)


def test_scenarios():
    scenario = Scenario("llama-3-8b", 8192, share=0.25)
    assert (scenario.loss_tokens, scenario.length, scenario.units) == (2048, 1024, 3)
    assert from_dict(scenario.as_dict()) == scenario
    assert Scenario("tiny", 8, trains="frozen", reference="forward").units == 3
    for wrong in (
        {"head": "gpt"},
        {"trains": "all"},
        {"dtype": "fp8"},
        {"sequences": 3},
        {"tokens": 10},
        {"share": 0.0},
        {"reference": "none"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Scenario(**{"head": "tiny", "tokens": 8, **wrong})
