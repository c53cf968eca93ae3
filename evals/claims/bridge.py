"""Measure how much of each model the bridges carry over, beside bridges that were never trained.

    encoder FVU  sum |encode(h) - z|^2 / sum |z - mean z|^2     fraction, 1 as bad as the mean
    decoder FVU  sum |decode(z) - h|^2 / sum |h - mean h|^2
    up           KL(dense || sparse resumed from encode(h))     nats per token
    down         KL(dense || dense resumed from decode(z))

A report's "site s" is the dense site of a bridge. h is the dense residual there and z the sparse
residual at the sparse site that s is bridged to (`BridgeConfig`); a hybrid resumes the other model
at its site of the bridge. A block is a stretch of held-out text. Sums run over all positions of a
block; blocks are the independent unit of means and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bridges.losses.quantities import ce_nats, kl_nats
from bridges.maps.bridge import BridgeSet
from evals.scores.paired import paired
from evals.scores.score import Score, Unit
from sparse.ops.prefix import counted

UNTRAINED = "untrained bridges"
UNIGRAM = "unigram frequencies of the same text"


class Moments(NamedTuple):
    """Sums of the residuals of every block, from which their spread about any mean follows."""

    square: Float[Tensor, " batch"]
    """sum over positions of |x|^2"""
    total: Float[Tensor, "batch d"]
    """sum over positions of x"""

    @classmethod
    def of(cls, x: Float[Tensor, "batch pos d"]) -> Moments:
        x = x.double()
        return cls(x.square().sum((1, 2)).cpu(), x.sum(1).cpu())

    def about_the_mean(self, n_pos: int) -> Float[Tensor, " batch"]:
        """Return, for every block, sum |x - mean|^2, where the mean is that of all blocks."""
        mean = self.total.sum(0) / (n_pos * len(self.total))
        return self.square - 2 * self.total @ mean + n_pos * mean.square().sum()


class SiteSums(NamedTuple):
    """What is measured at one bridged site, per block, for every set of bridges.

    The first set is the trained bridges; the others are untrained.
    """

    encoder_error: Float[Tensor, "set batch"]
    """sum over positions of |encode(h) - z|^2"""
    decoder_error: Float[Tensor, "set batch"]
    """sum over positions of |decode(z) - h|^2"""
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

    The unigram frequencies predict every token by how often it occurs in all blocks.
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
    h: dict[int, Moments]
    """Sums of the dense residual at that site."""
    z: dict[int, Moments]
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
    control is the unigram frequencies of the same text, in which the first token of `run.prefix` is
    not counted (where `run` has a prefix). Where the dense model is no better than these there is
    no loss to recover, and those rows are left out. Raises ValueError for fewer than two blocks,
    and for blocks that do not begin with the prefix.

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
    unigram = _unigram(blocks, run.dense.vocab_size, getattr(run, "prefix", ()))
    parts: list[Measured] = []
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="bridges", disable=not progress, leave=False):
        ids = blocks[start : start + batch_size].to(run.dense.device)
        parts.append(_measure(run, sets, ids, unigram))
    data = _joined(parts)
    rows = [row for s in data.sites for row in _site_rows(data, s, blocks.shape[1], seed)]
    return rows + _model_rows(data, seed)


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
        h={s: Moments.of(h[s]) for s in pairs},
        z={s: Moments.of(z[t]) for s, t in pairs.items()},
    )


def _of_all_sets(each: list[tuple[Tensor, ...]]) -> SiteSums:
    """Return what all sets of bridges gave at one site, stacked along a first axis."""
    return SiteSums(*(_kept(torch.stack(values)) for values in zip(*each, strict=True)))


def _kept(x: Tensor) -> Tensor:
    return x.cpu().double()


def _crossed(
    run: Any, bridges: BridgeSet, h: list[Tensor], z: list[Tensor], y: Tensor, ids: Tensor
) -> dict[int, tuple[Tensor, ...]]:
    """Return the fields of `SiteSums`, by site, for one set of bridges.

    One joined pass through each model serves all sites.
    """
    pairs, out = bridges.config.pairs, {}
    up = {s: bridges.encode(s, h[s]) for s in pairs}
    down = {s: bridges.decode(s, z[t]) for s, t in pairs.items()}
    to_sparse = run.sparse.joined(
        {pairs[s]: x for s, x in up.items()}, dict.fromkeys(pairs.values(), ids)
    )
    to_dense = run.dense.joined(down, dict.fromkeys(pairs, ids))
    for s, t in pairs.items():
        ended_up = run.sparse.unembed(to_sparse[t], ids)
        ended_down = run.dense.unembed(to_dense[s], ids)
        out[s] = (
            (up[s] - z[t]).square().sum((1, 2)),
            (down[s] - h[s]).square().sum((1, 2)),
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

    def moments(of: list[dict[int, Moments]]) -> dict[int, Moments]:
        return {
            s: Moments(*(torch.cat(x) for x in zip(*(p[s] for p in of), strict=True)))
            for s in sites
        }

    return Measured(
        models=ModelMeans(*(torch.cat(x) for x in zip(*(p.models for p in parts), strict=True))),
        sites={
            s: SiteSums(*(torch.cat(x, -1) for x in zip(*(p.sites[s] for p in parts), strict=True)))
            for s in sites
        },
        h=moments([p.h for p in parts]),
        z=moments([p.z for p in parts]),
    )


def _site_rows(data: Measured, s: int, n_pos: int, seed: int) -> list[Score]:
    """Return the four scores of one bridge: two FVUs and two KLs.

    The FVU of all blocks is the mean of the blocks' own FVUs, weighted by their variance.
    """
    site = data.sites[s]
    of_z, of_h = data.z[s].about_the_mean(n_pos), data.h[s].about_the_mean(n_pos)

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

    nats: Unit = "nats per token"
    return [
        row("encoder_fvu", "encoder FVU", "fraction", site.encoder_error / of_z, of_z),
        row("decoder_fvu", "decoder FVU", "fraction", site.decoder_error / of_h, of_h),
        row("up", "KL, dense to sparse", nats, site.up),
        row("down", "KL, sparse to dense", nats, site.down),
    ]


def _model_rows(data: Measured, seed: int) -> list[Score]:
    """Return the scores of both models, and the share of the loss that the hybrids recover.

        (CE_unigram - CE_hybrid) / (CE_unigram - CE_dense)      mean over sites, each direction

    Where the dense model is no better than unigrams the last two are left out.
    """
    m = data.models

    def row(key: str, name: str, values: Tensor, control: Tensor, **more: Any) -> Score:
        given = {"unit": "nats per token", "control_name": UNIGRAM, "better": "lower", "seed": seed}
        return paired(name, values, control[None], key=f"bridge.{key}", **{**given, **more})

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


def _unigram(
    blocks: Int[Tensor, "batch pos"], vocab_size: int, prefix: Sequence[int] = ()
) -> Float[Tensor, " vocab"]:
    """Return logits that predict every token by how often it occurs in the blocks.

    They are the logarithms of the counts; each token is counted once more than it occurs. The first
    token of a prefix, which nothing predicts, is not counted.
    """
    return (counted(blocks, prefix).bincount(minlength=vocab_size) + 1).double().log().float()
