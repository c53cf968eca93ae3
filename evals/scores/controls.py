"""Deltas that are equal in size to a claim's and empty of its content."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def random_like(
    delta: Float[Tensor, "prompt pos d_dense"], seed: int
) -> Float[Tensor, "prompt pos d_dense"]:
    """Return directions drawn at random, at every token of exactly the length of `delta` there."""
    rng = torch.Generator().manual_seed(seed)
    u = F.normalize(torch.randn(delta.shape, generator=rng), dim=-1).to(delta)
    return u * delta.norm(dim=-1, keepdim=True)


def rotated(
    delta: Float[Tensor, "prompt pos d_dense"], seed: int
) -> Float[Tensor, "prompt pos d_dense"]:
    """Return `delta` turned by one random rotation: every length and every angle within it stays.

    The stricter control: what an untrained decoder would write. Directions drawn anew at every
    token mostly cancel; a structured delta can beat them with nothing in it.
    """
    rng = torch.Generator().manual_seed(seed)
    d = delta.shape[-1]
    q, r = torch.linalg.qr(torch.randn(d, d, generator=rng))
    return delta @ (q * r.diagonal().sign()).to(delta)
