"""Which dense site is bridged to which sparse site, where the two models differ in depth.

A map pairs dense site d_i with sparse site s_i and keeps their order. It holds every site of the
model with fewer sites, here called the smaller. There are two ways to choose it:

    map     d_1 < d_2 < ..  (dense sites)    s_1 < s_2 < ..  (sparse sites)     strictly monotone
    even    larger_i = round(i (N - 1) / (n - 1))                 n sites of the smaller, N >= n
    fitted  argmin over maps of sum_i cost[d_i, s_i]              over all sites of the smaller

    cost[d, s] = FVU(z_s from h_d) + FVU(h_d from z_s)
    FVU(y from x) = sum_t |y_t - W'x_t - b|^2 / sum_t |y_t - mean y|^2
    W = (C_xx + lambda I)^-1 C_xy,    b = mean y - W' mean x,    lambda = ridge tr(C_xx) / d_x

with C the centred sums of products over the tokens that W is fitted to. FVU is the fraction of
variance unexplained: the cost of a pair is low where each residual is nearly a linear function of
the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.protocol import ResidualModel
from dense.outlying import TIMES, limit_of


def even_sites(n_dense: int, n_sparse: int) -> dict[int, int]:
    """Return {dense site: sparse site}: all sites of the smaller model, spread over the larger's.

        larger_i = round(i (N - 1) / (n - 1)),  i = 0..n-1,  halves rounded to even

    The smaller model is the one with fewer sites, n; the other has N. The first sites are paired,
    and the last ones. Equal numbers of sites give the identity. A dense model of L+1 sites (one per
    block boundary) and a sparse one of 2L+1 give {i: 2i}, so block boundaries meet.

    >>> from bridges import even_sites
    >>> even_sites(n_dense=9, n_sparse=5)  # {dense site: sparse site}
    {0: 0, 2: 1, 4: 2, 6: 3, 8: 4}
    """
    n, larger = sorted((n_dense, n_sparse))
    at = [round(i * (larger - 1) / max(1, n - 1)) for i in range(n)]
    pairs = enumerate(at) if n == n_dense else ((d, i) for i, d in enumerate(at))
    return dict(pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFit:
    """The map of sites of least total cost, the cost of every pair of sites, and the control."""

    sites: dict[int, int]
    """{dense site: sparse site} of least total cost; `BridgeConfig.between` takes it as it is."""
    total: float
    """Sum of the cost over the pairs of `sites`, in fractions of variance."""
    even: dict[int, int]
    """The control: the even map, which has as many pairs."""
    even_total: float
    """Sum of the cost over the pairs of `even`."""
    encoder_fvu: Float[Tensor, "dense_site sparse_site"]
    """Fraction of the sparse residual's variance that the dense one does not explain."""
    decoder_fvu: Float[Tensor, "dense_site sparse_site"]
    """Fraction of the dense residual's variance that the sparse one does not explain."""
    in_sample: bool
    """Whether the fractions were measured on the text that the maps were fitted to. If so they are
    too low."""

    @property
    def cost(self) -> Float[Tensor, "dense_site sparse_site"]:
        """The sum of both fractions, 0 to about 2."""
        return self.encoder_fvu + self.decoder_fvu


@torch.no_grad()
def fit_sites(
    dense: ResidualModel,
    sparse: ResidualModel,
    batches: Iterable[Int[Tensor, "_ _"]],
    heldout: Iterable[Int[Tensor, "_ _"]] | None = None,
    *,
    ridge: float = 1e-4,
    outlying: float = TIMES,
    device: torch.device | str = "cpu",
) -> SiteFit:
    """Return the strictly monotone map of sites with the lowest total cost, exactly.

    The cost (top of this file) comes from ridge regressions between the two models' residuals:
    affine maps, without the AbsTopK that a bridge's encoder has. They are fitted to `batches` and
    their cost is measured on `heldout`, which should be other text. Without `heldout` it is
    measured on `batches`, which favours sites that are wide or have many directions. Use this on a
    sparse model that has been trained: at random weights the fit says little.

    Tokens whose dense residual is `outlying` times as long as the median of a site in the first
    batch, at any site, are left out, as bridges leave them out (`BridgeConfig.outlying`); 0: none.

    Any amount of text takes the same memory: 8 bytes for each pair of a dense and a sparse channel
    at any sites (3.9 GB between 25 sites of 768 and 25 of 1,024), twice that with `heldout`. A
    token costs 2 operations in float64 per such pair. `device` is where the models are. Raises
    ValueError where no text is given, where a residual is constant, and where there is too little
    text for a regression to have one answer.

    >>> from bridges import fit_sites, load_run
    >>> run = load_run("tiny")
    >>> blocks = run.heldout().split(8)
    >>> fit = fit_sites(run.dense, run.sparse, blocks[:2], blocks[2:3])
    >>> fit.sites, fit.total <= fit.even_total
    ({0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, True)
    """
    fitted, frame = _sums(dense, sparse, batches, device, outlying)
    seen = fitted if heldout is None else _sums(dense, sparse, heldout, device, frame)[0]
    encoder = _unexplained(fitted, seen, ridge, "dense")
    decoder = _unexplained(fitted.swapped(), seen.swapped(), ridge, "sparse").T
    cost, even = encoder + decoder, even_sites(dense.n_sites, sparse.n_sites)
    sites = best_map(cost)
    return SiteFit(
        sites=sites,
        total=_total(cost, sites),
        even=even,
        even_total=_total(cost, even),
        encoder_fvu=encoder,
        decoder_fvu=decoder,
        in_sample=heldout is None,
    )


def best_map(cost: Float[Tensor, "dense_site sparse_site"]) -> dict[int, int]:
    """Return the strictly monotone {dense site: sparse site} of least total cost.

        least[i, j] = cost[i, j] + min over j' < j of least[i-1, j']

    The map holds all sites of the side with fewer. It is found by dynamic programming: least[i, j]
    is the least sum over rows 0..i where row i is paired with column j. Raises ValueError for a
    cost that is not finite.
    """
    if not cost.numel() or not cost.isfinite().all():
        raise ValueError(
            f"best_map: a cost of shape {tuple(cost.shape)} must have a finite number for every "
            "pair of sites; give a large one where a pair is not wanted"
        )
    if len(cost) > cost.shape[1]:
        return {d: s for s, d in best_map(cost.T).items()}
    least, came_from = cost[0], []
    for row in cost[1:]:
        before = least.cummin(0)
        came_from.append(before.indices.tolist())
        least = row + torch.cat([row.new_full((1,), torch.inf), before.values[:-1]])
    at = [int(least.argmin())]
    for place in reversed(came_from):
        at.append(place[at[-1] - 1])
    return dict(enumerate(reversed(at)))


def _total(cost: Tensor, sites: dict[int, int]) -> float:
    return sum(float(cost[d, s]) for d, s in sites.items())


@dataclass(slots=True)
class _Sums:
    """Sums over tokens, in float64, from which every regression between two models follows.

    x are the residuals of one model and y those of the other, at all sites. A fixed origin near
    their means is subtracted from both first; otherwise the later subtraction of the mean would
    lose digits.
    """

    n: int
    x: Tensor  # site d
    y: Tensor
    xx: Tensor  # site d d
    yy: Tensor
    xy: Tensor  # site_x d site_y d

    def swapped(self) -> _Sums:
        return _Sums(self.n, self.y, self.x, self.yy, self.xx, self.xy.permute(2, 3, 0, 1))

    def add(self, x: Tensor, y: Tensor) -> None:  # site token d
        self.n += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.xx += x.mT @ x
        self.yy += y.mT @ y
        flat_x, flat_y = (v.transpose(0, 1).flatten(1) for v in (x, y))  # token site*d
        self.xy += (flat_x.T @ flat_y).view_as(self.xy)

    def about(self, i: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centred sums of products: xx of site i, and xy of site i with every site.

        x and y are the means to centre about.
        """
        xx = self.xx[i] - _outer(self.x[i], x[i]) - _outer(x[i], self.x[i] - self.n * x[i])
        xy = self.xy[i] - _outer(self.x[i], y) - _outer(x[i], self.y - self.n * y)
        return xx, xy


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return torch.tensordot(a, b, dims=0)


class _Frame(NamedTuple):
    """What the first batch decides for all others."""

    limits: Float[Tensor, "site 1"]
    """Lengths of the dense residuals of each site above which a token is outlying."""
    origins: tuple[Tensor, Tensor]
    """Points near the mean of each site (site 1 d), dense and sparse."""

    def ordinary(self, x: Float[Tensor, "site token d"]) -> Bool[Tensor, " token"]:
        """Return which tokens are outlying at no site."""
        return (x.norm(dim=-1) <= self.limits).all(0)


def _frame(x: Tensor, y: Tensor, outlying: float) -> _Frame:
    limits = x.new_tensor([[limit_of(h, outlying)] for h in x])
    keep = _Frame(limits, (x, y)).ordinary(x)
    return _Frame(limits, (x[:, keep].mean(1, keepdim=True), y[:, keep].mean(1, keepdim=True)))


def _sums(
    dense: ResidualModel,
    sparse: ResidualModel,
    batches: Iterable[Tensor],
    device: torch.device | str,
    frame: _Frame | float,
) -> tuple[_Sums, _Frame]:
    """Return the sums over the batches and their frame; a number is m, of which one is made."""
    sums = None
    for ids in batches:
        models, ids = (dense, sparse), ids.to(device)
        x, y = (torch.stack(m.residuals(ids)).flatten(1, 2).double() for m in models)
        if not isinstance(frame, _Frame):
            frame = _frame(x, y, frame)
        if sums is None:
            (a, _, b), (c, _, d) = x.shape, y.shape
            shapes = (a, b), (c, d), (a, b, b), (c, d, d), (a, b, c, d)
            sums = _Sums(0, *(x.new_zeros(shape) for shape in shapes))
        keep = frame.ordinary(x)
        sums.add((x - frame.origins[0])[:, keep], (y - frame.origins[1])[:, keep])
    if sums is None or not isinstance(frame, _Frame):
        raise ValueError("fit_sites: no batch of text; give some, as a list if they are used again")
    return sums, frame


def _unexplained(fitted: _Sums, seen: _Sums, ridge: float, side: str) -> Tensor:
    """Return the FVU of every y from every x, (site_x, site_y).

    The linear maps are fitted to the sums `fitted` and measured on the sums `seen`.
    """
    mean_x, mean_y = fitted.x / fitted.n, fitted.y / fitted.n
    square = seen.yy.diagonal(dim1=1, dim2=2).sum(-1)
    spread = square - seen.y.square().sum(-1) / seen.n  # about its own mean
    error = square - (mean_y * (2 * seen.y - seen.n * mean_y)).sum(-1)  # about the fitted one
    rows = []
    for i in range(len(mean_x)):
        xx, xy = fitted.about(i, mean_x, mean_y)
        d = len(xx)
        lift = ridge * xx.diagonal().mean() * torch.eye(d).to(xx)
        root, failed = torch.linalg.cholesky_ex(xx + lift)
        if failed or not (spread > 0).all() or not (ridge or fitted.n > d):
            raise ValueError(
                f"fit_sites: {fitted.n} tokens do not tell apart the {d} channels of {side} site "
                f"{i}, or a residual is constant; give more text, or a ridge above {ridge}"
            )
        w = torch.cholesky_solve(xy.flatten(1), root).view_as(xy)  # d site_y d_y
        if seen is not fitted:
            xx, xy = seen.about(i, mean_x, mean_y)
        explained = (w * (2 * xy - torch.tensordot(xx, w, dims=1))).sum((0, 2))
        rows.append((error - explained) / spread)
    return torch.stack(rows)
