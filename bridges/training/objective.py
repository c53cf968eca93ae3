"""The co-training loss: its terms, and what a part of a batch needs of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.losses.chunked import StreamLoss
from bridges.losses.moments import Moments, moments_of
from bridges.losses.quantities import Normalised, nmse
from bridges.maps.bridge import BridgeSet
from bridges.protocol import ResidualModel
from sparse.model.gpt import SparseGPT

from .config import LossWeights
from .hybrid import run_passes, score_passes


def losses(
    dense: ResidualModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    ids: Int[Tensor, "batch pos"],
    w: LossWeights,
    drawn: Int[Tensor, "batch draw"] | None = None,
    positions: Int[Tensor, "batch drawn"] | None = None,
    decoder_trains_trunk: bool = True,
    processes: int = 1,
    whole: Sequence[Moments] | None = None,
    normalised: Normalised = "fvu",
) -> dict[str, Float[Tensor, ""]]:
    """Return the terms of the co-training loss, each weighted; their sum is what we descend.

        ce       -log p_sparse(next token), mean over the pos - 1 predicted positions
        kl       KL(dense || sparse), mean over all positions
        encode   mean over sites of NMSE(encode(h), z), z detached
        decode   mean over sites of NMSE(decode(z), h)
        up       mean over sites of KL(dense || sparse resumed from encode(h))
        down     mean over sites of KL(dense || dense resumed from decode(z))

    h is at a bridge's dense site and z at its sparse site, where the passes resume too. Gao et al.
    2025, section 3.3; gradient flow of method.md 3.4: the dense model is frozen, its residuals and
    logits are constants, but its tails pass gradients to the decoders. With `drawn` every sequence
    is resumed at its own sites only, with `positions` the hybrid KLs are taken at those only; both
    without bias. Nats per token for ce, kl, up and down. A term of weight 0 is 0 and costs nothing.
    Where `processes` train together, each with its own rows, the mean of their losses, and of the
    gradients, is that of all rows. So it is where `ids` is one of several equal parts of a batch
    and `whole` holds the moments of all of it (`Cotraining.of_whole`).
    """
    pairs = bridges.config.pairs
    run = run_passes(dense, sparse, bridges, ids, drawn, hybrid=w.hybrid > 0)
    scored = score_passes(dense, sparse, run, ids, (w.ce, w.kl, w.hybrid), positions)
    zero = ids.new_zeros((), dtype=torch.float32)
    none = StreamLoss(zero, zero, zero[None])
    encode = decode = zero
    if w.nmse:
        h, up, down = ([x[s] for s in pairs] for x in (run.h, run.up, run.down))
        z = [run.z[t] for t in pairs.values()]
        fixed = [x.detach() for x in z]
        if not decoder_trains_trunk:
            down = [bridges.decode(s, x) for s, x in zip(pairs, fixed, strict=True)]
        below = whole or moments_of([*z, *h], processes)
        share = below[0].n / ids.numel()  # numerators of all parts are summed, gradients averaged

        def error(x: list[Tensor], target: list[Tensor], of: Sequence[Moments]) -> Tensor:
            each = (nmse(*pair, normalised) for pair in zip(x, target, of, strict=True))
            return w.nmse * share * torch.stack(list(each)).mean()

        encode, decode = error(up, fixed, below[: len(pairs)]), error(down, h, below[len(pairs) :])
    return {
        "ce": scored.get("main", none).ce,
        "kl": scored.get("main", none).kl,
        "encode": encode,
        "decode": decode,
        "up": scored.get("up", none).kl,
        "down": scored.get("down", none).kl,
    }


class Part(NamedTuple):
    """Which of a batch's equal parts this is, and what it needs of the whole."""

    number: int
    """From 0."""
    of: int
    """Number of parts."""
    whole: Sequence[Moments] | None
    """Moments of the sparse, then the dense residuals at the bridged sites, over all parts."""
