"""The projection on a CPU: it finds the kept entries without sorting all of them.

project.py holds the definition, `chosen_reference`, which marks the same entries. A *slice* is what
the floor protects: a row (dim 0) or a column (dim 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .bits import BITS

BLOCK = 1 << 17
"""Number of entries that are worked on at a time, so that they stay in the cache."""


def chosen_cpu(
    weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int
) -> Bool[Tensor, "out in"]:
    """Mark the entries that `chosen_reference` marks.

    It compares the bits of |weight|, which have the order of |weight|. If the `keep` largest
    entries of the whole matrix give every slice its floor, they are the answer. Otherwise the
    slices that lack entries get theirs, and as many of the smallest marked entries are unmarked, in
    slices that have more than their floor.
    """
    bits = weight.detach().contiguous().view(BITS[weight.dtype][0]).numpy()
    chosen = _largest(bits.reshape(-1), keep).reshape(bits.shape)
    if floor:
        # a sum in uint16 takes a fifth of the time
        narrow = np.uint16 if bits.shape[1 - dim] < 1 << 16 else np.int64
        counts = chosen.view(np.uint8).sum(axis=1 - dim, dtype=narrow).astype(np.int64)
        lacking = np.flatnonzero(counts < floor)
        if lacking.size:
            extra = int((floor - counts[lacking]).sum())
            lines = bits[lacking] if dim == 0 else bits[:, lacking].T
            for places in _largest_per_row(_magnitude(lines), floor):
                chosen[(lacking, places) if dim == 0 else (places, lacking)] = True
            _drop_smallest(chosen, bits, np.maximum(counts - floor, 0), extra, dim)
    return torch.from_numpy(chosen)


def _magnitude(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return |x| as integers that have the order of the numbers, from the bits of x."""
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out, order="C")


def _largest(bits: np.ndarray, keep: int) -> np.ndarray:
    """Mark the `keep` largest magnitudes of a flat array; ties go to the lowest index.

    A sample gives two magnitudes between which the threshold probably lies, so that only the
    entries between them have to be ordered. Where the threshold turns out to lie elsewhere, all
    entries are ordered, so the answer does not depend on the sample.
    """
    chosen, rest, v = _split(bits, *_bracket(bits, keep))
    places = keep - np.count_nonzero(chosen)
    if not 0 <= places <= rest.size:
        chosen, rest, v = _split(bits, 0, np.iinfo(bits.dtype).max)
        places = keep
    if places:
        t = np.partition(v, v.size - places)[v.size - places]
        reach = v >= t
        chosen[rest] = reach
        if excess := np.count_nonzero(reach) - places:
            chosen[rest[v == t][-excess:]] = False
    return chosen


def _bracket(bits: np.ndarray, keep: int) -> tuple[int, int]:
    """Return two magnitudes that probably enclose the `keep`-th largest one.

    They are the magnitudes three standard errors to either side of it in an evenly spaced sample;
    0 and the largest integer where the array is too small to sample.
    """
    least, most = 0, np.iinfo(bits.dtype).max
    n = max(4096, bits.size // 64)
    if bits.size < 8 * n:
        return least, most
    sample = _magnitude(bits[:: bits.size // n | 1])  # an odd stride visits every column
    n, p = sample.size, keep / bits.size
    slack = 3 * (n * p * (1 - p)) ** 0.5 + 3
    below, above = n - int(n * p + slack), n - int(n * p - slack)
    inside = [i for i in (below, above) if 0 <= i < n]
    if inside:
        sample.partition(inside)
    lo = int(sample[below]) if below >= 0 else least
    return lo, int(sample[above]) if above < n else most


def _split(bits: np.ndarray, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return marks of the magnitudes above `hi`, and the places and values of those in lo..hi.

    It works on BLOCK entries at a time, so that what it writes is still in the cache when it is
    read.
    """
    chosen = np.empty(bits.size, dtype=bool)
    a, near = np.empty(BLOCK, dtype=bits.dtype), np.empty(BLOCK, dtype=bool)
    rest, values = [], []
    for i in range(0, bits.size, BLOCK):
        c = chosen[i : i + BLOCK]
        x = _magnitude(bits[i : i + BLOCK], out=a[: c.size])
        np.greater(x, hi, out=c)
        at = np.flatnonzero(np.not_equal(np.greater_equal(x, lo, out=near[: c.size]), c))
        values.append(x[at])
        rest.append(at + i)
    return chosen, np.concatenate(rest), np.concatenate(values)


def _largest_per_row(a: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Yield the column of the largest entry of every row, then of the second, up to the `n`-th.

    `a` is overwritten. Of equal entries the first comes first.
    """
    rows = np.arange(len(a))
    for _ in range(n):
        best = a.argmax(axis=1)  # the first of equal ones
        yield best
        a[rows, best] = -1


def _drop_smallest(
    chosen: np.ndarray, bits: np.ndarray, spare: np.ndarray, n: int, dim: int
) -> None:
    """Unmark, in place, the `n` smallest chosen entries, at most spare[s] of them in slice s.

    Of equal entries the one of highest index goes first.
    """
    at = np.flatnonzero(chosen)[::-1]
    line = at // bits.shape[1] if dim == 0 else at % bits.shape[1]
    at, line = at[spare[line] > 0], line[spare[line] > 0]
    v, m = _magnitude(bits.reshape(-1)[at]), 2 * n
    while True:
        low = np.flatnonzero(v <= np.partition(v, m)[m]) if m < v.size else np.arange(v.size)
        low = low[v[low].argsort(kind="stable")]
        free = low[_occurrence(line[low]) < spare[line[low]]]
        if free.size >= n or low.size == v.size:
            break
        m *= 4
    chosen.reshape(-1)[at[free[:n]]] = False


def _occurrence(x: np.ndarray) -> np.ndarray:
    """Return, for every entry of x, how often its value occurs before it."""
    order = x.argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(x.size) - np.searchsorted(x[order], x[order])
    return rank
