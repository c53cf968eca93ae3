"""What the benchmarks share: processor seconds, and medians with quartiles."""

from __future__ import annotations

from collections.abc import Callable
from statistics import quantiles
from time import process_time


def seconds(run: Callable[[], object]) -> float:
    """Return the processor seconds of `run`, which other work on the machine disturbs little."""
    start = process_time()
    run()
    return process_time() - start


def quartiles(values: list[float], width: int = 0, unit: str = "") -> str:
    """Return "median (lower-upper quartile)", the median in `width` places and with its unit."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if values[1:] else 3 * values
    return f"{middle:{width}.2f}{unit} ({low:.2f}-{high:.2f})"
