"""Hybrid passes: run one model up to a site, cross the bridge, run the other model from there.

    dense to sparse at s:   KL( dense(ids) || sparse resumed at t from encode_s(h_s) )
    sparse to dense at s:   KL( dense(ids) || dense resumed at s from decode_s(z_t) )

Bridge s joins dense site s and sparse site t = pairs[s] (`BridgeConfig`), which is s where the
models are equally deep. Both KLs are in nats per token (Gao et al. 2025, section 3.3, L_KL).

A token that is outlying at s (`BridgeSet`) does not cross: in the first direction it enters with
its own z_t, in the second with its own h_s.

The passes of all sites run as one pass, whose batch grows on the way: the rows that cross at site s
are appended to it there and stay to the end (docs/method.md#hybrid-passes). To save time, a
training step may draw at random at which sites each sequence crosses and at which positions the KLs
are taken; the draws are made so that the means stay unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.losses.chunked import Stream, StreamLoss, score_streams
from bridges.maps.bridge import BridgeSet, through
from bridges.protocol import ResidualModel
from sparse.model.gpt import SparseGPT
from sparse.ops.seeds import seed_of


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key, n_bytes=4))


def draw_sites(
    sites: tuple[int, ...], n_sequences: int, step: int, seed: int, m: int = 1
) -> Int[Tensor, "batch draw"]:
    """Draw `m` different sites for every sequence, each uniform over `sites`.

    Draw j of sequence b is sites[(u + m b + j) mod S], with S sites and one u drawn uniformly for
    the batch from (seed, step). Every draw is uniform over the sites, so the mean over all draws is
    an unbiased mean over sites. Because the sites are dealt out in turn, the counts are even too:
    of any two sites, one is drawn at most once more often than the other.
    """
    if not 1 <= m <= len(sites):
        raise ValueError(f"draw_sites: {m} sites per sequence of {len(sites)}; draw 1 to all")
    start = torch.randint(len(sites), (), generator=_generator(seed, step))
    at = (start + torch.arange(n_sequences * m)) % len(sites)
    return torch.tensor(sites)[at].view(n_sequences, m)


def draw_positions(
    n_sequences: int, n_pos: int, fraction: float, step: int, seed: int
) -> Int[Tensor, "batch drawn"]:
    """Draw round(fraction * n_pos) positions of every sequence, at least one, without repetition.

    The draw is a pure function of (seed, step), and each row is ascending. Every position is
    equally likely, so the mean over the drawn ones is an unbiased mean over all.
    """
    n = max(1, round(fraction * n_pos))
    noise = torch.rand(n_sequences, n_pos, generator=_generator(seed, step, "positions"))
    return noise.argsort(-1)[:, :n].sort(-1).values


def drawn_first(positions: Int[Tensor, "batch drawn"], n_pos: int) -> Int[Tensor, " token"]:
    """Return the index of every token of the flattened batch, those at `positions` first."""
    taken = torch.zeros(len(positions), n_pos, dtype=torch.bool).scatter_(1, positions, True)
    return (~taken).flatten().int().argsort(stable=True)


def _sent(index: Tensor, like: Tensor) -> Tensor:
    """Return `index` on the device of `like`, for which the host does not wait."""
    return index.to(like.device, non_blocking=True)


class Crossing(NamedTuple):
    """The residuals of a co-training step and where the hybrid passes ended."""

    h: list[Float[Tensor, "batch pos d_dense"]]
    """Residuals of the dense model at every dense site; constants, without gradient."""
    z: list[Float[Tensor, "batch pos d_sparse"]]
    """Residuals of the sparse model at every sparse site."""
    up: dict[int, Float[Tensor, "batch pos d_sparse"]]
    """Encoded h, by the dense site of the bridge: up[s] is the encoder's guess at z[pairs[s]]."""
    down: dict[int, Float[Tensor, "batch pos d_dense"]]
    """Decoded z, by the dense site of the bridge: down[s] is the decoder's guess at h[s]."""
    ordinary: dict[int, Bool[Tensor, "batch pos"] | None]
    """Which tokens are not outlying, by the dense site of the bridge; None: all."""
    ends: (
        tuple[Float[Tensor, "stream token d_sparse"], Float[Tensor, "stream token d_dense"]] | None
    )
    """Residuals at the last site of the passes dense to sparse, and of those sparse to dense; None
    if no hybrid pass was run. Each stream holds every sequence once. Without sampling, stream i is
    the passes that crossed at the i-th bridged site; with sampling, stream j is the j-th draw of
    every sequence."""


def run_passes(
    dense: ResidualModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    ids: Int[Tensor, "batch pos"],
    drawn: Int[Tensor, "batch draw"] | None = None,
    hybrid: bool = True,
) -> Crossing:
    """Return the residuals of both models on `ids` and, if `hybrid`, where the hybrid passes end.

    `drawn` holds dense sites: sequence b crosses only at its own bridges drawn[b]. Without it,
    every sequence crosses at every bridge.

    This takes three passes: one of the dense model on `ids`, without gradient; one of the sparse
    model on `ids`, which the encoded rows join on the way; and one of the dense model on the
    decoded rows. Without `hybrid` nothing joins the second and there is no third.
    """
    pairs = bridges.config.pairs  # dense site to sparse site
    with torch.no_grad():
        h = dense.residuals(ids)
    up = {s: bridges.encode(s, h[s]) for s in pairs}
    ordinary = {s: bridges.ordinary(s, h[s]) for s in pairs}
    if not hybrid:
        z = sparse.residuals(ids)
        down = {s: bridges.decode(s, z[t]) for s, t in pairs.items()}
        return Crossing(h, z, up, down, ordinary, None)
    rows: dict[int, Any] = dict.fromkeys(pairs, slice(None))
    if drawn is not None:
        rows = {s: _sent((drawn == s).nonzero()[:, 0], ids) for s in pairs}
    entered = {s: ids[rows[s]] for s in pairs if drawn is None or len(rows[s])}
    crossed = {s: None if mask is None else mask[rows[s]] for s, mask in ordinary.items()}
    entries = {s: up[s][rows[s]] for s in pairs}
    entering = {pairs[s]: passing(entries[s], crossed[s], rows[s]) for s in entered}
    z, ended = sparse.residuals_and_joined(
        ids,
        entering,
        {pairs[s]: own for s, own in entered.items()},
    )
    # sites that nobody entered stay, without rows: their bridge's gradient is 0 and not missing
    to_sparse = entries | {s: ended[pairs[s]] for s in entered}
    down = {s: bridges.decode(s, z[t]) for s, t in pairs.items()}
    entries = {s: through(down[s][rows[s]], crossed[s], h[s][rows[s]]) for s in pairs}
    to_dense = entries | dense.joined({s: entries[s] for s in entered}, entered)
    return Crossing(
        h, z, up, down, ordinary, (as_streams(to_sparse, drawn), as_streams(to_dense, drawn))
    )


def passing(crossing: Tensor, ordinary: Tensor | None, rows: Any) -> Any:
    """Return what enters the sparse model, as `SparseGPT.residuals_and_joined` takes it.

    Where a token is outlying this is a function of z_t, which is known when the pass comes to the
    site: the rows of z_t, as a constant, at those tokens.
    """
    if ordinary is None:
        return crossing
    return lambda z: through(crossing, ordinary, z[rows].detach())


def as_streams(
    ends: Mapping[int, Float[Tensor, "_ pos d"]], drawn: Int[Tensor, "batch draw"] | None
) -> Float[Tensor, "stream token d"]:
    """Return the rows that came out of joined passes, ordered by (stream, sequence, position).

    `ends` has them by the site at which they entered; `Crossing.ends` says what a stream is.
    """
    sites = sorted(ends)
    if drawn is None:
        return torch.stack([ends[s].flatten(0, 1) for s in sites])
    at = torch.cat([(drawn == s).nonzero() for s in sites])  # (sequence, draw) of every row
    place = (at[:, 1] * len(drawn) + at[:, 0]).argsort()
    rows = torch.cat([ends[s] for s in sites])
    return rows[_sent(place, rows)].view(drawn.shape[1], -1, rows.shape[-1])


class CrossingLoss(NamedTuple):
    """The KLs and cross entropies of the passes of a crossing; zeros for those not scored."""

    main: StreamLoss
    """The sparse model alone."""
    up: StreamLoss
    """The hybrid passes dense to sparse."""
    down: StreamLoss
    """The hybrid passes sparse to dense."""
    dense: StreamLoss
    """The dense model alone: its cross entropy."""


def score_passes(
    dense: ResidualModel,
    sparse: SparseGPT,
    crossing: Crossing,
    ids: Int[Tensor, "batch pos"],
    coefficients: tuple[float, float, float],
    positions: Int[Tensor, "batch drawn"] | None = None,
    with_dense: bool = False,
) -> CrossingLoss:
    """Return the KL and cross entropy of the sparse model and the KL of the hybrids.

    All are in nats per token, each times its coefficient. `coefficients` are, in this order, that
    of the sparse model's cross entropy, that of its KL, and that of the hybrids' KL in either
    direction; a term with coefficient 0 is not computed. With `positions` (of each sequence) the
    hybrids' KLs are taken at those positions only. `with_dense` adds the dense model's own cross
    entropy.
    """
    ce, kl, hybrid = coefficients
    n_seq, n_pos = ids.shape
    labels = torch.cat([ids[:, 1:], ids.new_full((n_seq, 1), -1)], 1).flatten()
    tokens, n = ids.flatten(), ids.numel()
    order: Any = slice(None)
    if positions is not None:
        order, n = _sent(drawn_first(positions, n_pos), ids), positions.numel()
    last, main = (x[-1].flatten(0, 1)[None, order] for x in (crossing.h, crossing.z))
    streams: dict[str, Stream] = {}
    if ce or kl:
        streams["main"] = Stream(sparse.unembed, main, kl=kl, ce=ce)
    if crossing.ends is not None:
        for name, model, x in zip(("up", "down"), (sparse, dense), crossing.ends, strict=True):
            x = x if positions is None else x[:, order[:n]]
            streams[name] = Stream(model.unembed, x, kl=hybrid)
    if with_dense:
        streams["dense"] = Stream(dense.unembed, last, ce=1.0)
    zero = ids.new_zeros((), dtype=torch.float32)
    nothing = StreamLoss(zero, zero, zero[None])
    none = CrossingLoss(nothing, nothing, nothing, nothing)
    if not streams:
        return none
    scored = score_streams(
        Stream(dense.unembed, last),
        list(streams.values()),
        tokens[order],
        labels[order],
        dense.vocab_size,
        list(sparse.parameters()),
    )
    return none._replace(**dict(zip(streams, scored, strict=True)))
