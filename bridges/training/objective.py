"""The co-training loss, term by term (docs/method.md#co-training-loss).

    ce       -log p_sparse(next token), mean over the pos - 1 predicted positions
    kl       KL(dense || sparse), mean over all positions
    encode   mean over bridges of NMSE(encode(h), z), z detached
    decode   mean over bridges of NMSE(decode(z), h)
    up       mean over bridges of KL(dense || sparse resumed from encode(h))
    down     mean over bridges of KL(dense || dense resumed from decode(z))

h is the dense residual at a bridge's dense site, z the sparse one at its sparse site; the passes
resume there too.
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
    """What the hybrid passes of a batch are restricted to, at random and without bias."""

    sites: Int[Tensor, "batch draw"] | None = None
    """Dense sites of the bridges at which each sequence crosses; None: at every bridge."""
    positions: Int[Tensor, "batch drawn"] | None = None
    """Positions at which their KLs are taken; None: at all."""


class Part(NamedTuple):
    """Which of a batch's equal parts this is, and what it needs of the whole."""

    number: int
    """From 0."""
    of: int
    """Number of parts."""
    whole: Sequence[Moments] | None
    """Moments of the sparse, then the dense residuals at the bridged sites, over all parts and
    processes; None where the part is the whole."""


WHOLE = Part(0, 1, None)
"""The batch in one part."""
EVERYWHERE = Draw()
"""Every sequence at every bridge and position."""


class Share(NamedTuple):
    """Which share of a step's batch one pass holds."""

    part: Part = WHOLE
    processes: int = 1
    """How many train together, each on its own rows, equally many."""


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
    """Return the six terms of the co-training loss, each weighted; their sum is what we descend.

    ce, kl, up and down are in nats per token, encode and decode are fractions (Gao et al. 2025,
    section 3.3). A term of weight 0 is 0 and costs nothing.

    The dense model is frozen: its residuals and logits are constants, but its tails pass gradients
    to the decoders (docs/method.md#gradient-flow). With `decoder_trains_trunk=False` the decoder's
    error does not reach the sparse trunk.

    Where `share` says that this is one part of a batch, or one process of several, the mean over
    parts and processes of these losses, and of their gradients, is that of the whole batch.
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
    """Return `weight` times the mean error of the encoders, and of the decoders, as fractions.

    Each is NMSE(x, target) over this part's rows, with the denominator of the whole batch
    (docs/method.md#normalised-error). The numerators of all parts add up while gradients are
    averaged, hence the factor rows of the whole / rows here.
    """
    pairs = bridges.config.pairs
    h, up, down = ([x[s] for s in pairs] for x in (run.h, run.up, run.down))
    z = [run.z[t] for t in pairs.values()]
    fixed = [x.detach() for x in z]  # or the trunk would learn to be easy to predict
    if not decoder_trains_trunk:
        down = [bridges.decode(s, x) for s, x in zip(pairs, fixed, strict=True)]
    moments = share.part.whole or moments_of([*z, *h], share.processes)
    of_z, of_h = moments[: len(pairs)], moments[len(pairs) :]
    rows_ratio = moments[0].n / h[0][..., 0].numel()

    def error(x: list[Tensor], target: list[Tensor], of: Sequence[Moments]) -> Tensor:
        each = [nmse(*one, normalised) for one in zip(x, target, of, strict=True)]
        return weight * rows_ratio * torch.stack(each).mean()

    return error(up, fixed, of_z), error(down, h, of_h)
