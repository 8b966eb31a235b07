"""The compiled CUDA C++ extension: kernels on raw device pointers (integers), sizes and strides in
elements.

Pointers that may be left out are 0. Every function queues its work on `stream` of `device` and
returns without waiting. A bad argument is a ValueError that begins with the argument's name; a CUDA
error is a RuntimeError that begins with the kernel's.
"""

FLOAT32: int
BFLOAT16: int
FLOAT16: int
CUDART_VERSION: int
SASS_ARCHITECTURES: tuple[int, ...]
PTX_ARCHITECTURES: tuple[int, ...]

def check_architecture(major: int, minor: int) -> None: ...
def driver_version() -> int: ...
def logits_logps_workspace_bytes(*, dtype: int, rows: int, vocab: int) -> int: ...
def sequence_loss_workspace_bytes(*, pairs: int) -> int: ...
def logits_logps(
    *,
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    labels: int,
    scale: float,
    softcap: float,
    temperature: float,
    logps: int,
    lse: int,
    workspace: int,
    workspace_bytes: int,
    second_launch: bool,
    device: int,
    stream: int,
) -> None: ...
def logits_logps_backward(
    *,
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    labels: int,
    lse: int,
    grad: int,
    grad_stride: int,
    grad_scale: int,
    scale: float,
    softcap: float,
    temperature: float,
    out: int,
    out_dtype: int,
    out_stride: int,
    device: int,
    stream: int,
) -> None: ...
def target_logits(
    *,
    hidden: int,
    dtype: int,
    rows: int,
    width: int,
    hidden_stride: int,
    weight: int,
    vocab: int,
    weight_stride: int,
    bias: int,
    bias_dtype: int,
    labels: int,
    scale: float,
    softcap: float,
    temperature: float,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def sequence_loss(
    *,
    logps: int,
    rows: int,
    labels: int,
    offsets: int,
    pairs: int,
    ref_logps: int,
    beta: float,
    label_smoothing: float,
    average: bool,
    interleaved: bool,
    loss: int,
    sequence_logps: int,
    rewards: int,
    coefficients: int,
    row_coefficients: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
