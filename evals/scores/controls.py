"""Random changes of the dense stream, as large as those of a claim but without its content."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def random_like(
    delta: Float[Tensor, "prompt pos d_dense"], seed: int
) -> Float[Tensor, "prompt pos d_dense"]:
    """Return random directions, one per token, each of exactly the length of `delta` there."""
    rng = torch.Generator().manual_seed(seed)
    u = F.normalize(torch.randn(delta.shape, generator=rng), dim=-1).to(delta)
    return u * delta.norm(dim=-1, keepdim=True)


def rotated(
    delta: Float[Tensor, "prompt pos d_dense"], seed: int
) -> Float[Tensor, "prompt pos d_dense"]:
    """Return `delta` turned by one random rotation, which keeps all lengths and all angles in it.

    This is the stricter control. Directions drawn anew at every token mostly cancel each other, so
    any delta that is alike at many tokens can beat them, even that of an untrained decoder. A
    rotated delta has the same structure over tokens; only its directions mean nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    d = delta.shape[-1]
    q, r = torch.linalg.qr(torch.randn(d, d, generator=rng))
    return delta @ (q * r.diagonal().sign()).to(delta)
