"""Hybrid passes: run one model up to a site, cross the bridge, run the other model from there.

    dense to sparse at s:   KL( dense(ids) || sparse resumed at s from encode_s(h_s) )
    sparse to dense at s:   KL( dense(ids) || dense resumed at s from decode_s(z_s) )

Both in nats per position, over all positions (Gao et al. 2025, section 3.3, L_KL).
"""

from __future__ import annotations

from hashlib import sha256

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .bridge import ResidualModel
from .losses import kl_nats


def draw_sites(
    sites: tuple[int, ...], n_sequences: int, step: int, seed: int
) -> Int[Tensor, " batch"]:
    """Draw one site per sequence: each uniform over `sites`, jointly as even as can be.

    A pure function of (seed, step). Sequence b gets sites[(u + b) mod S] with u uniform, so every
    marginal is uniform and the mean over sequences is an unbiased mean over sites.
    """
    digest = sha256(f"{seed} {step}".encode()).digest()  # a generator reads 32 bits of its seed
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    start = torch.randint(len(sites), (), generator=rng)
    return torch.tensor(sites)[(start + torch.arange(n_sequences)) % len(sites)]


def hybrid_kl(
    dense: ResidualModel,
    sparse: ResidualModel,
    y: Float[Tensor, "batch pos vocab"],
    up: dict[int, Float[Tensor, "batch pos d_sparse"]],
    down: dict[int, Float[Tensor, "batch pos d_dense"]],
    ids: Int[Tensor, "batch pos"],
    drawn: Int[Tensor, " batch"] | None = None,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the two hybrid KLs at every site as (batch, pos) tensors, {site: kl} each.

    `y` are the dense logits, `up` the encoded dense residuals and `down`
    the decoded sparse ones.
    With `drawn`, sequence b is resumed at its own site drawn[b] only, and a site's tensors hold the
    rows that drew it; sites nobody drew are absent.
    """
    to_sparse, to_dense = {}, {}
    for s in up:
        rows = slice(None) if drawn is None else (drawn == s).nonzero()[:, 0].to(ids.device)
        if drawn is not None and len(rows) == 0:  # pyright: ignore[reportArgumentType]
            continue
        to_sparse[s] = kl_nats(y[rows], sparse.resume(s, up[s][rows], ids[rows]))
        to_dense[s] = kl_nats(y[rows], dense.resume(s, down[s][rows], ids[rows]))
    return to_sparse, to_dense


def mean_over_sites(kl: dict[int, Float[Tensor, "batch pos"]], drawn: bool) -> Float[Tensor, ""]:
    """Return the mean over sites of the mean over positions, in nats per token.

    Where sites were drawn per sequence, the plain mean over sequences estimates it without bias.
    """
    if drawn:
        return torch.cat(list(kl.values())).mean()
    return torch.stack([x.mean() for x in kl.values()]).mean()
