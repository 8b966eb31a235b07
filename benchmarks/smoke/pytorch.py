"""The machine, and what the schedule asks of PyTorch on CUDA that no CPU shows."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.environment import describe, environment
from benchmarks.smoke.table import Found, Place, check, relative

_LIFT = 2.0**43  # `core.linear` takes as much out of its sums


@check("machine")
def machine(place: Place) -> Found:
    env = environment(place.device)
    versions = ", ".join(f"{name} {v}" for name, v in env["packages"].items() if v)
    return Found(words=f"{describe(env)}; {versions}", details={"environment": env})


class _Asking:
    """Values are held to what fp64 says; what raises is told at the end, all of it."""

    def __init__(self) -> None:
        self.found, self._raised = Found(), list[str]()

    def about(self, name: str, action: Callable[[], Tensor], expected: Tensor) -> None:
        try:
            got = action()
            allowed = 1e-5 if got.dtype in (torch.float32, torch.float64) else 2.0**-8
            if got.shape == expected.shape:
                self.found.hold(name, relative(got, expected), allowed)
            else:
                self._raised.append(f"{name}: shape {tuple(got.shape)}")
        except Exception as error:
            traceback.print_exc()
            self._raised.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}")

    def answer(self) -> Found:
        if self._raised:
            raise RuntimeError("; ".join(self._raised))
        return self.found


def _products(asking: _Asking, place: Place) -> None:
    """As `core.linear` multiplies E, whose rows are padded: also transposed, and into memory that
    holds anything.
    """
    wide = torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        e, x, w = (
            torch.randn(shape, device=place.device).to(dtype)
            for shape in ((96, 512), (96, 64), (500, 64))
        )
        e = e[:, :500]
        kind = str(dtype).removeprefix("torch.")
        down, across = e.double() @ w.double(), e.double().t() @ x.double()

        def anything(dtype: torch.dtype) -> Tensor:
            return torch.full((500, 64), float("nan"), device=place.device, dtype=dtype)

        def into(out: Tensor, e=e, x=x, **options: torch.dtype) -> Tensor:
            return torch.mm(e.t(), x, out=out, **options)

        def lifted(out: Tensor, e=e, x=x, **options: torch.dtype) -> Tensor:
            alpha = 1.0 / _LIFT
            return torch.addmm(out, e.t(), x, beta=0, alpha=alpha, out=out, **options)

        asking.about(f"mm out= {kind}", lambda d=dtype, f=into: f(anything(d)), across)
        if not place.compiled:
            continue
        asking.about(f"mm fp32 {kind}", lambda e=e, w=w: torch.mm(e, w, out_dtype=wide), down)
        asking.about(
            f"mm fp32 out= {kind}", lambda f=into: f(anything(wide), out_dtype=wide), across
        )
        if dtype == torch.float16:  # nothing is lifted there
            continue
        asking.about("addmm", lambda f=lifted: f(anything(torch.bfloat16)) * _LIFT, across)
        asking.about(
            "addmm fp32", lambda f=lifted: f(anything(wide), out_dtype=wide) * _LIFT, across
        )


@check("pytorch")
def pytorch(place: Place) -> Found:
    asking, device = _Asking(), place.device
    _products(asking, place)
    mask = torch.arange(50, device=device) % 3 == 0
    asking.about(
        "nonzero_static",
        lambda: torch.nonzero_static(mask, size=17).squeeze(1).double(),
        torch.arange(0, 50, 3, device=device),
    )
    lengths = torch.tensor([3, 0, 47], device=device)
    values = torch.rand(50, device=device).double()
    asking.about(
        "segment_reduce fp64",
        lambda: torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0),
        torch.stack([values[:3].sum(), values.new_zeros(()), values[3:].sum()]),
    )
    repeated = torch.arange(3.0, device=device)
    asking.about(
        "repeat_interleave",
        lambda: repeated.repeat_interleave(lengths, output_size=50),
        torch.tensor([0.0] * 3 + [2.0] * 47, device=device),
    )
    index = torch.tensor([1, 1, 0, 4], device=device)
    rows = torch.rand(4, 8, device=device)
    zeros = torch.zeros(5, 8, device=device)
    asking.about(
        "index_put_ accumulating",
        lambda: zeros.index_put_((index,), rows, accumulate=True),
        torch.stack([rows[2], rows[0] + rows[1], 0 * rows[0], 0 * rows[0], rows[3]]),
    )

    def asserted() -> Tensor:
        torch._assert_async(mask.any(), "there should be one")
        return mask.double()

    asking.about("_assert_async", asserted, mask)
    found = asking.answer()
    found.words = f"torch {torch.__version__}"
    if place.compiled:
        torch.cuda.synchronize()
        has = torch.cuda.get_device_properties(device)
        found.words += f", {has.multi_processor_count} processors, L2 {has.L2_cache_size >> 20} MiB"
    else:
        found.words += ": products with fp32 results are for CUDA devices"
    return found
