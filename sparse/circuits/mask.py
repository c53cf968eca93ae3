"""Masks over nodes: nodes that are not kept are held at a constant, and masks can be learned.

x <- m x + (1 - m) mu                       at every node location, after AbsTopK
m = 1[tau >= 0],  dm/dtau := sigmoid'(tau / theta) / theta
mu = mean of x over the text the model was trained on (means.py), or 0

The mask m is 1 for a kept node and 0 for one that is held at mu. It is a step function of the
learned score tau, so the gradient of a sigmoid of temperature theta is used in the place of its own
(docs/method.md#masks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse.model.gpt import SparseGPT

from .taps import edited

Values = Mapping[str, Shaped[Tensor, " _"]]
Keep = Mapping[str, Shaped[Tensor, "... _"]]
"""A mask per location: one for all rows, or one for each of them, (row, 1, width)."""


class _Step(torch.autograd.Function):
    """The step of `straight_through`, and the gradient that stands in for its own."""

    @staticmethod
    def forward(ctx, tau: Tensor, theta: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.theta = theta
        return (tau >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        s = torch.sigmoid(ctx.saved_tensors[0] / ctx.theta)
        return grad * s * (1 - s) / ctx.theta, None


class _Hold(torch.autograd.Function):
    """Compute m x + (1 - m) mu, keeping for the backward pass nothing but x, m and mu.

    x is kept only where m needs a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, m: Tensor, mu: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, m, mu)
        return torch.addcmul((1 - m) * mu, x, m)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, m, mu = ctx.saved_tensors
        dx = grad * m if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, None
        g = grad.flatten(0, -2)
        return dx, (g * x.flatten(0, -2)).sum(0) - mu * g.sum(0), None


def straight_through(tau: Float[Tensor, " n"], theta: float) -> Float[Tensor, " n"]:
    """Return m = 1[tau >= 0], with the gradient dm/dtau := sigmoid'(tau / theta) / theta."""
    return _Step.apply(tau, theta)  # pyright: ignore[reportReturnType]


def by_location(flat: Shaped[Tensor, " n"], like: Values) -> dict[str, Shaped[Tensor, " _"]]:
    """Return `flat`, one value per node in forward order, cut into one tensor per location.

    `like` gives the locations in forward order and their widths.
    """
    parts = flat.split([len(value) for value in like.values()])
    return dict(zip(like, parts, strict=True))


@contextmanager
def masked(model: SparseGPT, keep: Keep, ablation: Values) -> Iterator[None]:
    """Hold the nodes that are not kept at their ablation value while the context is open.

        x <- m x + (1 - m) mu,      m = keep[location], mu = ablation[location]

    `keep` holds bools or floats, one mask for all rows of the batch or one for each row, of shape
    (row, 1, width); gradients reach float masks of the first kind. Locations that it does not name
    are left alone. Where it keeps every node, the model computes what it does without the context,
    bit for bit.

    >>> from bridges import load_run
    >>> from sparse import last_logits, masked, task_nats
    >>> run = load_run("tiny")
    >>> circuit = run.circuits()["single_double_quote"]
    >>> batch = circuit.task.batch(run.tokenizer, "test")
    >>> with masked(run.sparse, circuit.masks(), circuit.ablation):
    ...     nats = task_nats(last_logits(run.sparse, batch), batch)
    >>> bool(nats.mean() < 0.15)  # 68 of 5,632 nodes do the task
    True
    """

    def hold(location: str, m: Tensor):
        place = next(model.parameters())
        m = m.to(device=place.device, dtype=place.dtype)
        mu = ablation[location].to(m)
        return lambda x: _Hold.apply(x, m, mu)

    with edited(model, {at: hold(at, m) for at, m in keep.items()}):
        yield
