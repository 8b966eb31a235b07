"""Means over pairs and tokens of a batch that is spread over processes and micro-batches: averaged
and accumulated gradients are those of the whole batch in one process.
"""

from __future__ import annotations

import plain_model
import pytest
import torch
import torch.distributed as dist
from plain_model import STEPS, Model, assert_right, batch, mean, pairs_of, sgd, weights
from sampling import sampled
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastdpo.parallel
from fastdpo.loss import linear_dpo_loss
from fastdpo.parallel import DataParallel, SequenceParallel, batch_counts, call_head

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


PAIRS, LENGTH, WIDTH, VOCAB = 4, 9, 12, 40
OBJECTIVES = {
    "sigmoid": {},
    "average": {"average_log_prob": True, "label_smoothing": 0.1},
    "mpo": {"objective": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
    "rpo": {"objective": "hinge", "sft_weight": 0.7},
    "orpo": {"objective": "orpo"},
    "cpo": {"objective": "cpo", "cpo_alpha": 0.5},
    "wpo": {"use_weighting": True, "sft_weight": 0.7},
    "ld": {"ld_alpha": 0.4},
}
ALONE = ("orpo", "cpo")


def make(seed=0):
    """hidden [2B, T, D], weight, labels of very different lengths, ref_logps [2B]."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, generator=g)
    weight = 0.5 * torch.randn(VOCAB, WIDTH, generator=g)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=g)
    lengths = torch.tensor([1, 9, 8, 7, 5, 2, 9, 3])[:, None]
    labels[torch.arange(LENGTH) >= lengths] = -100
    return hidden, weight, labels, torch.randn(2 * PAIRS, generator=g) - 30.0


def part(tensors, first, last, pairs="concatenated"):
    """Pairs [first, last) of hidden, labels and ref_logps."""
    mine = torch.arange(first, last)
    if pairs == "interleaved":
        rows = torch.stack([2 * mine, 2 * mine + 1], 1).flatten()
    else:
        rows = torch.cat([mine, mine + PAIRS])
    return tuple(t[rows] for t in tensors)


def of(name, ref_logps):
    ref = {} if name in ALONE else {"ref_logps": ref_logps}
    return {**ref, **OBJECTIVES[name]}


def whole(name, **more):
    hidden, weight, labels, ref = make()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_dpo_loss(*leaves, labels, **of(name, ref), **more).loss
    return loss.detach(), torch.autograd.grad(loss, leaves)


# Pairs of each micro-batch of each process.
SHARES = {
    "1 + 3": [[(0, 1)], [(1, 4)]],
    "1 + 3, accumulated": [[(0, 1), (1, 2)], [(2, 3), (3, 4)]],
    "all + none": [[(0, 1), (1, 4)], [(0, 0)]],
}


def averaged(name, share, how, pairs="concatenated"):
    """This process's loss and gradients, averaged as DDP does: (loss, hidden's parts, weight's)."""
    hidden, weight, labels, ref = make()
    data = DataParallel.over()
    weight.requires_grad_()
    cuts = SHARES[share][dist.get_rank()]
    parts = [part((hidden, labels, ref), *cut, pairs) for cut in cuts]
    counts = {}
    if how != "counted":
        counts = batch_counts([p[1] for p in parts], data, pairs=pairs)
        assert int(counts["num_pairs"]) == PAIRS
    if how == "numbers":
        counts = {key: int(value) for key, value in counts.items()}
    total, grads = torch.zeros(()), []
    for h, labels, ref in parts:
        leaf = h.clone().requires_grad_()
        out = linear_dpo_loss(
            leaf, weight, labels, data_parallel=data, pairs=pairs, **counts, **of(name, ref)
        )
        out.loss.backward()
        total += out.loss.detach()
        grads.append(leaf.grad / dist.get_world_size())
    dist.all_reduce(weight.grad)
    return total, grads, weight.grad / dist.get_world_size()


def same(found, name, share, **more):
    loss, (hidden, weight) = whole(name, **more)
    torch.testing.assert_close(sum(f[0] for f in found) / len(found), loss)
    pairs = more.get("pairs", "concatenated")
    for cuts, (_, grads, grad_weight) in zip(SHARES[share], found, strict=True):
        torch.testing.assert_close(grad_weight, weight, atol=1e-6, rtol=1e-5)
        for cut, grad in zip(cuts, grads, strict=True):
            torch.testing.assert_close(grad, part((hidden,), *cut, pairs)[0], atol=1e-6, rtol=1e-5)


HOW = [
    ("1 + 3", "counted"),
    ("1 + 3", "numbers"),
    ("1 + 3, accumulated", "tensors"),
    ("all + none", "tensors"),
]


@pytest.mark.parametrize(("share", "how"), HOW)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_processes_and_micro_batches(processes, name, share, how):
    same(processes.run(averaged, name, share, how), name, share)


def test_interleaved_pairs(processes):
    found = processes.run(averaged, "mpo", "1 + 3", "tensors", "interleaved")
    same(found, "mpo", "1 + 3", pairs="interleaved")


def test_the_mean_of_means_is_another_number(processes):
    """What the options are for: NLL terms drift where processes have other numbers of tokens."""
    found = processes.run(local_means, "mpo")
    loss, _ = whole("mpo")
    assert abs(sum(found) / 2 - loss) > 1e-2


def local_means(name):
    hidden, weight, labels, ref = make()
    rank = dist.get_rank()
    h, labels, ref = part((hidden, labels, ref), 2 * rank, 2 * rank + 2)
    return linear_dpo_loss(h, weight, labels, **of(name, ref)).loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_in_one_process(name):
    """Of 1 and 3 pairs, they give the gradient of 4."""
    hidden, weight, labels, ref = make()
    loss, (_, grad) = whole(name)
    weight.requires_grad_()
    parts = [part((hidden, labels, ref), *cut) for cut in ((0, 1), (1, 4))]
    counts = batch_counts([labels for _, labels, _ in parts])
    total = sum(
        linear_dpo_loss(h, weight, labels, **counts, **of(name, ref)).loss
        for h, labels, ref in parts
    )
    torch.testing.assert_close(total.detach(), loss)
    torch.testing.assert_close(torch.autograd.grad(total, weight)[0], grad, atol=1e-6, rtol=1e-5)


LAYOUTS = {
    "kto": {"objective": "kto", "kl": 0.1},
    "plackett_luce": {"objective": "plackett_luce", "num_candidates": 4},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rankings_and_single_answers(name):
    hidden, weight, labels, ref = make()
    weight.requires_grad_()
    desirable = torch.arange(2 * PAIRS) % 3 == 0
    count = 2 * PAIRS if name == "kto" else 2

    def loss(rows, **more):
        own = {"desirable": desirable[rows]} if name == "kto" else {}
        return linear_dpo_loss(
            hidden[rows], weight, labels[rows], ref_logps=ref[rows], **LAYOUTS[name], **own, **more
        ).loss

    cuts = [[0], list(range(1, 8))] if name == "kto" else [[0, 2, 4, 6], [1, 3, 5, 7]]
    total = sum(loss(torch.tensor(rows), num_pairs=count) for rows in cuts)
    expected = loss(torch.arange(8))
    torch.testing.assert_close(total, expected)


# ---- With the wrappers that average


def ddp(objective):
    model, data = Model(), DataParallel.over()
    net, optimizer, losses = DistributedDataParallel(model), sgd(model), []
    for step in range(STEPS):
        cuts = ([(0, 1), (1, 2)], [(2, 3), (3, 4)])[dist.get_rank()]
        micro = [pairs_of(batch(step), *cut) for cut in cuts]
        counts = batch_counts([given["labels"] for given in micro], data)
        total = torch.zeros(())
        for i, given in enumerate(micro):

            def of(hidden, weight, bias, given=given, counts=counts):
                return linear_dpo_loss(
                    hidden, weight, given["labels"], ref_logps=given["ref"],
                    beta=plain_model.BETA, data_parallel=data, objective=objective, **counts,
                )  # fmt: skip

            net.require_backward_grad_sync = i == 1
            out = net(given["ids"], lambda head, hidden, of=of: call_head(head, of, hidden))
            out.loss.backward()
            total += out.loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return mean(losses), weights(net)


def with_sft(logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    chosen = given["labels"].chunk(2)[0]
    nll = -plain_model.eager_logps(logits.chunk(2)[0], chosen).sum() / (chosen != -100).sum()
    return plain_model.eager_loss(logits, given) + nll


@pytest.mark.parametrize("objective", ["sigmoid", ["sigmoid", "sft"]], ids=str)
def test_ddp(processes, objective):
    loss_of = plain_model.eager_loss if objective == "sigmoid" else with_sft
    assert_right(processes.run(ddp, objective), plain_model.expected(Model, loss_of))


def sequences_too(name):
    """Two processes share each sequence, two of those share the batch."""
    hidden, weight, labels, ref = make()
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    shared = SequenceParallel.over(rows[rank // 2])
    data = DataParallel.over(columns[rank % 2])
    assert data.size == 2
    h, labels, ref = part((hidden, labels, ref), *((0, 1), (1, 4))[rank // 2])
    tokens = slice(0, 5) if rank % 2 == 0 else slice(5, LENGTH)
    weight.requires_grad_()
    out = linear_dpo_loss(
        h[:, tokens], weight, labels[:, tokens], sequence_parallel=shared, data_parallel=data,
        **of(name, ref),
    )  # fmt: skip
    out.loss.backward()
    dist.all_reduce(weight.grad)
    return out.loss.detach(), weight.grad / 2  # a sum over the sequence, a mean over the batch


@pytest.mark.parametrize("name", sampled(["sigmoid", "mpo"], ("mpo",)))
def test_shared_sequences_too(four, name):
    found = four.run(sequences_too, name)
    loss, (_, grad) = whole(name)
    torch.testing.assert_close(sum(f[0] for f in found) / 4, loss)
    for _, weight in found:
        torch.testing.assert_close(weight, grad, atol=1e-6, rtol=1e-5)


def compiled(name):
    hidden, weight, labels, ref = make()
    data = DataParallel.over()
    h, labels, ref = part((hidden, labels, ref), *SHARES["1 + 3"][dist.get_rank()][0])
    counts = batch_counts([labels], data)

    def step(weight, counts):
        return linear_dpo_loss(
            h, weight, labels, data_parallel=data, **counts, **of(name, ref)
        ).loss

    torch._dynamo.reset()
    found = []
    for given in (counts, {}):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = weight.clone().requires_grad_()
            loss = function(leaf, given)
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(grad, found[0][1])


@pytest.mark.parametrize("name", sampled(["sigmoid", "mpo"], ("sigmoid",)))
def test_compiled(processes, name):
    processes.run(compiled, name)


# ---- Bad input


def refused(data=None):
    hidden, weight, labels, ref = make()
    given = {"ref_logps": ref}
    for message, options in (
        ("num_pairs should be a number >= 4", {"num_pairs": 3, **given}),
        ("num_pairs should be a number >= 4", {"num_pairs": True, **given}),
        ("num_pairs should be a number >= 4", {"num_pairs": "4", **given}),
        ("num_pairs should be a number >= 4", {"num_pairs": float("inf"), **given}),
        ("num_pairs should be a number >= 4", {"num_pairs": torch.tensor(3), **given}),
        ("num_pairs.* of one element", {"num_pairs": torch.tensor([4, 4]), **given}),
        ("num_tokens should be a number >= 0", {
            "num_pairs": 4, "num_tokens": -1, "objective": "cpo"}),
        ("num_tokens should be given with num_pairs", {"num_pairs": 4, "objective": "orpo"}),
        ("num_tokens should be given with num_pairs", {"num_pairs": 4, "sft_weight": 1.0, **given}),
        ("num_pairs should be given with num_tokens", {"num_tokens": 4, **given}),
        ("num_pairs should be None.*compare a batch's pairs, got one of them for aot",
            {"num_pairs": 4, "objective": "aot", **given}),
        ("got one of them for aot_unpaired", {
            "num_pairs": 4, "objective": ["sigmoid", "aot_unpaired"], **given}),
        ("use_weighting should be off with num_pairs", {
            "num_pairs": 4, "num_tokens": 9, "objective": ["sigmoid", "sft"],
            "use_weighting": True, **given}),
        ("data_parallel should be a fastdpo.parallel.DataParallel", {"data_parallel": 2, **given}),
        *([("num_pairs should be None.*aot", {
            "data_parallel": data, "objective": "aot", **given})] if data else []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            linear_dpo_loss(hidden, weight, labels, **options)
    for message, call in (
        ("labels should be a list of at least one", lambda: batch_counts([], data)),
        ("labels should be a list of at least one", lambda: batch_counts(labels, data)),
        (r"labels should be of shape \[2B, T\] each, got \[3, 9\]", lambda: batch_counts(
            [labels[:3]], data)),
        ("data_parallel should be a", lambda: batch_counts([labels], "world")),
        ("pairs should be one of", lambda: batch_counts([labels], data, pairs="other")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_input(processes):
    refused()
    processes.run(refused_in_processes)
    with pytest.raises(ValueError, match=r"torch\.distributed"):
        DataParallel.over()
    assert fastdpo.parallel.DataParallel is fastdpo.distributed.DataParallel


def refused_in_processes():
    refused(DataParallel.over())


def test_an_empty_global_batch_has_no_loss():
    hidden, weight, labels, _ = make()
    leaf = hidden[:0].requires_grad_()
    out = linear_dpo_loss(leaf, weight, labels[:0], objective="orpo", num_pairs=0, num_tokens=0)
    assert out.loss.item() == 0.0
    out.loss.backward()
