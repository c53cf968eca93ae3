"""The smallest circuit of a ranking that meets a target, and the nodes it can do without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from sparse.circuits.graph import Node


def smallest(
    loss: Callable[[int], float], n: int, goal: float, window: int
) -> tuple[int, dict[int, float]]:
    """Return the smallest k found with loss(k) <= goal, and every loss(k) that was measured.

    k is doubled from 0 up to at most n until the goal is met, then bisected. Then the `window`
    sizes below the answer are tried, smallest first, since the loss is not monotone in k. Where no
    k that was tried meets the goal, the one of least loss is returned.
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
    """Return `nodes` without those that can be dropped one by one while loss(rest) <= limit.

    `nodes` are in the order of the ranking, best first. The `silent` ones, which nothing reads, are
    tried first, then the others; both from the end of the ranking. At most `n_trials` are tried.
    """
    kept = list(nodes)
    for node in sorted(reversed(nodes), key=lambda n: n not in silent)[:n_trials]:
        rest = [other for other in kept if other != node]
        if loss(rest) <= limit:
            kept = rest
    return kept
