"""The co-training loss, term by term (docs/method.md#co-training-loss).

    ce       -log p_sparse(next token), mean over the pos - 1 predicted positions
    kl       KL(dense || sparse), mean over all positions
    encode   mean over bridges of NMSE(encode(h), z), z detached
    decode   mean over bridges of NMSE(decode(z), h)
    up       mean over bridges of KL(dense || sparse resumed from encode(h))
    down     mean over bridges of KL(dense || dense resumed from decode(z))

h is the dense residual at a bridge's dense site, z the sparse residual at its sparse site. The
hybrid passes resume at these sites: the sparse model at the sparse one, the dense model at the
dense one. NMSE is `bridges.losses.quantities.nmse`, over the tokens that are not outlying at the
site (`BridgeSet`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.losses.moments import Moments, moments_of
from bridges.losses.quantities import Normalised, nmse
from bridges.maps.bridge import BridgeSet
from bridges.protocol import ResidualModel
from sparse.model.gpt import SparseGPT

from .config import LossWeights
from .hybrid import Crossing, run_passes, score_passes


class Draw(NamedTuple):
    """The sites and positions to which a step restricts the hybrid passes.

    They are drawn at random (`draw_sites`, `draw_positions` in hybrid.py) and leave the mean of
    every term unbiased.
    """

    sites: Int[Tensor, "batch draw"] | None = None
    """Dense sites of the bridges at which each sequence crosses; None means at every bridge."""
    positions: Int[Tensor, "batch drawn"] | None = None
    """Positions at which the KLs of the hybrid passes are taken; None means at all of them."""


class Part(NamedTuple):
    """One of the equal parts into which a process cuts its rows of a batch.

    Parts are run one after the other and their gradients added up, to save memory.
    """

    number: int
    """Index of this part, from 0."""
    of: int
    """Number of parts."""
    whole: Sequence[Moments] | None
    """Moments (count, mean, spread) of the sparse residuals at the bridged sites, then of the dense
    ones, over all parts and processes. None where they need not be given: there is one part, or
    the errors of the bridges have weight 0."""


WHOLE = Part(0, 1, None)
"""The rows of a process in one part."""
EVERYWHERE = Draw()
"""Every sequence crosses at every bridge and is scored at every position."""


class Share(NamedTuple):
    """Which share of a step's batch one pass holds: one part of the rows of one process."""

    part: Part = WHOLE
    processes: int = 1
    """Number of processes that train together. Each has rows of its own, all equally many."""


ALL_ROWS = Share()
"""The whole batch, in one process."""


def losses(
    dense: ResidualModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    ids: Int[Tensor, "batch pos"],
    w: LossWeights,
    *,
    draw: Draw = EVERYWHERE,
    share: Share = ALL_ROWS,
    normalised: Normalised = "fvu",
    decoder_trains_trunk: bool = True,
) -> dict[str, Float[Tensor, ""]]:
    """Return the six terms of the co-training loss, each weighted; training lowers their sum.

    ce, kl, up and down are in nats per token, encode and decode are fractions (Gao et al. 2025,
    section 3.3). A term of weight 0 is 0 and costs nothing.

    The dense model is frozen: its residuals and logits are constants. But the part of it that runs
    after a decoder passes gradients back to that decoder (docs/method.md#gradient-flow). With
    `decoder_trains_trunk=False` the decoder's error does not reach the sparse trunk.

    A batch may be cut into parts and shared among processes; `share` says which share `ids` are.
    The losses are scaled so that their mean over all parts and processes, and that of their
    gradients, is what the whole batch would give.
    """
    run = run_passes(dense, sparse, bridges, ids, draw.sites, hybrid=w.hybrid > 0)
    nats = score_passes(dense, sparse, run, ids, (w.ce, w.kl, w.hybrid), draw.positions)
    encode = decode = ids.new_zeros((), dtype=torch.float32)
    if w.nmse:
        encode, decode = bridge_errors(
            bridges, run, w.nmse, share, normalised, decoder_trains_trunk
        )
    return {
        "ce": nats.main.ce,
        "kl": nats.main.kl,
        "encode": encode,
        "decode": decode,
        "up": nats.up.kl,
        "down": nats.down.kl,
    }


def bridge_errors(
    bridges: BridgeSet,
    run: Crossing,
    weight: float,
    share: Share = ALL_ROWS,
    normalised: Normalised = "fvu",
    decoder_trains_trunk: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return `weight` times the mean error of the encoders, and the same of the decoders.

        mean over bridges of NMSE(x, target) * rows of the whole batch / rows here

    Both are fractions. Each NMSE sums over the rows here and divides by the denominator of the
    whole batch (docs/method.md#normalised-error). The last factor is there because the errors of
    all parts and processes should add up, while training averages their gradients.
    """
    pairs = bridges.config.pairs
    h, up, down = ([x[s] for s in pairs] for x in (run.h, run.up, run.down))
    z = [run.z[t] for t in pairs.values()]
    fixed = [x.detach() for x in z]  # or the trunk would learn to be easy to predict
    if not decoder_trains_trunk:
        down = [bridges.decode(s, x) for s, x in zip(pairs, fixed, strict=True)]
    masks = [run.ordinary[s] for s in pairs]
    moments = share.part.whole or moments_of([*z, *h], share.processes, [*masks, *masks])
    of_z, of_h = moments[: len(pairs)], moments[len(pairs) :]
    rows_ratio = share.processes * share.part.of

    def error(x: list[Tensor], target: list[Tensor], of: Sequence[Moments]) -> Tensor:
        each = [
            nmse(*one, normalised, mask)
            for one, mask in zip(zip(x, target, of, strict=True), masks, strict=True)
        ]
        return weight * rows_ratio * torch.stack(each).mean()

    return error(up, fixed, of_z), error(down, h, of_h)
