"""One function per quantity, one unit each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def kl_nats(
    target: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(p || q) at each position in nats, p from `target` and q from `logits`.

    Both may be logits or log-probabilities; the log-softmax is taken in float32 or better over the
    full vocabulary. One number per position: the caller writes the mean.
    """
    log_p, log_q = (_log_softmax(x) for x in (target, logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ce_nats(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch predicted"]:
    """Return -log p(next token) in nats at the pos - 1 positions that have a next token."""
    return F.cross_entropy(
        _log_softmax(logits[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none"
    )


def nmse(x: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """Return the fraction of the target's variance left unexplained (definition A, method.md 3.3).

        sum_t |x_t - target_t|^2 / sum_t |target_t - mean|^2,     t over batch and positions

    The denominator is detached, so the target cannot lower its loss by growing. 0 is perfect, 1 is
    as good as the mean.
    """
    with torch.no_grad():
        flat = target.flatten(0, -2).float()
        variance = (flat - flat.mean(0)).square().sum()
    return (x.float() - target.float()).square().sum() / variance


def _log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
