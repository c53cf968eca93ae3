"""Groups of parameters that share a learning rate, a gradient scaling and a weight decay.

loop.py applies them in every optimizer step (docs/method.md#the-training-step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .shard import own, sum_over_shards


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a learning rate and one gradient size r.

        r = ||g||_2 / sqrt(n)    over the gradients g of all n entries of the group together

    (docs/method.md#the-training-step.)
    """

    name: str
    params: dict[str, nn.Parameter]
    lr: Callable[[int], float]
    """Learning rate as a pure function of the optimizer step."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 0.1
    """Adam's eps, in units of the gradient after `scaling`."""
    scaling: Literal["normalise", "clip", "none"] = "normalise"
    """"normalise": g <- g / (r + 1e-5), which also scales small gradients up. "clip":
    g <- g / max(r, 1). "none": g as it is."""
    weight_decay: float = 0.1
    """p <- p - weight_decay * lr * p for `decayed` parameters."""
    decay: Literal["after_projection", "adamw"] = "after_projection"
    """When the parameters decay: "after_projection" at the end of the step, after the weights were
    projected to their budget, or "adamw" before Adam's update."""
    decayed: frozenset[str] = frozenset()
    """Names of the parameters that decay, among the keys of `params`."""


def warmup_decay(step: int, steps: int, warmup: float = 0.01) -> float:
    """Return the factor of the learning rate at t = `step`: it rises to 1, then falls towards 0.

        t / w    for t < w = floor(warmup * steps),    else 1 - (t - w) / (steps - w)

    (docs/method.md#learning-rate.)
    """
    w = int(warmup * steps)
    return step / w if step < w else 1 - (step - w) / (steps - w)


@torch.no_grad()
def scale_(params: list[nn.Parameter], how: Literal["normalise", "clip", "none"]) -> Tensor:
    """Scale the gradients in place as `Group.scaling` says; return r, their size before that.

    r is the root mean square over all entries of `params`, a 0-d tensor. Parameters without a
    gradient count as zeros. Gradients that are sharded among processes give the r of all shards.
    """
    grads = [p.grad for p in params if p.grad is not None]
    n = sum(p.numel() for p in params)
    norms = torch.stack(torch._foreach_norm(own(grads)))  # pyright: ignore
    rms = sum_over_shards(norms.square().sum(), grads).sqrt() / n**0.5
    if how != "none":
        factor = 1 / (rms + 1e-5) if how == "normalise" else 1 / rms.clamp(min=1.0)
        torch._foreach_mul_(own(grads), factor)  # pyright: ignore
    return rms


@torch.no_grad()
def decay_(group: Group, lr: float) -> None:
    """Shrink the group's decayed parameters in place: p <- p - weight_decay * lr * p."""
    decayed = [group.params[name] for name in sorted(group.decayed)]
    if decayed and group.weight_decay:
        torch._foreach_mul_(own(decayed), 1 - group.weight_decay * lr)  # pyright: ignore
