"""Measure how much of each model the bridges carry over, beside bridges that were never trained.

    encoder FVU  sum |encode(h) - z|^2 / sum |z - mean z|^2     fraction, 1 as bad as the mean
    decoder FVU  sum |decode(z) - h|^2 / sum |h - mean h|^2
    up           KL(dense || sparse resumed from encode(h))     nats per token
    down         KL(dense || dense resumed from decode(z))

FVUs are over the tokens that are not outlying at the site (`BridgeSet`); an outlying token passes
through the hybrids. Where a site has such tokens, both FVUs are given over all tokens too, beside
those of a predictor that knows one bit, which tokens are outlying, and the two means.

A report's "site s" is the dense site of a bridge. h is the dense residual there and z the sparse
residual at the sparse site that s is bridged to (`BridgeConfig`); a hybrid resumes the other model
at its site of the bridge. A block is a stretch of held-out text. Sums run over all positions of a
block; blocks are the independent unit of means and errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from bridges.losses.quantities import ce_nats, kl_nats
from bridges.maps.bridge import BridgeSet, through
from evals.scores.paired import paired
from evals.scores.score import Score, Unit
from sparse.ops.prefix import count_tokens

UNTRAINED = "untrained bridges"
UNIGRAM = "unigram frequencies of the training text"
UNIGRAM_SAME = "unigram frequencies of the same text"
"""The control in runs that did not keep the counts of their training text."""
ON_CPU = 1e13
"""Floating point operations that measuring the bridges may take on a CPU, a few minutes."""
LEAST_BLOCKS = 4
ONE_BIT = "a predictor that knows only which tokens are outlying"


class Moments(NamedTuple):
    """Sums of the residuals of every block, from which their spread about any mean follows."""

    n: Float[Tensor, " batch"]
    """Number of tokens."""
    square: Float[Tensor, " batch"]
    """sum over tokens of |x|^2"""
    total: Float[Tensor, "batch d"]
    """sum over tokens of x"""

    @classmethod
    def of(cls, x: Float[Tensor, "batch pos d"], where: Bool[Tensor, "batch pos"]) -> Moments:
        """Return the sums over the tokens that `where` marks."""
        x = x.double() * where[..., None]
        return cls(where.sum(1).double().cpu(), x.square().sum((1, 2)).cpu(), x.sum(1).cpu())

    def join(self, other: Moments) -> Moments:
        """Return the sums over the tokens of both, of the same blocks."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def about_the_mean(self) -> Float[Tensor, " batch"]:
        """Return, for every block, sum |x - mean|^2, where the mean is that of all blocks."""
        mean = self.total.sum(0) / self.n.sum().clamp(min=1)
        return self.square - 2 * self.total @ mean + self.n * mean.square().sum()


class Parted(NamedTuple):
    """Sums of the residuals of ordinary and of outlying tokens."""

    ordinary: Moments
    outlying: Moments

    def all(self) -> Moments:
        """Return the sums over all tokens."""
        return self.ordinary.join(self.outlying)

    def one_bit(self) -> Float[Tensor, " batch"]:
        """Return the squared error of the two means, for one who knows which token is which."""
        return self.ordinary.about_the_mean() + self.outlying.about_the_mean()

    def facts(self) -> dict[str, float]:
        """Return how many tokens are outlying, and how much of the variance they carry."""
        about = float(self.all().about_the_mean().sum())
        return {
            "outlying tokens": float(self.outlying.n.sum() / self.all().n.sum()),
            "variance that they carry": 1 - float(self.ordinary.about_the_mean().sum()) / about,
        }


class SiteSums(NamedTuple):
    """What is measured at one bridged site, per block, for every set of bridges.

    The first set is the trained bridges; the others are untrained.
    """

    encoder_error: Float[Tensor, "set batch"]
    """sum over ordinary tokens of |encode(h) - z|^2"""
    decoder_error: Float[Tensor, "set batch"]
    """sum over ordinary tokens of |decode(z) - h|^2"""
    encoder_error_all: Float[Tensor, "set batch"]
    """The same over all tokens."""
    decoder_error_all: Float[Tensor, "set batch"]
    """The same over all tokens."""
    up: Float[Tensor, "set batch"]
    """Mean KL of the hybrids dense to sparse, nats per token."""
    down: Float[Tensor, "set batch"]
    """Mean KL of the hybrids sparse to dense, nats per token."""
    up_ce: Float[Tensor, "set batch"]
    """Cross entropy of the hybrids dense to sparse, nats per token."""
    down_ce: Float[Tensor, "set batch"]
    """Cross entropy of the hybrids sparse to dense, nats per token."""


class ModelMeans(NamedTuple):
    """Cross entropies and KLs of both models and of unigram frequencies, per block, nats per token.

    The unigram frequencies predict every token by how often it occurs in the training text.
    """

    dense: Float[Tensor, " batch"]
    """Cross entropy of the dense model."""
    sparse: Float[Tensor, " batch"]
    """Cross entropy of the sparse model."""
    unigram: Float[Tensor, " batch"]
    """Cross entropy of the unigram frequencies."""
    kl: Float[Tensor, " batch"]
    """KL(dense || sparse)"""
    kl_unigram: Float[Tensor, " batch"]
    """KL(dense || unigram)"""


class Measured(NamedTuple):
    """Everything that the rows of the report are computed from, on some blocks.

    The dicts are by the dense site of the bridge.
    """

    models: ModelMeans
    sites: dict[int, SiteSums]
    h: dict[int, Parted]
    """Sums of the dense residual at that site."""
    z: dict[int, Parted]
    """Sums of the sparse residual at the sparse site that it is bridged to."""


@torch.no_grad()
def evaluate_bridge(
    run: Any,
    blocks: Int[Tensor, "batch pos"],
    *,
    draws: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[Score]:
    """Return the scores of the bridges of `run` (dense, sparse, bridges) on held-out blocks.

    For every bridged site there are the four measures at the top of this file. Their control is
    `draws` sets of untrained bridges of the same config, centring and scale. Then come both models'
    cross entropy, KL(dense || sparse) and the share of the loss that the hybrids recover. Their
    control is the unigram frequencies of the training text (`run.token_counts`), or of the blocks
    themselves where the run kept none; the first token of `run.prefix` is not counted. Where the
    dense model is no better than these there is no loss to recover, and those rows are left out.
    Raises ValueError for fewer than two blocks, and for blocks that do not begin with the prefix.

    >>> from bridges import load_run
    >>> from evals import evaluate_bridge
    >>> run = load_run("tiny")
    >>> rows = evaluate_bridge(run, run.heldout()[:4], draws=1)
    >>> rows[0].name, rows[0].unit, rows[0].outcome
    ('site 0: encoder FVU', 'fraction', 'beats')
    """
    if len(blocks) < 2:
        raise ValueError(f"evaluate_bridge: {len(blocks)} block; an error needs at least 2")
    run.bridges.check(run.dense, run.sparse)
    sets: list[BridgeSet] = [run.bridges, *(untrained(run.bridges, seed + i) for i in range(draws))]
    counts = run.token_counts() if hasattr(run, "token_counts") else None
    control = UNIGRAM_SAME if counts is None else UNIGRAM
    if counts is None:
        counts = count_tokens(blocks, run.dense.vocab_size, getattr(run, "prefix", ()))
    unigram = (counts + 1).double().log().float()  # logits; each counts once more than it occurs
    parts: list[Measured] = []
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="bridges", disable=not progress, leave=False):
        ids = blocks[start : start + batch_size].to(run.dense.device)
        parts.append(_measure(run, sets, ids, unigram))
    data = _joined(parts)
    rows = [row for s in data.sites for row in _site_rows(data, s, seed)]
    return rows + _model_rows(data, control, seed)


def affordable(run: Any, blocks: Int[Tensor, "block pos"]) -> Int[Tensor, "_ pos"]:
    """Return the first held-out blocks on which the bridges are measured: on a GPU all of them.

        n = ON_CPU / (T 2 (P + p) 4 (2 + S) / 2)       at least LEAST_BLOCKS

    A block of T tokens passes through both models, of P and p parameters, with the trained bridges
    and three sets of untrained ones, and on average through half of each for every one of S
    bridges.
    """
    if run.dense.device.type != "cpu":
        return blocks
    parameters = run.dense.model.num_parameters() + run.sparse.num_parameters()
    of_one = blocks.shape[1] * 4 * parameters * (2 + len(run.bridges.config.sites))
    return blocks[: max(LEAST_BLOCKS, int(ON_CPU / of_one))]


def untrained(bridges: BridgeSet, seed: int) -> BridgeSet:
    """Return bridges with fresh random weights and the same config, centring and scale."""
    fresh = BridgeSet(bridges.config, seed=seed)
    fresh.load_state_dict(dict(bridges.named_buffers()), strict=False)
    return fresh.to(bridges.mean.device).eval()


def _measure(run: Any, sets: list[BridgeSet], ids: Tensor, unigram: Tensor) -> Measured:
    """Return every sum and mean that the rows need, per block of `ids`."""
    h, z = run.dense.residuals(ids), run.sparse.residuals(ids)
    y, own = run.dense.unembed(h[-1], ids), run.sparse.unembed(z[-1], ids)
    flat = unigram.to(y.device).expand_as(y)
    pairs = run.bridges.config.pairs
    crossed = [_crossed(run, bridges, h, z, y, ids) for bridges in sets]
    return Measured(
        models=ModelMeans(
            dense=_kept(ce_nats(y, ids).mean(-1)),
            sparse=_kept(ce_nats(own, ids).mean(-1)),
            unigram=_kept(ce_nats(flat, ids).mean(-1)),
            kl=_kept(kl_nats(y, own).mean(-1)),
            kl_unigram=_kept(kl_nats(y, flat).mean(-1)),
        ),
        sites={s: _of_all_sets([of_set[s] for of_set in crossed]) for s in pairs},
        h={s: _parted(h[s], run.bridges.ordinary(s, h[s])) for s in pairs},
        z={s: _parted(z[t], run.bridges.ordinary(s, h[s])) for s, t in pairs.items()},
    )


def _parted(x: Tensor, ordinary: Tensor | None) -> Parted:
    if ordinary is None:
        ordinary = torch.ones_like(x[..., 0], dtype=torch.bool)
    return Parted(Moments.of(x, ordinary), Moments.of(x, ~ordinary))


def _of_all_sets(each: list[tuple[Tensor, ...]]) -> SiteSums:
    """Return what all sets of bridges gave at one site, stacked along a first axis."""
    return SiteSums(*(_kept(torch.stack(values)) for values in zip(*each, strict=True)))


def _kept(x: Tensor) -> Tensor:
    return x.cpu().double()


def _crossed(
    run: Any,
    bridges: BridgeSet,
    h: list[Tensor],
    z: list[Tensor],
    y: Tensor,
    ids: Tensor,
) -> dict[int, tuple[Tensor, ...]]:
    """Return the fields of `SiteSums`, by site, for one set of bridges.

    One joined pass through each model serves all sites.
    """
    pairs, out = bridges.config.pairs, {}
    up = {s: bridges.encode(s, h[s]) for s in pairs}
    down = {s: bridges.decode(s, z[t]) for s, t in pairs.items()}
    masks = {s: bridges.ordinary(s, h[s]) for s in pairs}
    for s, t in pairs.items():
        errors = [(up[s] - z[t]).square().sum(2), (down[s] - h[s]).square().sum(2)]
        ordinary = masks[s]
        counted = errors if ordinary is None else [x * ordinary for x in errors]
        out[s] = tuple(x.sum(1) for x in (*counted, *errors))
    to_sparse = run.sparse.joined(
        {t: through(up[s], masks[s], z[t]) for s, t in pairs.items()},
        dict.fromkeys(pairs.values(), ids),
    )
    to_dense = run.dense.joined(
        {s: through(down[s], masks[s], h[s]) for s in pairs}, dict.fromkeys(pairs, ids)
    )
    for s, t in pairs.items():
        ended_up = run.sparse.unembed(to_sparse[t], ids)
        ended_down = run.dense.unembed(to_dense[s], ids)
        out[s] += (
            kl_nats(y, ended_up).mean(-1),
            kl_nats(y, ended_down).mean(-1),
            ce_nats(ended_up, ids).mean(-1),
            ce_nats(ended_down, ids).mean(-1),
        )
    return out


def _joined(parts: list[Measured]) -> Measured:
    """Return the measurements of several batches of blocks as one, concatenated over blocks.

    The axis of blocks is the last one, in `Moments` the first.
    """
    sites = list(parts[0].sites)

    def joined(of: list[Moments]) -> Moments:
        return Moments(*(torch.cat(x) for x in zip(*of, strict=True)))

    def parted(of: list[dict[int, Parted]]) -> dict[int, Parted]:
        return {
            s: Parted(joined([p[s].ordinary for p in of]), joined([p[s].outlying for p in of]))
            for s in sites
        }

    return Measured(
        models=ModelMeans(*(torch.cat(x) for x in zip(*(p.models for p in parts), strict=True))),
        sites={
            s: SiteSums(*(torch.cat(x, -1) for x in zip(*(p.sites[s] for p in parts), strict=True)))
            for s in sites
        },
        h=parted([p.h for p in parts]),
        z=parted([p.z for p in parts]),
    )


def _site_rows(data: Measured, s: int, seed: int) -> list[Score]:
    """Return the four scores of one bridge, two FVUs and two KLs, and the FVUs over all tokens.

    The FVU of all blocks is the mean of the blocks' own FVUs, weighted by their variance. Those
    over all tokens are given where some are outlying.
    """
    site = data.sites[s]
    of_z, of_h = (x[s].ordinary.about_the_mean() for x in (data.z, data.h))

    def row(key: str, name: str, unit: Unit, x: Tensor, weights: Tensor | None = None) -> Score:
        return paired(
            f"site {s}: {name}",
            x[0],
            x[1:],
            key=f"bridge.site.{s}.{key}",
            weights=weights,
            unit=unit,
            control_name=UNTRAINED,
            better="lower",
            seed=seed,
        )

    def over_all(key: str, name: str, error: Tensor, of: Parted) -> Score:
        about = of.all().about_the_mean()
        return paired(
            f"site {s}: {name} over all tokens",
            error[0] / about,
            (of.one_bit() / about)[None],
            key=f"bridge.site.{s}.{key}.all",
            weights=about,
            unit="fraction",
            control_name=ONE_BIT,
            better="lower",
            detail=of.facts(),
            seed=seed,
        )

    nats: Unit = "nats per token"
    rows = [
        row("encoder_fvu", "encoder FVU", "fraction", site.encoder_error / of_z, of_z),
        row("decoder_fvu", "decoder FVU", "fraction", site.decoder_error / of_h, of_h),
        row("up", "KL, dense to sparse", nats, site.up),
        row("down", "KL, sparse to dense", nats, site.down),
    ]
    if data.h[s].outlying.n.any():
        rows += [
            over_all("encoder_fvu", "encoder FVU", site.encoder_error_all, data.z[s]),
            over_all("decoder_fvu", "decoder FVU", site.decoder_error_all, data.h[s]),
        ]
    return rows


def _model_rows(data: Measured, control_name: str, seed: int) -> list[Score]:
    """Return the scores of both models, and the share of the loss that the hybrids recover.

        (CE_unigram - CE_hybrid) / (CE_unigram - CE_dense)      mean over sites, each direction

    Where the dense model is no better than unigrams the last two are left out.
    """
    m = data.models

    def row(key: str, name: str, values: Tensor, control: Tensor, **more: Any) -> Score:
        given: dict[str, Any] = {
            "unit": "nats per token",
            "control_name": control_name,
            "better": "lower",
        }
        given |= {"key": f"bridge.{key}", "seed": seed}
        return paired(name, values, control[None], **{**given, **more})

    rows = [
        row("ce.dense", "cross entropy, dense", m.dense, m.unigram),
        row("ce.sparse", "cross entropy, sparse", m.sparse, m.unigram),
        row("kl", "KL(dense || sparse)", m.kl, m.kl_unigram),
    ]
    if (m.unigram - m.dense).sum() <= 0:
        return rows  # the dense model is no better than unigrams, so there is no loss to recover
    room = (m.unigram - m.dense).clamp(min=1e-6)
    ways = {
        "up": ("dense to sparse", {s: site.up_ce[0] for s, site in data.sites.items()}),
        "down": ("sparse to dense", {s: site.down_ce[0] for s, site in data.sites.items()}),
    }
    for way, (name, ce) in ways.items():
        each = {s: (m.unigram - x) / room for s, x in ce.items()}
        total = room.sum()
        detail = {f"site {s}": float((room * x).sum() / total) for s, x in each.items()}
        mean = torch.stack(list(each.values())).mean(0)
        more = {"unit": "fraction", "better": "higher", "weights": room, "detail": detail}
        none = torch.zeros_like(mean)
        rows.append(row(f"recovered.{way}", f"loss recovered, {name}", mean, none, **more))
    return rows
