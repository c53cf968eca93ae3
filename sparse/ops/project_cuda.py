"""The exact projection on CUDA: the threshold is found digit by digit, all of it on the device.

    a      = |w| as an integer, which has the order of |w|; -1 where a slice's floor protects w
    t      = the m-th largest a, m = keep less the number of protected entries
    w      = w where a = -1, or a > t, or at the first entries with a = t that make `keep`; else 0

A digit is 8 bits of a (7 for the last). t is found from the top digit down: of the entries that
have all digits found so far, count how many have which next digit, and take the largest that enough
entries reach. No number goes to the host, which would wait for it; what is known so far is in
`state` = (digits found so far, places left among the entries that have these digits).
`chosen_reference` (project.py) is the definition, for finite weights. Importing this module needs
triton.
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
MAX_WIDTH = 1 << 14  # most entries of a slice with a floor: up to here it fits into registers


@triton.jit
def _protect(A, width, floor, BLOCK: tl.constexpr):
    """Set the `floor` largest entries of a row of A to -1; of equal ones, the first ones."""
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
    """COUNTS[d] += the number of entries with the digits found so far and d as the next one."""
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
    """Put into STATE the largest digit that enough entries reach; zero COUNTS for the next one."""
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
    """TIES[block] = the number of its entries that equal the threshold."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + i, mask=i < n, other=-1)
    tl.store(TIES + tl.program_id(0), tl.sum((a == tl.load(STATE)).to(tl.int32), 0))


@triton.jit
def _apply(W, A, TIES, STATE, n, BLOCK: tl.constexpr):
    """Set to zero the entries of W that are not chosen.

    TIES[block] is the number of entries that equal the threshold up to the end of the block.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + i, mask=i < n, other=0)
    t = tl.load(STATE)
    tied = ((a == t) & (i < n)).to(tl.int32)
    before = tl.load(TIES + tl.program_id(0)) - tl.sum(tied, 0) + tl.cumsum(tied, 0) - tied
    chosen = (a < 0) | (a > t) | ((tied > 0) & (before < tl.load(STATE + 1)))
    w = tl.load(W + i, mask=i < n, other=0)
    tl.store(W + i, tl.where(chosen, w, 0), mask=i < n)


def fits(weight: Tensor, floor: int, dim: int) -> bool:
    """Return whether the kernels can project this matrix."""
    narrow = not floor or weight.shape[1 - dim] <= MAX_WIDTH
    return weight.dtype in DIGITS and weight.is_contiguous() and narrow


def project_(weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int) -> None:
    """Project `weight` in place; `sparse.ops.project.project_` has checked the arguments."""
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
    """Return `state` and the number of blocks of `a`.

    `state` is on the device and holds t and the places left among the entries that equal t.
    """
    n_blocks: int = -(-a.numel() // BLOCK)
    counts, state = a.new_zeros(BINS), a.new_zeros(2)
    if m == 0:  # only protected entries are kept: t is above every finite weight
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
