"""Intervals for numbers whose pairs share frames and words: resample what they share.

    stat(m),   m = mean over the pairs of some columns          for example m_0 / m_1, a share
    factor f   its levels are the clusters: draw as many as there are, with replacement
    interval   stat + c (q - stat),   q the 2.5 and 97.5 % quantiles of stat over the resamples,
               c = sqrt(C / (C - 1)) t(C - 1) / 1.96

C is the number of clusters of the factor, and t the 97.5 % quantile of Student's distribution. The
factor c makes up for the spread that few clusters hide: 1.12 for 16 clusters, 1.58 for 5. Of all
factors, and of the pairs themselves, the widest interval is taken (`Pair.groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from .score import LEVEL, RESAMPLES

FEWEST = 5
"""Clusters below which a factor gives no interval."""
PAIRS = "pair"
"""The factor whose levels are the pairs themselves."""
Statistic = Callable[[Float[Tensor, "*draws column"]], Float[Tensor, "*draws"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A 95 % interval, and which clusters it comes from."""

    low: float
    high: float
    factor: str
    """The factor whose levels were resampled: the one that gives the widest interval."""
    n_clusters: int

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampled:
    """A statistic of pairs, and its values under resampling of what the pairs share."""

    value: float
    draws: Float[Tensor, " resamples"] | None
    """Its values in the resamples, already spread by c; None where clusters are too few."""
    factor: str
    n_clusters: int

    def interval(self) -> Interval | None:
        """Return the 95 % interval; None where clusters are too few."""
        if self.draws is None:
            return None
        low, high = _ends(self.draws)
        return Interval(low=low, high=high, factor=self.factor, n_clusters=self.n_clusters)

    def minus(self, other: Resampled) -> Resampled:
        """Return the difference from the statistic of other, independent pairs."""
        fewer = min(self, other, key=lambda r: r.n_clusters)
        draws = None
        if self.draws is not None and other.draws is not None:
            draws = self.draws - other.draws.roll(1)  # both were drawn by one seed
        value = self.value - other.value
        return Resampled(value=value, draws=draws, factor=fewer.factor, n_clusters=fewer.n_clusters)


def mean(columns: Float[Tensor, "*draws column"]) -> Float[Tensor, "*draws"]:
    """Return the first column: the statistic of a plain mean."""
    return columns[..., 0]


def ratio(columns: Float[Tensor, "*draws column"]) -> Float[Tensor, "*draws"]:
    """Return the first column over the second: the statistic of a ratio of means."""
    return columns[..., 0] / columns[..., 1]


def resampled(
    columns: Float[Tensor, "pair column"],
    groups: Mapping[str, tuple[str, ...]],
    statistic: Statistic = mean,
    seed: int = 0,
) -> Resampled:
    """Return a statistic of the column means, resampled by the factor that makes it widest.

    `groups` is that of a `TaskBatch`. Every pair that names no level of a factor is a cluster of
    its own. A factor with fewer than FEWEST clusters gives no interval and is passed over: what is
    said then holds for its levels alone (`fixed`). Where every factor that the pairs name is of
    that kind, or the pairs are fewer than FEWEST, there is no interval.

    >>> import torch
    >>> from evals.scores.clusters import resampled
    >>> x = torch.tensor([0.0, 0, 1, 1, 2, 2, 3, 3, 4, 4])[:, None]
    >>> frames = tuple("aabbccddee")
    >>> shared = resampled(x, {"frame": frames}).interval()
    >>> alone = resampled(x, {}).interval()
    >>> shared.factor, shared.n_clusters, shared.half > 1.5 * alone.half
    ('frame', 5, True)
    """
    x = columns.detach().cpu().double()
    n = len(x)
    value = float(statistic(x.mean(0)))
    named = {factor: levels for factor, levels in groups.items() if any(levels)}
    units = {PAIRS: tuple(map(str, range(n))), **named}
    best: tuple[float, Tensor, str, int] | None = None
    tried = False
    for factor, levels in units.items():
        at, n_clusters = _numbered(levels)
        if n_clusters < FEWEST:
            continue
        tried |= factor != PAIRS
        draws = _draws(x, at, n_clusters, statistic, value, seed)
        low, high = _ends(draws)
        if best is None or high - low > best[0]:
            best = (high - low, draws, factor, n_clusters)
    if best is None or (named and not tried):
        few = min(named, key=lambda f: -_numbered(named[f])[1]) if named else PAIRS
        return Resampled(value=value, draws=None, factor=few, n_clusters=_numbered(units[few])[1])
    _, draws, factor, n_clusters = best
    return Resampled(value=value, draws=draws, factor=factor, n_clusters=n_clusters)


def fixed(groups: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Return {factor: number of its levels} of the factors that give no interval.

    Nothing is said beyond these levels: with three forms of a context, a claim is about these
    three.
    """
    counts = {f: _numbered(levels)[1] for f, levels in groups.items() if any(levels)}
    return {factor: n for factor, n in counts.items() if n < FEWEST}


def _numbered(levels: tuple[str, ...]) -> tuple[Tensor, int]:
    """Return the number of each pair's cluster, and how many clusters there are."""
    names = [level or f"\0{i}" for i, level in enumerate(levels)]  # one's own where none is named
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names]), len(numbers)


def _draws(
    x: Tensor, at: Tensor, n_clusters: int, statistic: Statistic, value: float, seed: int
) -> Tensor:
    """Return the statistic in every resample of the clusters, spread by c about its value."""
    sums = torch.zeros(n_clusters, x.shape[1], dtype=x.dtype).index_add_(0, at, x)
    sizes = at.bincount(minlength=n_clusters).double()
    rng = torch.Generator().manual_seed(seed)
    picked = torch.randint(n_clusters, (RESAMPLES, n_clusters), generator=rng)
    means = sums[picked].sum(1) / sizes[picked].sum(1, keepdim=True)
    tail = (1 - LEVEL) / 2
    wider = float(student.ppf(1 - tail, n_clusters - 1)) / 1.959964
    c = (n_clusters / (n_clusters - 1)) ** 0.5 * wider
    return value + c * (statistic(means) - value)


def _ends(draws: Tensor) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high
