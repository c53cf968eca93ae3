"""How much of each model the bridges carry over, beside bridges that were never trained.

    encoder FVU  sum |encode(h) - z|^2 / sum |z - mean z|^2     fraction, 1 as bad as the mean
    decoder FVU  sum |decode(z) - h|^2 / sum |h - mean h|^2
    up           KL(dense || sparse resumed from encode(h))     nats per token
    down         KL(dense || dense resumed from decode(z))

Site s of a row is the dense site of a bridge: h is the dense residual there, z the sparse one at
the sparse site it is bridged to, and the two models are resumed at these (`BridgeConfig`).
Sums run over every position of the blocks; means over the blocks, the independent unit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bridges.losses.quantities import ce_nats, kl_nats
from bridges.maps.bridge import BridgeSet
from evals.scores.paired import paired
from evals.scores.score import Score, Unit

UNTRAINED = "untrained bridges"
UNIGRAM = "unigram frequencies of the same text"


class Moments(NamedTuple):
    """Of the residuals of every block: what their spread about any mean is made of."""

    square: Float[Tensor, " batch"]
    """sum over positions of |x|^2"""
    total: Float[Tensor, "batch d"]
    """sum over positions of x"""

    @classmethod
    def of(cls, x: Float[Tensor, "batch pos d"]) -> Moments:
        x = x.double()
        return cls(x.square().sum((1, 2)).cpu(), x.sum(1).cpu())

    def about_the_mean(self, n_pos: int) -> Float[Tensor, " batch"]:
        """Return per block sum |x - mean|^2, the mean being over all blocks."""
        mean = self.total.sum(0) / (n_pos * len(self.total))
        return self.square - 2 * self.total @ mean + n_pos * mean.square().sum()


class SiteSums(NamedTuple):
    """What one bridged site gives, per block; the trained bridges lead, then the untrained."""

    encoder_error: Float[Tensor, "set batch"]
    """sum over positions of |encode(h) - z|^2"""
    decoder_error: Float[Tensor, "set batch"]
    """sum over positions of |decode(z) - h|^2"""
    up: Float[Tensor, "set batch"]
    """Mean KL of the hybrids dense to sparse, nats per token."""
    down: Float[Tensor, "set batch"]
    """Mean KL of the hybrids sparse to dense, nats per token."""
    up_ce: Float[Tensor, "set batch"]
    """Their cross entropies, nats per token."""
    down_ce: Float[Tensor, "set batch"]


class ModelMeans(NamedTuple):
    """What both models and the unigram frequencies are worth, per block, nats per token."""

    dense: Float[Tensor, " batch"]
    """Cross entropy."""
    sparse: Float[Tensor, " batch"]
    unigram: Float[Tensor, " batch"]
    kl: Float[Tensor, " batch"]
    """KL(dense || sparse)"""
    kl_unigram: Float[Tensor, " batch"]
    """KL(dense || unigram)"""


class Measured(NamedTuple):
    """Everything the rows are made of, on some blocks."""

    models: ModelMeans
    sites: dict[int, SiteSums]
    """By the dense site of the bridge."""
    h: dict[int, Moments]
    z: dict[int, Moments]
    """Of the sparse residual that the bridge's dense site stands for."""


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
    """Score the bridges of `run` (dense, sparse, bridges) on held-out blocks of text.

    Per bridged site the four measures above, each beside `draws` untrained bridges of the same
    config, centring and scale; then both models' cross entropy, KL(dense || sparse) and the loss
    the hybrids recover, beside the unigram frequencies of the same text. Where the dense model is
    no better than these, there is no loss to recover and those rows are left out. Raises ValueError
    for fewer than two blocks.

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
    unigram = _unigram(blocks, run.dense.vocab_size)
    parts: list[Measured] = []
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="bridges", disable=not progress, leave=False):
        ids = blocks[start : start + batch_size].to(run.dense.device)
        parts.append(_measure(run, sets, ids, unigram))
    data = _joined(parts)
    rows = [row for s in data.sites for row in _site_rows(data, s, blocks.shape[1], seed)]
    return rows + _model_rows(data, seed)


def untrained(bridges: BridgeSet, seed: int) -> BridgeSet:
    """Return bridges of the same config, centring and scale (the buffers) with fresh weights."""
    fresh = BridgeSet(bridges.config, seed=seed)
    fresh.load_state_dict(dict(bridges.named_buffers()), strict=False)
    return fresh.to(bridges.mean.device).eval()


def _measure(run: Any, sets: list[BridgeSet], ids: Tensor, unigram: Tensor) -> Measured:
    """Return, per block of `ids`, every sum and mean the rows need."""
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
    """Return what every set of bridges gave at one site, the sets along the first axis."""
    return SiteSums(*(_kept(torch.stack(values)) for values in zip(*each, strict=True)))


def _kept(x: Tensor) -> Tensor:
    return x.cpu().double()


def _crossed(
    run: Any, bridges: BridgeSet, h: list[Tensor], z: list[Tensor], y: Tensor, ids: Tensor
) -> dict[int, tuple[Tensor, ...]]:
    """Return, per site and block, what crossing the bridges of one set costs: `SiteSums` of a set.

    One joined pass through either model serves all sites.
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
    """Return the measurements of all blocks as one; blocks are the last axis, but of moments."""
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
    """Score one bridge: two fractions of variance, weighted by it, and two KLs."""
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
    """Score both models and, where there is a loss to recover, the hybrids' share of it."""
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
        return rows  # nothing between the two to recover, and no fraction of it
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


def _unigram(blocks: Int[Tensor, "batch pos"], vocab_size: int) -> Float[Tensor, " vocab"]:
    """Log frequencies of the tokens of the blocks, each counted once more than it occurs."""
    return (blocks.flatten().cpu().bincount(minlength=vocab_size) + 1).double().log().float()
