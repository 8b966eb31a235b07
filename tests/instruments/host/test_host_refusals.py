"""Bad arguments and CUDA errors, in the host build: the same bindings, launchers and messages."""

from __future__ import annotations

import cases
import pytest
import refusals
import torch

LAUNCH_FAILURE = 719


@pytest.mark.parametrize("refusal", refusals.REFUSALS, ids=str)
def test_the_binding_refuses_with_the_arguments_name(host, refusal):
    refusals.check(host.module, refusal)


def test_slices_of_one_matrix_that_do_not_overlap_are_accepted(cuda):
    """The left half of a matrix's columns, its gradient written to the right half."""
    both = torch.randn(4, 200)
    labels = torch.tensor([0, 99, -100, 3])
    cases.check_backward(cuda, both[:, :100], labels, both[:, 100:])
    cases.check_backward(cuda, both[:, 100:], labels, both[:, :100])


@pytest.mark.parametrize("op", ["logits_logps", "logits_logps_backward", "target_logits"])
def test_a_launch_error_names_the_kernel_and_is_reported_once(cuda, host, op):
    logits, labels = cases.logits_and_labels(torch.float32, 3, 16)
    h = cases.Head(torch.randn(16, 16))
    lse = torch.zeros(3, 2)
    run = {
        "logits_logps": lambda: cuda.logits_logps(logits, labels, h),
        "logits_logps_backward": lambda: cuda.logits_logps_backward(
            torch.zeros(3), logits, labels, lse, h, logits.clone()
        ),
        "target_logits": lambda: cuda.target_logits(logits, h, labels),
    }[op]
    host.fail_next_launch(LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=f"^{op}: cudaErrorLaunchFailure: "):
        run()
    run()


def test_an_error_in_the_loss_names_it_too(cuda, host):
    logps, offsets, ref = cases.sequences([2, 3])
    host.fail_next_launch(LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=r"^sequence_loss: cudaErrorLaunchFailure: "):
        cuda.sequence_loss(logps, offsets, ref, 0.1, 0.0, False, "concatenated")


def test_an_architecture_that_was_not_built_names_the_build_variable(host):
    module = host.module
    for built in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (9, 5), (10, 0), (12, 0)):
        module.check_architecture(*built)  # 9.0 is there as PTX, so all above it run
    for missing in ((7, 0), (7, 5)):
        with pytest.raises(
            ValueError, match=r"^device should .*8\.0, 8\.6, 9\.0 and PTX 9\.0\), got"
        ):
            module.check_architecture(*missing)
        with pytest.raises(ValueError, match='FASTDPO_CUDA_ARCHS="7'):
            module.check_architecture(*missing)


def test_the_architecture_is_checked_before_the_first_launch_on_a_device(cuda, host):
    logits, labels = cases.logits_and_labels(torch.float32, 2, 16)
    before = host.blocks()
    host.steer.host_cuda_capability(75)
    try:
        arguments = refusals.accepted("logits_logps", device=3, rows=2, vocab=16)
        with pytest.raises(ValueError, match=r"^device should .*got 7\.5; rebuild it with"):
            host.module.logits_logps(**arguments)
    finally:
        host.steer.host_cuda_capability(90)
    assert host.blocks() == before
    cuda.logits_logps(logits, labels, cases.head(logits))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"logits": torch.randn(3, 8, dtype=torch.float64)},
            "logits should be of a served device and dtype: torch.float64",
        ),
        ({"logits": torch.randn(24)}, "logits should have two dimensions"),
        ({"logits": torch.randn(8, 3).t()}, "logits should have contiguous rows"),
        ({"logits": torch.randn(3, 0)}, "logits should have at least one column"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels should be torch.int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels should have shape \[3\]"),
        ({"lse": torch.zeros(3, 2, dtype=torch.float64)}, "lse should be torch.float32"),
        ({"lse": torch.zeros(3)}, r"lse should have shape \[3, 2\]"),
        ({"grad": torch.zeros(2)}, r"grad_logps should have shape \[3\]"),
        ({"out": torch.zeros(3, 9)}, r"out should have shape \[3, 8\]"),
        ({"grad_scale": torch.zeros(2)}, r"grad_scale should have shape \[1\]"),
    ],
)
def test_the_tensors_of_the_backward_are_checked(cuda, changed, message):
    tensors = {
        "grad": torch.zeros(3),
        "logits": torch.randn(3, 8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "lse": torch.zeros(3, 2),
        "out": torch.zeros(3, 8),
        "grad_scale": None,
        **changed,
    }
    h = cases.head(torch.zeros(1))
    grad, logits, labels, lse, out, scale = tensors.values()
    with pytest.raises(ValueError, match=f"^{message}"):
        cuda.logits_logps_backward(grad, logits, labels, lse, h, out, grad_scale=scale)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.randn(5, 9)}, "weight should have 8 columns"),
        ({"weight": torch.randn(5, 8).bfloat16()}, "weight should be torch.float32"),
        ({"bias": torch.randn(6)}, r"bias should have shape \[5\]"),
        ({"bias": torch.randn(5).double()}, "bias should be float32, bfloat16, float16"),
        ({"hidden": torch.randn(3, 16)[:, ::2]}, "hidden should have contiguous rows"),
    ],
)
def test_the_tensors_of_target_logits_are_checked(cuda, changed, message):
    tensors = {"hidden": torch.randn(3, 8), "weight": torch.randn(5, 8), "bias": None, **changed}
    hidden, weight, bias = tensors.values()
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{message}"):
        cuda.target_logits(hidden, cases.Head(weight, bias), labels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logps": torch.zeros(3, 2)}, "logps should have one dimension"),
        ({"logps": torch.zeros(6).double()}, "logps should be torch.float32"),
        ({"ref": torch.zeros(3)}, "ref_logps should hold pairs, got 3"),
        ({"ref": torch.zeros(2, dtype=torch.int64)}, "ref_logps should be floating"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, r"offsets should have shape \[3\]"),
        (
            {"pairs": "sideways"},
            "pairs should be one of concatenated, interleaved, got 'sideways'",
        ),
    ],
)
def test_the_tensors_of_sequence_loss_are_checked(cuda, changed, message):
    tensors = {
        "logps": torch.zeros(6),
        "offsets": torch.tensor([0, 3, 6]),
        "ref": torch.zeros(2),
        "pairs": "concatenated",
        **changed,
    }
    logps, offsets, ref, pairs = tensors.values()
    with pytest.raises(ValueError, match=f"^{message}"):
        cuda.sequence_loss(logps, offsets, ref, 0.1, 0.0, False, pairs)
