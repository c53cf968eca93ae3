"""Count, mean and spread of sets of vectors; those of two sets give those of their union.

This is how a mean and a variance over a whole batch are had when the batch is cut into parts or
shared among processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch.distributed
from jaxtyping import Bool, Float
from torch import Tensor


class Moments(NamedTuple):
    """Count, mean and spread of a set of vectors. `join` gives those of two sets together."""

    n: float | Tensor
    """How many vectors; a tensor where they were chosen by a mask."""
    mean: Float[Tensor, " d"]
    spread: Float[Tensor, ""]
    """sum_t |x_t - mean|^2"""

    @classmethod
    def of(
        cls, x: Float[Tensor, "*batch d"], where: Bool[Tensor, "*batch"] | None = None
    ) -> Moments:
        """Return the moments of vectors, or of those that `where` marks, in float32 or better."""
        flat = x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        if where is not None:
            wanted = where.flatten()[:, None]
            n = wanted.sum(dtype=flat.dtype)
            mean = torch.where(wanted, flat, 0.0).sum(0) / n.clamp(min=1)
            return cls(n, mean, torch.where(wanted, flat - mean, 0.0).square_().sum())
        mean = flat.mean(0)  # torch.var_mean over the first axis is much slower on a CPU
        return cls(len(flat), mean, (flat - mean).square_().sum())

    def join(self, other: Moments) -> Moments:
        """Return the moments of both sets as one (Chan et al. 1983), exact but for rounding.

        mean = (n m + n' m') / (n + n'),   spread = s + s' + |m' - m|^2 n n' / (n + n')
        """
        n, away = self.n + other.n, other.mean - self.mean
        of = n.clamp(min=1) if isinstance(n, Tensor) else n
        spread = self.spread + other.spread + away.square().sum() * (self.n * other.n / of)
        return Moments(n, self.mean + away * (other.n / of), spread)


def moments_of(
    targets: Sequence[Float[Tensor, "*batch _"]],
    processes: int = 1,
    where: Sequence[Bool[Tensor, "*batch"] | None] | None = None,
) -> list[Moments]:
    """Return the moments of each target, or of the vectors that its mask in `where` marks.

    With `processes` above 1 every process calls this with its own rows, all with equally many, and
    every one gets the moments of all rows together.
    """
    masks = where or [None] * len(targets)
    return of_all_processes(list(map(Moments.of, targets, masks)), processes)


def of_all_processes(mine: Sequence[Moments], processes: int) -> list[Moments]:
    """Return the moments of the rows of all processes together.

    Every process calls this with the moments of its own rows, all of equally many, of which masks
    may have chosen some.
    """
    if processes == 1:
        return list(mine)
    counts = [torch.as_tensor(m.n).to(m.mean)[None] for m in mine]
    sent = torch.cat(
        [torch.cat([m.mean, m.spread[None], n]) for m, n in zip(mine, counts, strict=True)]
    )
    everyones = [torch.empty_like(sent) for _ in range(processes)]
    torch.distributed.all_gather(everyones, sent)
    per_target = zip(*(x.split([len(m.mean) + 2 for m in mine]) for x in everyones), strict=True)
    return [
        reduce(
            Moments.join,
            (Moments(x[-1] if isinstance(m.n, Tensor) else m.n, x[:-2], x[-2]) for x in parts),
        )
        for m, parts in zip(mine, per_target, strict=True)
    ]
