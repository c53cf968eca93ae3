"""Attention sinks: the tokens whose residual is many times as long as that of the others."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TIMES = 4.0
"""How many times as long as the median of its site a residual must be to be called outlying."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlying:
    """How many tokens are outlying at a site, and how much of its variance they carry."""

    site: int
    tokens: float
    """Share of the tokens whose residual is longer than `TIMES` medians."""
    variance: float
    """Share of the variance that is gone when they are left out."""


def lengths(h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Return |h| of every token, in float32 or better."""
    return h.norm(dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))


def limit_of(h: Float[Tensor, "*batch d"], times: float = TIMES) -> float:
    """Return `times` the median of |h|; infinity where no token is longer, or `times` is 0."""
    long = lengths(h).flatten()
    limit = times * float(long.median())
    return limit if times > 0 and bool((long > limit).any()) else math.inf


@torch.no_grad()
def outlying_tokens(
    dense: Any, ids: Int[Tensor, "batch pos"], times: float = TIMES
) -> list[Outlying]:
    """Return the sites of a dense model at which tokens of a text are outlying.

        |h| > times * median |h|         over the tokens of `ids`

    >>> import torch
    >>> from dense import tiny
    >>> from dense.outlying import outlying_tokens
    >>> outlying_tokens(tiny(), torch.arange(200).view(2, 100))  # none: it was never taught a sink
    []
    """
    found = []
    for site, h in enumerate(dense.residuals(ids)):
        flat = h.flatten(0, 1).double()
        out = lengths(h).flatten() > limit_of(h, times)
        if out.any():
            left = 1 - spread(flat[~out]) / spread(flat)
            found.append(Outlying(site=site, tokens=float(out.double().mean()), variance=left))
    return found


def spread(x: Float[Tensor, "token d"]) -> float:
    """Return sum |x - mean|^2."""
    return float((x - x.mean(0)).square().sum())


def sentence(found: list[Outlying], n_sites: int) -> str:
    """Return what was found, in words."""
    if not found:
        return "outlying tokens: none at any site"
    most = max(found, key=lambda one: one.variance)
    sites = [one.site for one in found]
    return (
        f"outlying tokens (residuals longer than {TIMES:g} medians) at {len(found)} of {n_sites} "
        f"sites, {sites[0]} to {sites[-1]}; at site {most.site} they are {most.tokens:.1%} of the "
        f"tokens and {most.variance:.1%} of the variance: bridges leave them out"
    )
