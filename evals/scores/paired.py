"""Make scores from measurements: value and control on the same prompts, or counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .score import LEVEL, RESAMPLES, Better, Score, Unit


def paired(
    name: str,
    values: Float[Tensor, " n"],
    control_draws: Float[Tensor, "draws n"],
    *,
    key: str = "",
    unit: Unit,
    control_name: str,
    better: Better,
    weights: Float[Tensor, " n"] | None = None,
    detail: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Score:
    """Return the score of `values` beside their control, on the same n prompts, pairs or blocks.

        value   = sum_i w_i values_i / sum_i w_i            (w = 1 without `weights`)
        stderr  = sqrt(n/(n-1) sum_i w_i^2 (d_i - gap)^2) / sum_i w_i,   d_i = values_i - control_i

    control_i is the mean over the draws of the control on prompt i, and gap the weighted mean of
    d_i. Because both are measured on the same prompts, how difficult a prompt is cancels in d_i. A
    ratio of sums, such as the FVU, is a mean of this kind whose weights are its denominators.
    Raises ValueError for fewer than 2 prompts, for no draw, and for numbers that are not finite.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"score {name!r}: {n} prompt; an error needs at least 2")
    if not len(control_draws):
        raise ValueError(
            f"score {name!r}: no draw of its control {control_name!r}; draw at least 1"
        )
    w = torch.ones(n) if weights is None else weights
    w = w.detach().cpu().double()
    v, c = values.detach().cpu().double(), control_draws.detach().cpu().double()
    for what, x in (("values", v), ("control_draws", c), ("weights", w)):
        if not x.isfinite().all():
            raise ValueError(f"score {name!r}: {what} hold NaN or infinity; find where it broke")
    if (w < 0).any() or not w.sum() > 0:
        raise ValueError(f"score {name!r}: weights must be at least 0 and not all 0")
    d = v - c.mean(0)
    gap = (w * d).sum() / w.sum()
    stderr = (n / (n - 1) * (w * (d - gap)).square().sum()).sqrt() / w.sum()
    return Score(
        key=key,
        name=name,
        unit=unit,
        value=float((w * v).sum() / w.sum()),
        control_name=control_name,
        draws=tuple(((c @ w) / w.sum()).tolist()),
        stderr=float(stderr),
        interval=bootstrap(d, w, seed),
        n=n,
        better=better,
        detail=dict(detail or {}),
    )


def per_pair(x: Float[Tensor, "*draws prompt"]) -> Float[Tensor, "*draws pair"]:
    """Return the mean over the two prompts of each pair, the independent unit of a task.

    Prompts i and i + n of a TaskBatch of n pairs are the two contexts of pair i.
    """
    return x.unflatten(-1, (2, -1)).mean(-2)


def bootstrap(
    gaps: Float[Tensor, " n"], weights: Float[Tensor, " n"], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the weighted mean of `gaps`, from resampling the n prompts."""
    n = len(gaps)
    rng = torch.Generator().manual_seed(seed)
    picked = torch.randint(n, (RESAMPLES, n), generator=rng)
    w = weights[picked]  # resample n
    means = (w * gaps[picked]).sum(1) / w.sum(1).clamp(min=1e-300)
    tail = (1 - LEVEL) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def counted(
    name: str,
    value: int | float,
    draws: tuple[int | float, ...],
    *,
    key: str = "",
    unit: Unit,
    control_name: str,
    better: Better,
    detail: Mapping[str, Any] | None = None,
) -> Score:
    """Return the score of a count beside the counts of its control.

    A count has no sampling error, so its standard error is 0 and n is 1.
    """
    return Score(
        key=key,
        name=name,
        unit=unit,
        value=float(value),
        draws=tuple(float(draw) for draw in draws),
        control_name=control_name,
        stderr=0.0,
        n=1,
        better=better,
        detail=dict(detail or {}),
    )
