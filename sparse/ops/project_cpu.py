"""The projection on a CPU: which entries are kept, found without sorting them all.

project.py holds the definition, `chosen_reference`; both mark the same entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .bits import BITS

BLOCK = 1 << 17
"""Entries that a CPU looks at together."""


def chosen_cpu(
    weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int
) -> Bool[Tensor, "out in"]:
    """Mark the same entries on the bits of |weight|, which order as |weight| does.

    If the plain global choice gives every slice its floor, it is the answer. Otherwise the slices
    that lack entries get theirs, and the smallest that other slices can spare pay for them.
    """
    bits = weight.detach().contiguous().view(BITS[weight.dtype][0]).numpy()
    chosen = _largest(bits.reshape(-1), keep).reshape(bits.shape)
    if floor:
        narrow = np.uint16 if bits.shape[1 - dim] < 1 << 16 else np.int64  # a fifth of the time
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
    """|x| as an integer, from the bits of x."""
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out, order="C")


def _largest(bits: np.ndarray, keep: int) -> np.ndarray:
    """Mark the `keep` largest magnitudes of a flat array, ties by lowest index.

    A sample brackets the threshold, so that only the entries near it are looked at one by one.
    Where the sample misleads the bracket is opened: the answer does not depend on it.
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
    """Two magnitudes of an even sample, three standard errors to either side of the threshold."""
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
    """Mark the magnitudes above `hi`; return that, and where and what those in lo..hi are.

    A block at a time, so that what is written is read from the cache.
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
    """Yield the column of every row's largest entry, then of the next, `n` in all; spoils `a`."""
    rows = np.arange(len(a))
    for _ in range(n):
        best = a.argmax(axis=1)  # of equal ones the first
        yield best
        a[rows, best] = -1


def _drop_smallest(
    chosen: np.ndarray, bits: np.ndarray, spare: np.ndarray, n: int, dim: int
) -> None:
    """Unmark the `n` smallest chosen entries, highest index first, at most spare[s] of slice s."""
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
    """How often the value of each entry has come before it."""
    order = x.argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(x.size) - np.searchsorted(x[order], x[order])
    return rank
