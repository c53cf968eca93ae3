"""The exact projection on CUDA, without a word to the host: the threshold is found by digits.

    a      = |w| as an integer, which orders as |w| does; -1 where a slice's floor protects it
    t      = the m-th largest a, m = keep less the protected: 8 bits at a time, from the top, by
             counting how many entries that share the digits found so far have which next digit
    w      = w where a = -1, or a > t, or a = t and few enough such came before it; else 0

Whatever is counted stays on the device, in `state` = (digits found so far, places left among the
entries that have them). `chosen_reference` (project.py) is the definition, for finite weights.
Importing this module needs triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

DIGITS = {  # float dtype: (integer view, mask that drops the sign, digits as (lowest bit, bits))
    torch.float32: (torch.int32, 0x7FFFFFFF, ((23, 8), (15, 8), (7, 8), (0, 7))),
    torch.bfloat16: (torch.int16, 0x7FFF, ((7, 8), (0, 7))),
    torch.float16: (torch.int16, 0x7FFF, ((7, 8), (0, 7))),
}
BLOCK = 4096  # entries per program
BINS = 256
MAX_WIDTH = 1 << 14  # entries of a slice with a floor: it stays in registers whole


@triton.jit
def _protect(A, width, floor, BLOCK: tl.constexpr):
    """Set the `floor` largest of a row to -1, the first of equal ones first."""
    row = A + tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    a = tl.load(row + i, mask=i < width, other=-1)
    for _ in range(floor):
        first = tl.min(tl.where(a == tl.max(a, 0), i, BLOCK), 0)
        a = tl.where(i == first, -1, a)
    tl.store(row + i, a, mask=i < width)


@triton.jit
def _count_digits(
    A,
    COUNTS,
    STATE,
    n,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """COUNTS[d] += how many entries that start with the digits found have d for the next."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + i, mask=i < n, other=-1)
    found = tl.load(STATE)
    takes_part = (a >= 0) & ((a >> SHIFT >> BITS) == found)
    digit = tl.where(takes_part, (a >> SHIFT) & ((1 << BITS) - 1), BINS)  # pyright: ignore
    counts = tl.histogram(digit, 2 * BINS)  # the upper half holds those that do not take part
    bins = tl.arange(0, 2 * BINS)
    tl.atomic_add(COUNTS + bins, counts, mask=(bins < BINS) & (counts > 0))


@triton.jit
def _next_digit(COUNTS, STATE, BITS: tl.constexpr, BINS: tl.constexpr):
    """The largest digit that enough entries reach; empty COUNTS for the next digit."""
    d = tl.arange(0, BINS)
    counts = tl.load(COUNTS + d)
    places = tl.load(STATE + 1)
    reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # how many have d or more
    digit = tl.sum((reach >= places).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(d > digit, counts, 0), 0)
    tl.store(STATE, (tl.load(STATE) << BITS) | digit)
    tl.store(STATE + 1, places - above)
    tl.store(COUNTS + d, tl.zeros_like(counts))


@triton.jit
def _count_ties(A, TIES, STATE, n, BLOCK: tl.constexpr):
    """TIES[block] = how many of its entries equal the threshold."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + i, mask=i < n, other=-1)
    tl.store(TIES + tl.program_id(0), tl.sum((a == tl.load(STATE)).to(tl.int32), 0))


@triton.jit
def _apply(W, A, TIES, STATE, n, BLOCK: tl.constexpr):
    """Zero what is not chosen. TIES[block] = ties up to the end of the block."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + i, mask=i < n, other=0)
    t = tl.load(STATE)
    tied = ((a == t) & (i < n)).to(tl.int32)
    before = tl.load(TIES + tl.program_id(0)) - tl.sum(tied, 0) + tl.cumsum(tied, 0) - tied
    chosen = (a < 0) | (a > t) | ((tied > 0) & (before < tl.load(STATE + 1)))
    w = tl.load(W + i, mask=i < n, other=0)
    tl.store(W + i, tl.where(chosen, w, 0), mask=i < n)


def fits(weight: Tensor, floor: int, dim: int) -> bool:
    """Say whether the kernels take this matrix."""
    narrow = not floor or weight.shape[1 - dim] <= MAX_WIDTH
    return weight.dtype in DIGITS and weight.is_contiguous() and narrow


def project_(weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int) -> None:
    """Project `weight` in place as `sparse.project.project_` does, whose checks have passed."""
    as_int, magnitude, digits = DIGITS[weight.dtype]
    w, n = weight.detach().view(as_int), weight.numel()
    with torch.cuda.device_of(weight):
        a = (w & magnitude).to(torch.int32)
        if floor:
            a = a if dim == 0 else a.t().contiguous()
            n_slices, width = a.shape
            block = 1 << (width - 1).bit_length()
            _run(_protect, n_slices, a, width, floor, BLOCK=block, num_warps=max(block // 1024, 1))
            a = a if dim == 0 else a.t().contiguous()
        state, n_blocks = _threshold(a, keep - floor * weight.shape[dim], digits)
        ties = a.new_empty(n_blocks)
        _run(_count_ties, n_blocks, a, ties, state, n, BLOCK=BLOCK)
        ties = ties.cumsum(0, dtype=torch.int32)
        _run(_apply, n_blocks, w, a, ties, state, n, BLOCK=BLOCK)


def _run(kernel: Any, n: int, *arguments: Any, **constants: int) -> None:
    kernel[(n,)](*arguments, **constants)


def _threshold(a: Tensor, m: int, digits: tuple) -> tuple[Tensor, int]:
    """Return (t, places among the entries that equal t) on the device, and the blocks of a."""
    n_blocks: int = -(-a.numel() // BLOCK)
    counts, state = a.new_zeros(BINS), a.new_zeros(2)
    if m == 0:  # none but the protected: a threshold above every finite weight, and no places
        state[:1].fill_(0x7FFFFFFF)
        return state, n_blocks
    state[1:].fill_(m)
    for shift, n_bits in digits:
        _run(
            _count_digits,
            n_blocks,
            a,
            counts,
            state,
            a.numel(),
            SHIFT=shift,
            BITS=n_bits,
            BINS=BINS,
            BLOCK=BLOCK,
        )
        _run(_next_digit, 1, counts, state, BITS=n_bits, BINS=BINS, num_warps=1)
    return state, n_blocks
