"""AbsTopK on a CPU: numpy finds the k-th magnitude of every vector, a block of rows at a time.

abs_topk.py holds the definition, of which this gives the same bits.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .bits import BITS, BLOCK

CHUNK = 256  # entries that numpy sorts in registers, on every processor with AVX2 or AVX512
RUN = 16  # neighbours in a sorted chunk of which `kth_largest` looks at the first and last alone


def forward_cpu(x: Tensor, k: int) -> Tensor:
    """Return abs_topk(x, k): per block of rows, keep what is at or above the k-th magnitude.

    Most rows of 16-bit floats have ties at the k-th magnitude. These are made rare by comparing
    32-bit keys: the upper half is the magnitude, and the lower half counts down with the index, so
    that of equal magnitudes the first is the largest key.
    """
    y = x.new_empty(x.shape)
    bits, out = _rows(x), _rows(y)
    drop_sign = bits.dtype.type(BITS[x.dtype][1])
    half = bits.itemsize == 2
    key = np.maximum(0xFFFF - np.arange(x.shape[-1], dtype=np.int32), 0)
    for rows in _blocks(bits):
        a = np.bitwise_and(bits[rows], drop_sign)
        if half:
            a = a.astype(np.int32)
            a <<= 16
            a |= key
        t = kth_largest(a, k)
        kept = a >= t
        if np.count_nonzero(kept) != k * len(kept):
            _give_ties_to_the_lowest_index(kept, a, t, k)
        np.multiply(bits[rows], kept, out=out[rows])  # a product of integers: 0 is +0
    return y


def _give_ties_to_the_lowest_index(kept: np.ndarray, a: np.ndarray, t: np.ndarray, k: int) -> None:
    """Unmark entries equal to t, last ones first, until k are marked in every row; in place."""
    rows = np.flatnonzero(np.count_nonzero(kept, axis=-1) != k)
    above, tied = a[rows] > t[rows], a[rows] == t[rows]
    places = k - np.count_nonzero(above, axis=-1)[:, None]
    kept[rows] = above | (tied & (np.cumsum(tied, axis=-1) <= places))


def kth_largest(a: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th largest of every row of `a`, integers (rows, d) of 0 or more, as (rows, 1).

    numpy partitions up to two chunks in registers. Longer rows would be slow to partition on
    processors that store selected lanes slowly, so they are sorted in chunks, and each sorted chunk
    is cut into runs of RUN neighbours. Two numbers then enclose the answer. Let j = ceil(k / RUN):

    - L, the j-th largest of the runs' least entries. All RUN entries of j runs are at least L;
      these are k or more, so the answer is at least L.
    - U, the j-th largest of the runs' greatest entries. Fewer than j runs have an entry above U;
      these hold fewer than k entries, so the answer is at most U.

    A run above U counts as a whole. Only the few runs that reach into L..U are looked at entry by
    entry.
    """
    n, d = a.shape
    if d <= 2 * CHUNK:
        return np.partition(a, d - k, axis=-1)[:, d - k, None]
    chunks = np.empty((n, -(-d // CHUNK) * CHUNK), a.dtype)
    chunks[:, :d], chunks[:, d:] = a, -1
    chunks.reshape(-1, CHUNK).sort(axis=-1)
    runs = chunks.reshape(n, -1, RUN)
    least, greatest = runs[:, :, 0].copy(), runs[:, :, -1].copy()
    j = -(-k // RUN)
    over = least > _nth(greatest, j)
    between = (greatest >= _nth(least, j)) & ~over
    at, count = np.flatnonzero(between), np.count_nonzero(between, axis=-1)
    row, first = at // between.shape[1], np.cumsum(count) - count
    few = np.full((n, count.max(), RUN), -1, a.dtype)
    few[row, np.arange(len(at)) - first[row]] = runs.reshape(-1, RUN)[at]
    few = few.reshape(n, -1)
    few.sort(axis=-1)
    left = k - RUN * np.count_nonzero(over, axis=-1)
    return np.take_along_axis(few, few.shape[1] - left[:, None], axis=-1)


def _nth(a: np.ndarray, n: int) -> np.ndarray:
    """Return the n-th largest of every row, (rows, 1)."""
    place = a.shape[-1] - n
    return np.partition(a, place, axis=-1)[:, place, None]


def backward_cpu(grad: Tensor, y: Tensor, k: int) -> Tensor:
    """Return `grad` at the entries that `passes_gradient(y, k)` marks, and 0 elsewhere."""
    out = grad.new_empty(grad.shape)
    bits, kept_bits, into = _rows(grad), _rows(y), _rows(out)
    drop_sign = bits.dtype.type(BITS[y.dtype][1])
    for rows in _blocks(bits):
        passes = np.bitwise_and(kept_bits[rows], drop_sign) != 0
        if np.count_nonzero(passes) != k * len(passes):
            passes[np.count_nonzero(passes, axis=-1) < k] = True
        np.multiply(bits[rows], passes, out=into[rows])
    return out


def _rows(x: Tensor) -> np.ndarray:
    """Return the bits of x as (rows, d), a view where the strides allow it."""
    return x.detach().reshape(-1, x.shape[-1]).view(BITS[x.dtype][0]).numpy()


def _blocks(bits: np.ndarray) -> list[slice]:
    step = max(1, BLOCK // bits.shape[1])
    return [slice(i, i + step) for i in range(0, len(bits), step)]
