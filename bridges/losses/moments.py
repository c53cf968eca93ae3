"""Count, mean and spread of sets of vectors; those of two sets give those of their union.

This is how a mean and a variance over a whole batch are had when the batch is cut into parts or
shared among processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch.distributed
from jaxtyping import Float
from torch import Tensor


class Moments(NamedTuple):
    """Count, mean and spread of a set of vectors. `join` gives those of two sets together."""

    n: float
    mean: Float[Tensor, " d"]
    spread: Float[Tensor, ""]
    """sum_t |x_t - mean|^2"""

    @classmethod
    def of(cls, x: Float[Tensor, "*batch d"]) -> Moments:
        """Return the moments of vectors, in float32 or better."""
        flat = x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        mean = flat.mean(0)  # torch.var_mean over the first axis is much slower on a CPU
        return cls(len(flat), mean, (flat - mean).square_().sum())

    def join(self, other: Moments) -> Moments:
        """Return the moments of both sets as one (Chan et al. 1983), exact but for rounding.

        mean = (n m + n' m') / (n + n'),   spread = s + s' + |m' - m|^2 n n' / (n + n')
        """
        n, away = self.n + other.n, other.mean - self.mean
        spread = self.spread + other.spread + away.square().sum() * (self.n * other.n / n)
        return Moments(n, self.mean + away * (other.n / n), spread)


def moments_of(targets: Sequence[Float[Tensor, "*batch _"]], processes: int = 1) -> list[Moments]:
    """Return the moments of each target.

    With `processes` above 1 every process calls this with its own rows, all with equally many, and
    every one gets the moments of all rows together.
    """
    return of_all_processes([Moments.of(t) for t in targets], processes)


def of_all_processes(mine: Sequence[Moments], processes: int) -> list[Moments]:
    """Return the moments of the rows of all processes together.

    Every process calls this with the moments of its own rows, all of equally many.
    """
    if processes == 1:
        return list(mine)
    sent = torch.cat([torch.cat([m.mean, m.spread[None]]) for m in mine])
    everyones = [torch.empty_like(sent) for _ in range(processes)]
    torch.distributed.all_gather(everyones, sent)
    per_target = zip(*(x.split([len(m.mean) + 1 for m in mine]) for x in everyones), strict=True)
    return [
        reduce(Moments.join, (Moments(m.n, x[:-1], x[-1]) for x in parts))
        for m, parts in zip(mine, per_target, strict=True)
    ]
