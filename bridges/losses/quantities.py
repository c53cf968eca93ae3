"""KL, cross entropy and normalised squared error: one function per quantity, one unit each."""

from __future__ import annotations

from typing import Literal

import torch.distributed
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import mse_loss

from .moments import Moments


def log_probs(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Return log softmax over the full vocabulary, in float32 or better."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def unrounded(x: Tensor) -> torch.autocast:
    """Return a context in which products of tensors like `x` keep their own precision.

    Under autocast they would be rounded to 16 bits, and a KL of 0.01 nats, which is a difference of
    sums of several nats, would drown in that.
    """
    return torch.autocast(x.device.type, enabled=False)


def kl_nats(
    target: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(p || q) at each position in nats, p from `target` and q from `logits`.

        KL = sum_v p_v (log p_v - log q_v),     d KL / d logits = q - p

    Both may be logits or log-probabilities. The target is a constant: no gradient reaches it. No
    mean is taken here, so that every caller shows over what it averages.
    """
    return _KL.apply(target, logits)  # pyright: ignore[reportReturnType]


class _KL(torch.autograd.Function):
    """`kl_nats` with its gradient in closed form.

    It reads the vocabulary half as often as what autograd would derive.
    """

    @staticmethod
    def forward(ctx, target: Tensor, logits: Tensor) -> Tensor:
        log_p, log_q = log_probs(target), log_probs(logits)
        p = log_p.exp()
        ctx.save_for_backward(p, log_q)
        ctx.dtype = logits.dtype
        with unrounded(p):
            return torch.linalg.vecdot(p, log_p - log_q)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        p, log_q = ctx.saved_tensors
        return None, (log_q.exp().sub_(p).mul_(grad.unsqueeze(-1))).to(ctx.dtype)


def ce_nats(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch predicted"]:
    """Return -log p(next token) in nats at the pos - 1 positions that have a next token."""
    log_q = log_probs(logits[:, :-1])
    return -log_q.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


Normalised = Literal["fvu", "per_token", "uncentred"]


def nmse(
    x: Float[Tensor, "*batch d"],
    target: Float[Tensor, "*batch d"],
    moments: Moments | None = None,
    by: Normalised = "fvu",
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return a normalised squared error, a fraction; 0 is perfect. t runs over batch and positions:

        "fvu"        sum_t |x_t - target_t|^2 / sum_t |target_t - mean|^2
        "per_token"  mean_t (|x_t - target_t|^2 / (|target_t - mean|^2 + 1e-8))
        "uncentred"  sum_t |x_t - target_t|^2 / sum_t |target_t|^2

    (docs/method.md#normalised-error.) "fvu" is the fraction of variance unexplained, which is 1
    where x is no better than the mean. Denominators are detached, so that the model which makes
    the target cannot lower the loss by making the target larger.

    Where `target` holds only some rows of a batch, `moments` are those of the whole batch; by
    default they are those of `target`. With them the errors of all parts of a batch add up to the
    error of the whole. With `where`, t runs over the tokens that it marks.
    """
    x, target = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, target))
    n, mean, spread = moments or Moments.of(target, where)
    if where is not None:
        x = torch.where(where[..., None], x, target)  # no error and no gradient elsewhere
    if by == "per_token":
        away = (target.detach() - mean).square().sum(-1) + 1e-8
        return ((x - target).square().sum(-1) / away).sum() / n
    below = spread if by == "fvu" else spread + n * mean.square().sum()
    return mse_loss(x, target, reduction="sum") / below
