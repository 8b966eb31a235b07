"""What happens on a GPU, shown without one: the path that CUDA tensors take, what it waits for,
and what it allocates (`benchmarks/instruments/fake_gpu.py`).
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hf_models import batch, build
from oracle import eager_logps
from sampling import sampled
from test_linear_logps import HEADS, check, make

from benchmarks.instruments.fake_gpu import DEVICE, FakeGPU
from fastdpo.integrations import hf
from fastdpo.loss import get_batch_logps, linear_dpo_loss, linear_logps, preference_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def pairs(gpu, dtype, sequences=4, length=9, d=32, vocab=500, trained=True):
    hidden = torch.randn(sequences, length, d).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocab, d)).to(dtype).requires_grad_(trained)
    labels = torch.randint(vocab, (sequences, length))
    labels[:, : length // 3] = -100
    return gpu.put(hidden), gpu.put(weight), gpu.put(labels)


def test_the_pretence_itself():
    with FakeGPU() as gpu:
        x = gpu.put(torch.arange(6.0).view(2, 3).requires_grad_())
        assert x.is_cuda
        assert x.device == DEVICE
        (x.t().exp() @ torch.ones(2, device=x.device)).sum().backward()
        assert gpu.waits == []
        assert torch.equal(gpu.get(x.grad), gpu.get(x).exp())
        for waiting in (
            lambda: x.sum().item(),
            lambda: x.cpu(),
            lambda: (x > 1).nonzero(),
            lambda: x[x > 1],
            lambda: torch.ones(3).to(x.device),
            lambda: bool((x > 1).any()),
            lambda: x.sum(1).long().repeat_interleave(gpu.put(torch.tensor([1, 2]))),
        ):
            gpu.waits.clear()
            waiting()
            assert len(gpu.waits) == 1
        with pytest.raises(RuntimeError, match="mixes devices"):
            x + torch.ones(3)
        wide = torch.mm(x.detach().half(), x.detach().half().t(), out_dtype=torch.float32)
        assert wide.dtype == torch.float32
        del wide
        before = gpu.reset_peak()
        y = x.new_empty(1000)
        z = y[10:].view(-1, 10)
        del y
        assert gpu.bytes() == before + 4000
        del z
        assert gpu.bytes() == before
        assert gpu.peak_bytes == before + 4000


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs PyTorch 2.13 or later")
def test_what_an_operator_of_pytorchs_own_does_inside_is_seen():
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    labels = torch.randint(500, (64,))
    options = torch.nn.LinearCrossEntropyOptions(
        acc_policy="compact", acc_dtype=torch.float32, chunking_method=None, batch_chunk_size=16
    )
    with FakeGPU() as gpu:
        leaves = [gpu.put(t.requires_grad_()) for t in (hidden, weight)]
        there = gpu.put(labels)
        before = gpu.reset_peak()
        nll = F.linear_cross_entropy(*leaves, there, reduction="none", options=options)
        assert 16 * 500 * 4 < gpu.peak_bytes - before < 20 * 500 * 4  # a chunk's logits in fp32
        grads = [gpu.get(g) for g in torch.autograd.grad(nll.sum(), leaves)]
        nll = gpu.get(nll)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="none")
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=2**-8, atol=2**-8)
    for mine, theirs in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0.02, atol=0.02)


# ---- The path that CUDA tensors take: 16-bit operands with fp32 results


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)], ids=str)
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize(
    ("dtype", "workspace"),
    sampled(
        [(dtype, workspace) for dtype in DTYPES for workspace in (0, 20_000, None)],
        [(torch.bfloat16, 0), (torch.bfloat16, None), *((t, 20_000) for t in DTYPES[::2])],
        several=True,
    ),
    ids=str,
)
def test_values_and_gradients(dtype, head, workspace, trained, backend):
    options = dict(HEADS[head])
    tensors = make(21, 600, 32, dtype, bias=options.pop("bias", False))
    with FakeGPU() as gpu:
        tensors = [None if t is None else gpu.put(t) for t in tensors]
        check(*tensors, trained=trained, head=options, backend=backend, workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_and_reference_agree_to_the_bit(dtype):
    with FakeGPU() as gpu:
        hidden, weight, labels = pairs(gpu, dtype)
        out = linear_dpo_loss(hidden, weight, labels, ref_hidden=hidden.detach())
        assert gpu.get(out.loss).item() == torch.tensor(2.0).log().item()
        assert not gpu.get(out.chosen_rewards).any()


@contextlib.contextmanager
def autocast_on_gpu(enabled: bool = True):
    """To bf16. (`torch.autocast` would say that there is no GPU.)"""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_autocast_writes_the_weights_gradient_once():
    """fp32 weights, 16-bit products: their fp32 sums go into the gradient, with no copy between."""
    n, vocab, d = 8192, 128_256, 1024
    with autocast_on_gpu():
        extra = step_bytes(n, vocab, d, trained=True, workspace=None, dtype=torch.float32)
    e, weight, rows = 2 * n * vocab, 2 * vocab * d, n * d * (2 + 2 + 4)
    assert e + weight < extra < e + weight + rows + 8 * MIB

    tensors = make(21, 600, 32, torch.float32)
    tensors = [None if t is None else t.bfloat16().float() if t.is_floating_point() else t
               for t in tensors]  # fmt: skip
    results = []
    for autocast in (False, True):
        with FakeGPU() as gpu:
            hidden, weight, _, labels = (None if t is None else gpu.put(t) for t in tensors)
            hidden.requires_grad_()
            weight.requires_grad_()
            with autocast_on_gpu(autocast):
                logps = linear_logps(hidden, weight, labels)
            grads = torch.autograd.grad(logps.sum(), (hidden, weight))
            results.append([gpu.get(t).detach() for t in (logps, *grads)])
    for exact, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "autocast"])
def test_tiny_upstream_gradients_of_unlikely_labels(wide):
    """g r is below the least fp32 number: products of lifted coefficients, which wait for
    nothing.
    """
    hidden, weight, _, labels = make(12, 640, 16, torch.bfloat16, ignored=0.0)
    hidden[:, 0], weight[:, 0], weight[5, 0], labels[:] = 57.0, 0.0, 1.0, torch.arange(77, 89)
    tensors = [(t.float() if wide else t).requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(
        1e-22 * eager_logps(*(t.double() for t in tensors), labels).sum(), tensors
    )
    for workspace in (0, None):
        with FakeGPU() as gpu:
            there = [gpu.put(t) for t in tensors]
            rows = gpu.put(torch.arange(12))
            labels_there = gpu.put(labels)
            with autocast_on_gpu(wide):
                logps = linear_logps(
                    *there, labels_there, row_index=rows, workspace_bytes=workspace
                )
            grads = torch.autograd.grad(1e-22 * logps.sum(), there)
            assert gpu.waits == []
            for ours, oracle in zip(grads, exact, strict=True):
                got = gpu.get(ours).double()
                assert (got - oracle).norm() <= 0.02 * oracle.double().norm()


# ---- Nothing waits


def unlikely(gpu, weight, labels):
    """A bias by which one label's logit lies 300 below the others."""
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
    bias[gpu.get(labels)[0, -1]] = -300.0
    return gpu.put(bias)


@pytest.mark.parametrize(
    ("objective", "trained"),
    sampled(
        [(name, trained) for name in ("sigmoid", "ipo", "dpop") for trained in (True, False)],
        [("sigmoid", True), ("sigmoid", False), ("dpop", True)],
        several=True,
    ),
)
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("dtype", sampled(DTYPES, (torch.bfloat16,)), ids=str)
def test_a_step_waits_for_nothing_where_the_rows_are_given(dtype, workspace, trained, objective):
    with FakeGPU() as gpu:
        hidden, weight, labels = pairs(gpu, dtype, trained=trained)
        bias = unlikely(gpu, weight, labels)
        index = gpu.put((gpu.get(labels).flatten() != -100).nonzero().squeeze(1))
        ref = gpu.put(torch.zeros(4))
        out = linear_dpo_loss(
            hidden, weight, labels, bias=bias, ref_logps=ref, row_index=index, objective=objective,
            stats=STATS, workspace_bytes=workspace,
        )  # fmt: skip
        gradients = torch.autograd.grad(out.loss, (hidden, weight) if trained else hidden)
        assert gpu.waits == []
        assert all(gpu.get(g).isfinite().all() for g in gradients)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_waits_once_where_rows_are_counted(packed):
    with FakeGPU() as gpu:
        hidden, weight, labels = pairs(gpu, torch.bfloat16)
        options = {}
        if packed:
            hidden, labels = hidden.detach().flatten(0, 1).requires_grad_(), labels.flatten()
            options["cu_seqlens"] = gpu.put(torch.tensor([0, 9, 18, 27, 36], dtype=torch.int32))
        gpu.waits.clear()
        out = linear_dpo_loss(hidden, weight, labels, ref_hidden=hidden.detach(), **options)
        out.loss.backward()
        assert len(gpu.waits) == 1


@pytest.mark.parametrize("ends", [[0, 9, 18, 27, 30], [0, 9, 27, 18, 36], [1, 9, 18, 27, 36]])
def test_wrong_ends_are_asserted_and_not_waited_for(ends):
    with FakeGPU() as gpu:
        hidden, weight, labels = pairs(gpu, torch.float32)
        flat, there = hidden.flatten(0, 1), gpu.put(torch.tensor(ends))
        index = gpu.put(torch.arange(36))
        with pytest.raises(RuntimeError, match="cu_seqlens should be ascending from 0 to the"):
            linear_dpo_loss(flat, weight, labels.flatten(), cu_seqlens=there, row_index=index)
        assert gpu.waits == []


def test_rows_in_another_order_are_asserted_and_not_waited_for():
    with FakeGPU() as gpu:
        hidden, weight, labels = pairs(gpu, torch.float32)
        index = (gpu.get(labels).flatten() != -100).nonzero().squeeze(1)
        for wrong in (index.flip(0), torch.cat([index[:1], index[:-1]])):
            with pytest.raises(RuntimeError, match="row_index should be in strictly ascending"):
                linear_logps(hidden, weight, labels, row_index=gpu.put(wrong))
        assert gpu.waits == []


def test_logps_of_all_rows_wait_for_nothing():
    with FakeGPU() as gpu:
        hidden, weight, labels = pairs(gpu, torch.bfloat16)
        index = gpu.put((gpu.get(labels).flatten() != -100).nonzero().squeeze(1))
        logps = linear_logps(hidden, weight, labels, row_index=index)
        logps.sum().backward()
        assert gpu.waits == []


@pytest.mark.parametrize("given", [True, False])
def test_a_hugging_face_step_waits_at_most_once(given):
    """Reference and policy share the one number of rows; with the collator's, nothing waits."""
    policy, reference = (build("Llama", attn_implementation="eager") for _ in range(2))
    input_ids, attention_mask, labels = batch()
    pairs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    pairs = hf.with_row_index(pairs) if given else pairs
    with FakeGPU() as gpu:
        for model in (policy, reference):
            model._apply(gpu.put)
        pairs = {key: gpu.put(value) for key, value in pairs.items()}
        hf.dpo_loss(policy, pairs, reference)  # compares the models' own logits with fastdpo's
        gpu.waits.clear()
        hf.dpo_loss(policy, pairs, reference).loss.backward()
        assert len(gpu.waits) == (0 if given else 1)
        assert gpu.get(policy.lm_head.weight.grad).isfinite().all()


def test_padding_on_the_left_waits_for_nothing():
    """Neither where positions are made from the mask, nor where it is refused."""
    transformers = pytest.importorskip("transformers")
    from hf_models import batch, build

    bart = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    config = transformers.MBartConfig(vocab_size=53, attn_implementation="eager", **bart)
    refused = transformers.MBartForCausalLM(config).eval()
    model = build("GPT2", attn_implementation="eager")
    input_ids, attention_mask, labels = batch(padding="left")
    pairs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    expected = hf.dpo_loss(model, pairs, reference_free=True)
    pairs = hf.with_row_index(pairs)
    right = hf.with_row_index({**pairs, "attention_mask": attention_mask.flip(-1)})
    with FakeGPU() as gpu:
        for lm in (model, refused):
            lm._apply(gpu.put)
        pairs, right = ({key: gpu.put(v) for key, v in p.items()} for p in (pairs, right))
        hf.dpo_loss(model, pairs, reference_free=True)
        hf.dpo_loss(refused, right, reference_free=True)
        gpu.waits.clear()
        found = hf.dpo_loss(model, pairs, reference_free=True)
        torch.testing.assert_close(gpu.get(found.chosen_logps), expected.chosen_logps)
        with pytest.raises(RuntimeError, match="attention_mask should be padded on the right"):
            hf.dpo_loss(refused, pairs, reference_free=True)
        assert gpu.waits == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_materialized_logits(dtype):
    labels = torch.randint(300, (4, 9))
    labels[:, :3] = -100
    values = torch.randn(4, 9, 300).to(dtype)

    def loss(logits, labels, reference):
        logps = get_batch_logps(logits, labels)
        losses, *_ = preference_loss(*logps.chunk(2), *reference.chunk(2), beta=0.1)
        return losses.mean()

    on_cpu = values.clone().requires_grad_()
    expected = loss(on_cpu, labels, torch.zeros(4))
    expected.backward()
    with FakeGPU() as gpu:
        leaf = gpu.put(values.requires_grad_())
        found = loss(leaf * 1.0, gpu.put(labels), gpu.put(torch.zeros(4)))
        found.backward()
        assert len(gpu.waits) <= 1  # the labels are checked
        torch.testing.assert_close(gpu.get(found), expected.detach())
        torch.testing.assert_close(gpu.get(leaf.grad), on_cpu.grad, atol=1e-5, rtol=1e-2)


# ---- Memory, at the size of a real head: tensors without data


def step_bytes(n, vocab, d, *, trained, workspace, dtype=torch.bfloat16, reference=False):
    """Peak bytes beyond inputs and gradients of one step; the kernels' own scratch is not seen."""
    with FakeGPU(data=False) as gpu:
        hidden = torch.empty(4, n // 4, d, device=DEVICE, dtype=dtype).requires_grad_(not reference)
        weight = torch.empty(vocab, d, device=DEVICE, dtype=dtype).requires_grad_(trained)
        labels = torch.randint(vocab, (4, n // 4), device=DEVICE)
        index = torch.arange(n, device=DEVICE)
        ref = torch.empty(4, device=DEVICE)
        before = gpu.reset_peak()
        out = linear_dpo_loss(
            hidden, weight, labels, ref_logps=ref, row_index=index, workspace_bytes=workspace
        )
        gradients = (
            ()
            if reference
            else torch.autograd.grad(out.loss, (hidden, weight) if trained else (hidden,))
        )
        assert gpu.waits == []
        return gpu.peak_bytes - before - sum(g.nbytes for g in gradients)


VOCAB, D = 128_256, 4096  # Llama-3-8B's
MIB = 1 << 20
# What 8 and 32 thousand rows may need beyond E: rows and scaled rows in bf16, a sum in fp32, a
# block of columns that is computed again, and one block of that sum's next term.
BEYOND_E = {n: 8 * n * D + (256 + 32 + 8) * MIB for n in (8192, 32_768)}


@pytest.mark.parametrize("workspace", [0, 512 * MIB, 2048 * MIB])
@pytest.mark.parametrize("n", BEYOND_E)
def test_a_step_keeps_to_its_workspace(n, workspace):
    extra = step_bytes(n, VOCAB, D, trained=True, workspace=workspace)
    assert workspace * 0.9 < extra < workspace + BEYOND_E[n]
    assert extra < n * VOCAB * (2 + 4) / 2  # eager's logits, in bf16 and in fp32, are twice that


def test_the_default_workspace_is_two_gibibytes():
    found = step_bytes(32_768, VOCAB, D, trained=True, workspace=None)
    assert found == step_bytes(32_768, VOCAB, D, trained=True, workspace=2048 * MIB)


@pytest.mark.parametrize("n", BEYOND_E)
def test_a_frozen_head_needs_one_block_of_rows(n):
    extra = step_bytes(n, VOCAB, D, trained=False, workspace=None)
    assert extra < (512 + 96) * MIB + 2 * n * D * 2


def test_the_reference_needs_next_to_nothing():
    with torch.no_grad():
        extra = step_bytes(8192, VOCAB, D, trained=False, workspace=None, reference=True)
    assert extra < 8192 * (2 * D + 256)
