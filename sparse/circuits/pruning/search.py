"""The smallest circuit of a ranking that meets a target, and the nodes it can do without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from sparse.circuits.graph import Node


def smallest(
    loss: Callable[[int], float], n: int, goal: float, window: int
) -> tuple[int, dict[int, float]]:
    """Return the smallest k found with loss(k) <= goal, and every loss(k) that was measured.

    Doubles k until the goal is met, bisects, then tries the `window` sizes below, since the loss
    is not monotone. When no k meets the goal, returns the one of least loss.
    """
    curve: dict[int, float] = {}

    def meets(k: int) -> bool:
        curve[k] = curve[k] if k in curve else loss(k)
        return curve[k] <= goal

    low, high = -1, 0
    while not meets(high):
        if high == n:
            return min(curve, key=lambda k: (curve[k], k)), curve
        low, high = high, min(max(2 * high, 1), n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    below = range(max(high - window, 0), high)
    return next((k for k in below if meets(k)), high), curve


def clean(
    nodes: Sequence[Node],
    loss: Callable[[Sequence[Node]], float],
    limit: float,
    silent: Collection[Node] = (),
    n_trials: int = 200,
) -> list[Node]:
    """Drop, one at a time, nodes without which the loss stays within `limit`.

    `nodes` come best first; those with no way out (`silent`) are tried first, then from the end,
    `n_trials` in all.
    """
    kept = list(nodes)
    for node in sorted(reversed(nodes), key=lambda n: n not in silent)[:n_trials]:
        rest = [other for other in kept if other != node]
        if loss(rest) <= limit:
            kept = rest
    return kept
