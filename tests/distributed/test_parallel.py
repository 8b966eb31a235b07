"""A vocabulary or a sequence shared by several three: the same numbers as one process finds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from oracle import assert_as_accurate, eager_logps
from sampling import sampled
from test_linear_dpo_loss import batch
from test_linear_logps import HEADS, make

from fastdpo.loss import linear_dpo_loss, linear_logps
from fastdpo.parallel import SequenceParallel, VocabParallel

STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def shares(vocab):
    """Unequal shares, and where this process's lies."""
    size, rank = dist.get_world_size(), dist.get_rank()
    ends = [0, *(vocab * (r + 1) // size + 3 * (r + 1 < size) for r in range(size))]
    return slice(ends[rank], ends[rank + 1])


def vocabulary(weight, **options):
    mine = shares(weight.shape[0])
    return mine, VocabParallel.over(weight[mine], **options)


def logps_and_gradients(tensors, head, trained, *, over=None, **options):
    """This process's logps, and gradients of hidden and of its rows of weight and bias."""
    hidden, weight, bias, labels = tensors
    mine, spread = vocabulary(weight, **(over or {}))
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(flag)
        for t, flag in zip(
            (hidden, weight[mine], None if bias is None else bias[mine]), trained, strict=True
        )
    ]
    logps = linear_logps(
        leaves[0], leaves[1], labels, bias=leaves[2], vocab_parallel=spread, **head, **options
    )
    upstream = torch.linspace(-1, 2, labels.numel(), dtype=logps.dtype)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return logps.detach(), torch.autograd.grad(logps, wanted, upstream)


def check(three, tensors, head=None, trained=(True, True, True), slack=1.0, **options):
    hidden, weight, bias, labels = tensors
    head = head or {}
    found = three.run(logps_and_gradients, tensors, head, trained, **options)
    for logps, grads in found[1:]:
        assert torch.equal(logps, found[0][0])
        if trained[0]:
            assert torch.equal(grads[0], found[0][1][0])

    def eager(dtype):
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_(flag)
            for t, flag in zip((hidden, weight, bias), trained, strict=True)
        ]
        logps = eager_logps(leaves[0], leaves[1], labels, leaves[2], **head)
        upstream = torch.linspace(-1, 2, labels.numel(), dtype=logps.dtype)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        return logps.detach(), torch.autograd.grad(logps, wanted, upstream)

    (base, base_grads), (exact, exact_grads) = eager(hidden.dtype), eager(torch.float64)
    assert_as_accurate(found[0][0], base, exact, 2, "logps", slack)
    ours = list(zip(*(grads for _, grads in found), strict=True))
    if trained[0]:
        ours[0] = ours[0][:1]
    for parts, b, c in zip(ours, base_grads, exact_grads, strict=True):
        assert parts[0].dtype == hidden.dtype
        assert_as_accurate(torch.cat(parts), b, c, 3, "gradient", slack)
    return found


@pytest.mark.parametrize("workspace", [0, 20_000, None])
@pytest.mark.parametrize(
    ("dtype", "head"),
    sampled(
        [(dtype, head) for dtype in DTYPES for head in ("plain", "all")],
        [(torch.float64, "plain"), (torch.float32, "all"), (torch.bfloat16, "all")],
        several=True,
    ),
    ids=str,
)
def test_values_and_gradients(three, dtype, head, workspace):
    options = dict(HEADS[head])
    tensors = make(21, 1700, 24, dtype, bias=options.pop("bias", False))
    check(three, tensors, options, workspace_bytes=workspace)


@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, True), (True, False, True)], ids=str
)
@pytest.mark.parametrize("dtype", sampled(DTYPES[1:], (torch.bfloat16,)), ids=str)
def test_frozen_parts(three, dtype, trained):
    tensors = make(21, 1700, 24, dtype, bias=True)
    check(three, tensors, {"softcap": 4.0}, trained)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("dtype", sampled(DTYPES[1:], DTYPES[1:3]), ids=str)
def test_unlikely_and_certain_labels(three, dtype, workspace, trained, backend):
    """Labels 200 below or 60 above all others: the processes then use different anchors."""
    if backend == "triton":
        pytest.importorskip("triton")
    hidden, weight, _, labels = make(12, 300, 24, dtype, ignored=0.0, spread=0.05)
    bias = torch.zeros(300)
    labels[:] = torch.arange(0, 300, 25)
    bias[labels[:4]], bias[labels[8:]] = -200.0, 60.0
    # The interpreter cuts bf16 off.
    slack = 2.0 if backend == "triton" and dtype == torch.bfloat16 else 1.0
    check(
        three, (hidden, weight, bias.to(dtype), labels), None, trained, slack,
        workspace_bytes=workspace, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("ignored", [0.0, 2.0])
@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(three, n, ignored):
    check(three, make(n, 130, 16, torch.bfloat16, bias=True, ignored=ignored))


def test_many_blocks_of_rows(three):
    """As many in every process, though their shares differ."""
    three.run(_with_small_blocks)


def _with_small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.backends.workspace._BLOCK_BYTES", {"cpu": 150_000})
        tensors = make(200, 1000, 16, torch.float32, ignored=0.0)
        logps, _ = logps_and_gradients(tensors, {}, (True, False, False))
    torch.testing.assert_close(logps, linear_logps(tensors[0], tensors[1], tensors[3]))


def test_each_process_may_keep_its_part_of_hiddens_gradient(three):
    tensors = make(21, 500, 24, torch.float32)
    trained = (True, False, False)
    whole = three.run(logps_and_gradients, tensors, {}, trained)[0][1][0]
    parts = three.run(logps_and_gradients, tensors, {}, trained, over={"reduce_hidden_grad": False})
    parts = [grads[0] for _, grads in parts]
    assert not torch.allclose(parts[0], whole)
    torch.testing.assert_close(sum(parts), whole)


def test_a_process_alone_computes_the_same_bits(three):
    three.run(_alone)


def _alone():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    hidden, weight, _, labels = make(21, 500, 24, torch.bfloat16)
    spread = VocabParallel.over(weight, groups[dist.get_rank()])
    assert spread.sizes == (500,)
    results = []
    for options in ({}, {"vocab_parallel": spread}):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        logps = linear_logps(*leaves, labels, **options)
        results.append([logps.detach(), *torch.autograd.grad(logps.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("far", [False, True])
def test_statistics(three, softcap, far):
    tensors = make(20, 300, 24, torch.float32, bias=True)
    if far:
        tensors[2][tensors[3][tensors[3] >= 0][:4]] = -300.0
        tensors[0].mul_(0.1)
    head = {"softcap": softcap, "logit_scale": 1.2, "temperature": 0.9}
    expected = linear_logps(*tensors[:2], tensors[3], bias=tensors[2], stats=STATS, **head)
    for found in three.run(_statistics, tensors, head):
        for name, a, b in zip(expected._fields, found, expected, strict=True):
            torch.testing.assert_close(a, b, msg=name, rtol=1e-5, atol=2e-5)


def _statistics(tensors, head):
    hidden, weight, bias, labels = tensors
    mine, spread = vocabulary(weight)
    bias = bias[mine]
    found = linear_logps(
        hidden, weight[mine], labels, bias=bias, stats=STATS, vocab_parallel=spread, **head
    )
    return tuple(found)


# ---- The loss


@pytest.mark.parametrize("compiled", sampled([False, True], (False,)))
@pytest.mark.parametrize("options", [{}, {"objective": "ipo"}, {"use_weighting": True}], ids=str)
def test_the_loss_of_a_shared_vocabulary(three, options, compiled):
    tensors = [t.detach() for t in batch()]
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    whole = linear_dpo_loss(*leaves, labels, **ref, **options)
    grads = torch.autograd.grad(whole.loss, leaves)
    found = three.run(_shared_vocabulary_loss, tensors, options, compiled)
    for output, (grad_hidden, _) in found:
        for a, b in zip(output, whole, strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad_hidden, grads[0])
    torch.testing.assert_close(torch.cat([g[1] for _, g in found]), grads[1])


def _shared_vocabulary_loss(tensors, options, compiled):
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    mine, spread = vocabulary(weight)
    leaves = [hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()]

    def step(h, w):
        return linear_dpo_loss(
            h, w, labels, ref_hidden=ref_hidden, ref_weight=ref_weight[mine],
            vocab_parallel=spread, **options,
        )  # fmt: skip

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    output = step(*leaves)
    return [t.detach() for t in output], torch.autograd.grad(output.loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_equal_weights_give_ln_2_to_the_bit(three, dtype):
    assert all(three.run(_loss_at_initialisation, dtype))


def _loss_at_initialisation(dtype):
    hidden, weight, labels, *_ = (t.detach() for t in batch(dtype))
    mine, spread = vocabulary(weight)
    out = linear_dpo_loss(
        hidden.requires_grad_(), weight[mine].clone().requires_grad_(), labels,
        ref_hidden=hidden.detach(), ref_weight=weight[mine], vocab_parallel=spread,
    )  # fmt: skip
    return out.loss.item() == torch.tensor(2.0).log().item() and not out.chosen_rewards.any()


# ---- A shared sequence

OBJECTIVES = {
    "sigmoid": {},
    "average": {"average_log_prob": True, "label_smoothing": 0.1},
    "ipo": {"objective": "ipo", "length_normalized": True},
    "simpo": {"objective": "simpo"},
    "mpo": {"objective": {"sigmoid": 0.8, "sft": 0.2}},
    "aot": {"objective": "aot"},
}


@pytest.mark.parametrize("compiled", sampled([False, True], (False,)))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_shared_sequence(three, name, compiled):
    tensors = [t.detach() for t in batch()]
    reference = name != "simpo"
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight} if reference else {}
    whole = linear_dpo_loss(*leaves, labels, **ref, **OBJECTIVES[name])
    grads = torch.autograd.grad(whole.loss, leaves)
    found = three.run(_shared_sequence_loss, tensors, reference, OBJECTIVES[name], compiled)
    for output, _ in found:
        for a, b in zip(output, whole, strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-5)
        assert all(map(torch.equal, output, found[0][0]))
    torch.testing.assert_close(torch.cat([g[0] for _, g in found], 1), grads[0])
    torch.testing.assert_close(sum(g[1] for _, g in found), grads[1])


def _shared_sequence_loss(tensors, reference, options, compiled):
    hidden, weight, labels, ref_hidden, ref_weight = tensors
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = slice(*(hidden.shape[1] * r // size for r in (rank, rank + 1)))
    leaves = [hidden[:, tokens].clone().requires_grad_(), weight.clone().requires_grad_()]
    ref = {"ref_hidden": ref_hidden[:, tokens], "ref_weight": ref_weight} if reference else {}
    group = SequenceParallel.over()

    def step(h, w):
        return linear_dpo_loss(h, w, labels[:, tokens], sequence_parallel=group, **ref, **options)

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    output = step(*leaves)
    return [t.detach() for t in output], torch.autograd.grad(output.loss, leaves)


def test_the_operator(three):
    three.run(_opcheck)


def _opcheck():
    values = torch.randn(3, requires_grad=True)
    torch.library.opcheck(torch.ops.fastdpo.total, (values, SequenceParallel.over().group))


# ---- Bad input


def test_bad_input(three):
    three.run(_refusals)


def _refusals():
    hidden, weight, bias, labels = make(8, 100, 16, torch.float32, bias=True, ignored=0.0)
    mine, spread = vocabulary(weight)
    other = torch.cat([weight[mine], weight[:1]])
    group = SequenceParallel.over()
    pairs = (hidden.view(4, 2, 16), weight, labels.view(4, 2))
    for message, call in (
        ("weight should be of shape", lambda: linear_logps(
            hidden, other, labels, vocab_parallel=spread)),
        ("bias should be of shape", lambda: linear_logps(
            hidden, weight[mine], labels, bias=bias, vocab_parallel=spread)),
        ("vocab_parallel should be a", lambda: linear_logps(
            hidden, weight, labels, vocab_parallel=dist.group.WORLD)),
        (r"labels should be in \[0, 100\)", lambda: linear_logps(
            hidden, weight[mine], labels + 100, vocab_parallel=spread)),
        ("weight should be of shape", lambda: VocabParallel.over(weight[:0])),
        ("group should be a ProcessGroup", lambda: SequenceParallel.over("world")),
        ("sequence_parallel should be a", lambda: linear_dpo_loss(
            *pairs, sequence_parallel=dist.group.WORLD)),
        ("ld_alpha should be off", lambda: linear_dpo_loss(
            *pairs, sequence_parallel=group, ld_alpha=0.5)),
        ("use_weighting should be off", lambda: linear_dpo_loss(
            *pairs, sequence_parallel=group, use_weighting=True)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_without_processes():
    for over in (lambda: VocabParallel.over(torch.ones(3, 2)), SequenceParallel.over):
        with pytest.raises(ValueError, match=r"torch\.distributed"):
            over()
