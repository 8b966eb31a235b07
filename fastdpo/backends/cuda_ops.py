"""The torch.library ops of the CUDA C++ backend (namespace `names.CUDA`): tensors to pointers.

The extension (csrc/) knows nothing of PyTorch. Here device, dtype, shape and strides are checked,
results and workspaces allocated, and the work queued on the current stream of the tensors' device.
Tensors may be freed as soon as it is queued, as with PyTorch's own operators: their memory is used
again in the stream's order (for use on another stream there is `Tensor.record_stream`). The fake
implementations let torch.compile trace through.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..names import CUDA, PACKAGE

_DEVICE_TYPE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def extension() -> ModuleType:
    return importlib.import_module(f"{PACKAGE}._cuda")


def supports(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether tensors of this device and dtype are served, and why (not)."""
    if device.type != _DEVICE_TYPE:
        return False, f"the tensors are on {device.type}, not on {_DEVICE_TYPE}"
    if dtype not in _DTYPES:
        return False, f"{dtype} is served by the torch backend; CUDA C++ has {_names(_DTYPES)}"
    return True, "CUDA C++"


# ---- What runs on the device

_LIBRARY = torch.library.Library(CUDA, "DEF")
_TRANSFORM = "float scale, float softcap, float temperature"
_LOSS = "float beta, float label_smoothing, bool average, bool interleaved"
_LIBRARY.define(
    f"target_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {_TRANSFORM})"
    " -> Tensor"
)
_LIBRARY.define(
    f"logits_logps(Tensor logits, Tensor labels, {_TRANSFORM}, bool second_launch=False)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "logits_logps_backward(Tensor grad_logps, Tensor logits, Tensor labels, Tensor lse, "
    f"{_TRANSFORM}, Tensor(a!) out, Tensor? grad_scale) -> ()"
)
_LIBRARY.define(
    f"sequence_loss(Tensor logps, Tensor? labels, Tensor offsets, Tensor ref_logps, {_LOSS})"
    f" -> ({', '.join(['Tensor'] * 4)})"
)
_LIBRARY.define(
    "logits_sequence_loss(Tensor logits, Tensor labels, Tensor offsets, Tensor ref_logps, "
    f"{_TRANSFORM}, {_LOSS}) -> ({', '.join(['Tensor'] * 7)})"
)


def _target_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    scale: float,
    softcap: float,
    temperature: float,
) -> Tensor:  # [N]
    _check_matrix("hidden", hidden)
    _check_matrix("weight", weight, like=hidden)
    _require(
        weight.shape[1] == hidden.shape[1],
        "weight",
        f"have {hidden.shape[1]} columns, got {weight.shape[1]}",
    )
    if bias is not None:
        bias = _vector("bias", bias, weight.shape[0], hidden)
    labels = _vector("labels", labels, hidden.shape[0], hidden, torch.int64)
    out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    with _on(hidden) as queue:
        extension().target_logits(
            hidden=hidden.data_ptr(), dtype=_tag(hidden), rows=hidden.shape[0],
            width=hidden.shape[1], hidden_stride=hidden.stride(0),
            weight=weight.data_ptr(), vocab=weight.shape[0], weight_stride=weight.stride(0),
            bias=_pointer(bias), bias_dtype=_tag(hidden if bias is None else bias),
            labels=labels.data_ptr(), scale=scale, softcap=softcap, temperature=temperature,
            out=out.data_ptr(), **queue,
        )  # fmt: skip
    return out


def _logits_logps(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    scale: float,
    softcap: float,
    temperature: float,
    second_launch: bool = False,  # what puts a row's parts together, instead of the last block
) -> tuple[Tensor, Tensor]:  # [N], [N, 2]
    _check_matrix("logits", logits)
    rows, vocab = logits.shape
    labels = _vector("labels", labels, rows, logits, torch.int64)
    logps, lse = (
        torch.empty(shape, dtype=torch.float32, device=logits.device)
        for shape in ((rows,), (rows, 2))
    )
    with _on(logits) as queue:
        bytes_ = extension().logits_logps_workspace_bytes(
            dtype=_tag(logits), rows=rows, vocab=vocab
        )
        workspace = torch.empty(bytes_, dtype=torch.uint8, device=logits.device)
        extension().logits_logps(
            logits=logits.data_ptr(), dtype=_tag(logits), rows=rows, vocab=vocab,
            row_stride=logits.stride(0), labels=labels.data_ptr(),
            scale=scale, softcap=softcap, temperature=temperature,
            logps=logps.data_ptr(), lse=lse.data_ptr(),
            workspace=workspace.data_ptr(), workspace_bytes=bytes_, second_launch=second_launch,
            **queue,
        )  # fmt: skip
    return logps, lse


def _logits_logps_backward(  # many parameters: an operator takes no objects
    grad_logps: Tensor,  # [N]
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    lse: Tensor,  # [N, 2]
    scale: float,
    softcap: float,
    temperature: float,
    out: Tensor,  # [N, V]
    grad_scale: Tensor | None,  # [] or [1]
) -> None:
    _check_matrix("logits", logits)
    rows, vocab = logits.shape
    _check_matrix("out", out)
    _require(
        out.shape == logits.shape, "out", f"have shape {list(logits.shape)}, got {list(out.shape)}"
    )
    _require(out.device == logits.device, "out", f"be on {logits.device}, got {out.device}")
    labels = _vector("labels", labels, rows, logits, torch.int64)
    lse = _vector("lse", lse, (rows, 2), logits, torch.float32)
    _check_vector("grad_logps", grad_logps, rows, logits, torch.float32)
    if grad_scale is not None:
        grad_scale = _vector("grad_scale", grad_scale.reshape(-1), 1, logits, torch.float32)
    with _on(logits) as queue:
        extension().logits_logps_backward(
            logits=logits.data_ptr(), dtype=_tag(logits), rows=rows, vocab=vocab,
            row_stride=logits.stride(0), labels=labels.data_ptr(), lse=lse.data_ptr(),
            grad=grad_logps.data_ptr(), grad_stride=grad_logps.stride(0),
            grad_scale=_pointer(grad_scale), scale=scale, softcap=softcap,
            temperature=temperature, out=out.data_ptr(), out_dtype=_tag(out),
            out_stride=out.stride(0), **queue,
        )  # fmt: skip
    # Autograd has not seen the writing: what it had saved of `out` is not what it was.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _sequence_loss(
    logps: Tensor,  # [N]
    labels: Tensor | None,  # [N]
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    interleaved: bool,
) -> tuple[Tensor, ...]:  # [], [2B], [2B], [2B]
    *results, _row_coefficients = _run_sequence_loss(
        logps, labels, offsets, ref_logps, beta, label_smoothing, average, interleaved, False
    )
    return tuple(results)


def _logits_sequence_loss(  # many parameters: an operator takes no objects
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B]
    scale: float,
    softcap: float,
    temperature: float,
    beta: float,
    label_smoothing: float,
    average: bool,
    interleaved: bool,
) -> tuple[Tensor, ...]:  # [], [2B], [2B], [2B], [N], [N], [N, 2]
    logps, lse = _logits_logps(logits, labels, scale, softcap, temperature)
    results = _run_sequence_loss(
        logps, labels, offsets, ref_logps, beta, label_smoothing, average, interleaved, True
    )
    return (*results, logps, lse)


def _run_sequence_loss(  # many parameters: an operator takes no objects
    logps: Tensor,  # [N]
    labels: Tensor | None,  # [N]
    offsets: Tensor,  # [2B + 1]
    ref_logps: Tensor,  # [2B]
    beta: float,
    label_smoothing: float,
    average: bool,
    interleaved: bool,
    expand: bool,  # also return the coefficients of the rows
) -> tuple[Tensor, ...]:  # [], [2B], [2B], [2B], [N] or [0]
    _require(logps.dim() == 1, "logps", f"have one dimension, got {logps.dim()}")
    rows, sequences = logps.shape[0], ref_logps.numel()
    logps = _vector("logps", logps, rows, logps, torch.float32)
    if labels is not None:
        labels = _vector("labels", labels, rows, logps, torch.int64)
    _require(sequences % 2 == 0, "ref_logps", f"hold pairs, got {sequences}")
    offsets = _vector("offsets", offsets, sequences + 1, logps, torch.int64)
    _require(ref_logps.is_floating_point(), "ref_logps", f"be floating, got {ref_logps.dtype}")
    ref_logps = _vector("ref_logps", ref_logps.float(), sequences, logps, torch.float32)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logps.device)
    loss = empty(())
    sums, rewards, coefficients = (empty(sequences) for _ in range(3))
    row_coefficients = empty(rows if expand else 0)
    with _on(logps) as queue:
        bytes_ = extension().sequence_loss_workspace_bytes(pairs=sequences // 2)
        workspace = torch.empty(bytes_, dtype=torch.uint8, device=logps.device)
        extension().sequence_loss(
            logps=logps.data_ptr(), rows=rows, labels=_pointer(labels),
            offsets=offsets.data_ptr(), pairs=sequences // 2, ref_logps=ref_logps.data_ptr(),
            beta=beta, label_smoothing=label_smoothing, average=average, interleaved=interleaved,
            loss=loss.data_ptr(), sequence_logps=sums.data_ptr(), rewards=rewards.data_ptr(),
            coefficients=coefficients.data_ptr(),
            row_coefficients=row_coefficients.data_ptr(),
            workspace=workspace.data_ptr(), workspace_bytes=bytes_, **queue,
        )  # fmt: skip
    return loss, sums, rewards, coefficients, row_coefficients


_KERNELS = {
    "target_logits": _target_logits,
    "logits_logps": _logits_logps,
    "logits_logps_backward": _logits_logps_backward,
    "sequence_loss": _sequence_loss,
    "logits_sequence_loss": _logits_sequence_loss,
}
for _name, _kernel in _KERNELS.items():
    _LIBRARY.impl(_name, _kernel, "CUDA")


# ---- Shapes without data


@torch.library.register_fake(f"{CUDA}::target_logits", lib=_LIBRARY)
def _(hidden, weight, bias, labels, scale, softcap, temperature):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@torch.library.register_fake(f"{CUDA}::logits_logps", lib=_LIBRARY)
def _(logits, labels, scale, softcap, temperature, second_launch=False):
    rows = logits.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, 2)))


@torch.library.register_fake(f"{CUDA}::logits_logps_backward", lib=_LIBRARY)
def _(grad_logps, logits, labels, lse, scale, softcap, temperature, out, grad_scale):
    return None


@torch.library.register_fake(f"{CUDA}::sequence_loss", lib=_LIBRARY)
def _(logps, labels, offsets, ref_logps, beta, label_smoothing, average, interleaved):
    return _fake_loss(logps, ref_logps)


@torch.library.register_fake(f"{CUDA}::logits_sequence_loss", lib=_LIBRARY)
def _(
    logits, labels, offsets, ref_logps, scale, softcap, temperature,
    beta, label_smoothing, average, interleaved,
):  # fmt: skip
    n = logits.shape[0]
    rows = tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (n, 2)))
    return (*_fake_loss(logits, ref_logps), *rows)


def _fake_loss(like: Tensor, ref_logps: Tensor) -> tuple[Tensor, ...]:
    sequences = ref_logps.shape[0]
    shapes = [(), (sequences,), (sequences,), (sequences,)]
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


# ---- Checks and conversions


@contextlib.contextmanager
def _on(tensor: Tensor) -> Iterator[dict[str, int]]:
    """The tensor's device made current, and that device and its current stream as arguments."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream()
        yield {"device": stream.device_index, "stream": stream.cuda_stream}


def _tag(tensor: Tensor) -> int:
    built = extension()
    return {
        torch.float32: built.FLOAT32,
        torch.bfloat16: built.BFLOAT16,
        torch.float16: built.FLOAT16,
    }[tensor.dtype]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{name} should {what}")


def _check_matrix(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Two dimensions, a served device and dtype, and elements next to each other in a row."""
    served, reason = supports(tensor.device, tensor.dtype)
    _require(served, name, f"be of a served device and dtype: {reason}")
    _require(tensor.dim() == 2, name, f"have two dimensions, got {tensor.dim()}")
    _require(tensor.shape[1] > 0, name, "have at least one column")
    _require(
        tensor.stride(1) == 1 or tensor.shape[1] == 1,
        name,
        f"have contiguous rows, got strides {tensor.stride()}",
    )
    if like is not None:
        _require(tensor.device == like.device, name, f"be on {like.device}, got {tensor.device}")
        _require(tensor.dtype == like.dtype, name, f"be {like.dtype}, got {tensor.dtype}")


def _check_vector(
    name: str,
    tensor: Tensor,
    shape: int | tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None,
) -> None:
    shape = (shape,) if isinstance(shape, int) else shape
    served = dtype is None and tensor.dtype in _DTYPES
    expected = _names(_DTYPES) if dtype is None else str(dtype)
    _require(served or tensor.dtype == dtype, name, f"be {expected}, got {tensor.dtype}")
    _require(tensor.shape == shape, name, f"have shape {list(shape)}, got {list(tensor.shape)}")
    _require(tensor.device == like.device, name, f"be on {like.device}, got {tensor.device}")


def _vector(
    name: str,
    tensor: Tensor,
    shape: int | tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The checked vector, contiguous: a copy where it is not, of a few bytes a row."""
    _check_vector(name, tensor, shape, like, dtype)
    return tensor.contiguous()


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
