"""Random changes of the dense stream, as large as those of a claim but without its content."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

Change = Float[Tensor, "prompt pos d_dense"]


def rotated(delta: Change, seed: int) -> Change:
    """Return `delta` turned by one random rotation, which keeps all lengths and all angles in it.

    A rotated delta has the same structure over tokens; only its directions mean nothing. Directions
    drawn anew at every token would be no control: they mostly cancel each other, so that any delta
    that is alike at many tokens can beat them, even that of an untrained decoder.
    """
    return delta @ rotation(delta.shape[-1], seed).to(delta)


@lru_cache(maxsize=128)
def rotation(d: int, seed: int) -> Float[Tensor, "d d"]:
    """Return a random orthogonal matrix, uniformly drawn (Mezzadri 2007)."""
    rng = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d, d, generator=rng))
    return q * r.diagonal().sign()


def of_length(delta: Change, like: Change) -> Change:
    """Return `delta` rescaled at every token to the length of `like` there; zero stays zero."""
    length = delta.norm(dim=-1, keepdim=True)
    scale = like.norm(dim=-1, keepdim=True) / length.clamp(min=1e-12)
    return delta * torch.where(length > 1e-12, scale, 0.0)
