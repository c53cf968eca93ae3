"""What every part of the GPU's benchmark uses: a clock, the ceilings, and the rows of the table."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

MATRIX = {"cuda": 8192, "cpu": 256}
"""Rows and columns of the matrices whose product gives the ceiling of FLOP/s."""
COPIED = {"cuda": 2**30, "cpu": 2**22}
"""Bytes of the copy that gives the ceiling of bandwidth."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device reaches where nothing else limits it, measured."""

    bytes_per_second: float
    """Read and written by a copy."""
    flops_per_second: dict[torch.dtype, float]
    """Of a product of two large square matrices."""

    def seconds(self, n_bytes: float = 0, flops: float = 0, dtype: torch.dtype = torch.bfloat16):
        """Return the floor: max(bytes / measured bandwidth, FLOPs / measured FLOPs per second)."""
        return max(n_bytes / self.bytes_per_second, flops / self.flops_per_second[dtype])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; times are in milliseconds, each the median of its repetitions."""

    part: str
    case: str
    ms: float
    quartiles: tuple[float, float]
    reference: str
    """What the time is compared with."""
    reference_ms: float
    floor: str
    """What the floor counts."""
    floor_ms: float
    apart: float | None = None
    """Largest difference of the results from the reference's, over the largest entry of these;
    None where the reference computes something else, as a dense model's step does."""
    tokens_per_second: float | None = None
    peak: int | None = None
    """Bytes at the peak."""
    planned: int | None = None
    """Bytes that `bridges.plan` predicts."""

    @property
    def to_reference(self) -> float:
        return self.reference_ms / self.ms

    @property
    def to_floor(self) -> float:
        return self.ms / self.floor_ms


class Clock:
    """Times work on one device, in seconds."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def once(self, run: Callable[[], object]) -> float:
        """Return the seconds of `run` on the device: by events on CUDA, else by the wall's clock"""
        if self.device.type != "cuda":
            start = perf_counter()
            run()
            return perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def turns(self, *forms: Callable[[], object]) -> list[list[float]]:
        """Return the seconds of each form; they take turns, after two turns that warm up."""
        times = [[self.once(form) for form in forms] for _ in range(2 + self.repeats)][2:]
        return [list(of_form) for of_form in zip(*times, strict=True)]


def ceilings(clock: Clock) -> Ceilings:
    """Measure the ceilings of the device."""
    kind = clock.device.type
    n, size = MATRIX[kind], COPIED[kind]
    a, b = (torch.empty(size, dtype=torch.uint8, device=clock.device) for _ in range(2))
    copied = 2 * size / median(clock.turns(lambda: b.copy_(a))[0])
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        flops[dtype] = 2 * n**3 / median(clock.turns(lambda x=x, y=y: x @ y)[0])
    return Ceilings(bytes_per_second=copied, flops_per_second=flops)


def spread(seconds: list[float]) -> dict:
    """Return `ms` and `quartiles` of a Row."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return {"ms": 1e3 * middle, "quartiles": (1e3 * low, 1e3 * high)}


def apart(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Return the largest difference over the largest entry, of the pair where it is largest."""
    gaps = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300))
        for a, b in zip(mine, theirs, strict=True)
    ]
    return max(gaps)


def release(device: torch.device) -> None:
    """Give back the memory of what was measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
