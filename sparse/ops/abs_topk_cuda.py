"""AbsTopK on CUDA: one Triton program per vector, which is read once and written once.

    forward    t = the k-th magnitude, by counting; y = x where |x| > t, and at as many of the first
               entries with |x| = t as make k
    backward   dx = dy where y != 0, and everywhere in a vector with fewer than k nonzeros in y

Both work on the bits, so that rounding, denormals, signed zeros and NaN make no difference
(abs_topk.py holds the definition). Of 16-bit floats 4 bytes per entry are moved in the forward pass
and 6 in the backward pass, since neither a mask nor indices are kept. Importing this module needs
triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

AS_INT = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
MAX_WIDTH = 1 << 14  # most entries of a vector: up to here it fits into registers as a whole


@triton.jit
def _forward(X, Y, stride, d, k, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """Y = AbsTopK(X) for one row, given as integers.

    t is enclosed between lo and hi with count(a >= lo) >= k > count(a >= hi), a = |x|. The next
    number to try is interpolated from the two counts, and halves the range at every fourth step.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + i, mask=i < d, other=0)
    a = tl.where(i < d, (x & MAGNITUDE).to(tl.int32), -1)
    lo = 0
    hi = tl.max(a, 0)
    n_lo = d
    n_hi = tl.sum((a >= hi).to(tl.int32), 0)
    if n_hi >= k:  # the largest magnitude is shared by k entries
        lo = hi
        n_lo = n_hi
    step = 0
    while (n_lo != k) & (hi - lo > 1):
        share = (n_lo - k).to(tl.float32) / (n_lo - n_hi).to(tl.float32)
        share = tl.where(step % 4 == 3, 0.5, tl.minimum(tl.maximum(share, 0.03), 0.97))
        middle = lo + ((hi - lo).to(tl.float32) * share).to(tl.int32)
        middle = tl.minimum(tl.maximum(middle, lo + 1), hi - 1)
        n = tl.sum((a >= middle).to(tl.int32), 0)
        enough = n >= k
        lo = tl.where(enough, middle, lo)
        n_lo = tl.where(enough, n, n_lo)
        hi = tl.where(enough, hi, middle)
        n_hi = tl.where(enough, n_hi, n)
        step += 1
    kept = a >= lo
    if n_lo != k:  # several entries equal t = lo: keep the first of them
        tied = a == lo
        places = k - tl.sum((a > lo).to(tl.int32), 0)
        kept = (a > lo) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= places))
    tl.store(Y + row * d + i, tl.where(kept, x, 0), mask=i < d)


@triton.jit
def _backward(DY, Y, DX, d, k, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    dy = tl.load(DY + row * d + i, mask=i < d, other=0)
    kept = (tl.load(Y + row * d + i, mask=i < d, other=0) & MAGNITUDE) != 0
    passes = kept | (tl.sum(kept.to(tl.int32), 0) < k)
    tl.store(DX + row * d + i, tl.where(passes, dy, 0), mask=i < d)


def fits(x: Tensor) -> bool:
    """Say whether the kernels take vectors of this dtype and width."""
    return x.dtype in AS_INT and x.shape[-1] <= MAX_WIDTH


def forward(x: Float[Tensor, "*batch d"], k: int) -> Float[Tensor, "*batch d"]:
    """Return abs_topk(x, k); the rows of x may lie apart, as q, k and v of one product do."""
    y = x.new_empty(x.shape)
    rows = _rows(x)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    _launch(_forward, len(rows), (rows, _rows(y), rows.stride(0)), x, k)
    return y


def backward(
    grad: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"], k: int
) -> Float[Tensor, "*batch d"]:
    """Return the gradient of x from that of y = abs_topk(x, k)."""
    dx = grad.new_empty(grad.shape)
    rows = (_rows(grad).contiguous(), _rows(y).contiguous(), _rows(dx))
    _launch(_backward, len(rows[0]), rows, y, k)
    return dx


def launch_options(x: Tensor) -> dict[str, int]:
    """Return the constants that a kernel is compiled for.

    They are the mask that drops the sign, the least power of two that is at least the width, and
    the number of warps.
    """
    block = 1 << (x.shape[-1] - 1).bit_length()
    magnitude = 0x7FFFFFFF if x.dtype == torch.float32 else 0x7FFF
    return {"MAGNITUDE": magnitude, "BLOCK": block, "num_warps": max(block // 1024, 1)}


def _launch(kernel, n: int, arguments: tuple, x: Tensor, k: int) -> None:
    if n:
        with torch.cuda.device_of(x):
            kernel[(n,)](*arguments, x.shape[-1], k, **launch_options(x))


def _rows(x: Tensor) -> Tensor:
    """Return the bits of x as (rows, d)."""
    return x.detach().reshape(-1, x.shape[-1]).view(AS_INT[x.dtype])
