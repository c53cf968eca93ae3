"""KL and cross entropy of many residual streams at once, without all logits at once.

    kl = c_kl mean_{stream, token} sum_v p_v (log p_v - log q_v)           as `kl_nats`
    ce = c_ce mean_{stream, labelled token} -log q_label                   as `ce_nats`
    d (kl + ce) / d logits = c_kl (q - p) / n + c_ce (q - 1_label) / n_labelled

p is the target's distribution and q a stream's; n is the number of streams times tokens, n_labelled
that of streams times labelled tokens. The tokens are processed in chunks. For each chunk the logits
are formed and scored, the gradient of the loss with respect to them is written over them and passed
back to the residuals, and then they are dropped. So no more than about CHUNK logits of one model
exist at a time, however many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .quantities import unrounded

CHUNK = 2**21  # logits that exist at once for one model: 8 MB in float32
MIN_ROWS = 256  # rows (tokens) of logits in a chunk at least, however large the vocabulary


class Stream(NamedTuple):
    """The last residuals of several passes through one model, and the weights of their terms."""

    unembed: Callable[[Tensor, Tensor], Tensor]
    """The model's final norm and head: takes residuals at the last site, in any shape, and their
    tokens; returns logits."""
    h: Float[Tensor, "stream token d"]
    """Residuals at the last site. They may stop early: where h has fewer tokens than the target,
    only these first ones are scored."""
    kl: float = 0.0
    """Coefficient of the mean over streams and tokens of KL(target || stream)."""
    ce: float = 0.0
    """Coefficient of the mean over streams and labelled tokens of -log p(label)."""


class StreamLoss(NamedTuple):
    """The terms of a `Stream`, in nats per token, times its coefficients. Both have gradients."""

    kl: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    per_stream: Float[Tensor, " stream"]
    """Mean KL of each stream, unweighted and detached; zeros where `Stream.kl` is 0."""


class _Job(NamedTuple):
    """What one sweep over the tokens needs; all residuals are detached."""

    target: Stream
    streams: tuple[Stream, ...]
    ids: Int[Tensor, " token"]
    labels: Int[Tensor, " token"]
    """-1 at tokens without a label."""
    vocab_size: int
    params: tuple[Tensor, ...]
    """Parameters whose gradient is wanted, where an `unembed` reads them."""


class _Factors(NamedTuple):
    """The factors by which the gradients of a stream's two terms are multiplied."""

    kl: Any
    ce: Any


class _TargetChunk(NamedTuple):
    """The target at the tokens of one chunk."""

    start: int
    """Index of the chunk's first token."""
    p: Float[Tensor, "token vocab"]
    p_log_p: Float[Tensor, " token"]
    """sum_v p_v log p_v"""
    ids: Int[Tensor, " token"]
    labels: Int[Tensor, " token"]


def score_streams(
    target: Stream,
    streams: Sequence[Stream],
    ids: Int[Tensor, " token"],
    labels: Int[Tensor, " token"],
    vocab_size: int,
    params: Sequence[Tensor] = (),
) -> list[StreamLoss]:
    """Return KL to the target and cross entropy of every stream, in nats per token.

    The target is the first pass that `target` holds. It is a constant and is computed once for all
    streams. `labels` is -1 at tokens without one. Gradients flow to every `h` and to those of
    `params` that an `unembed` reads.

    The forward pass already computes the gradient of the sum of all terms, while the logits are in
    memory. A backward pass through that sum, times any number, therefore costs almost nothing. If
    the terms are differentiated one by one, or weighted differently afterwards, the backward pass
    computes all logits once more.
    """
    detached = tuple(s._replace(h=s.h.detach()) for s in streams)  # the graph runs through apply
    wanted = tuple(p for p in params if p.requires_grad)
    still = target._replace(h=target.h.detach())
    job = _Job(still, detached, ids, labels, vocab_size, wanted)
    n = len(streams)
    found: tuple[Tensor, ...] = _Scores.apply(job, *(s.h for s in streams), *wanted)  # pyright: ignore
    kl, ce, per_stream = found[:n], found[n : 2 * n], found[2 * n]
    parts = per_stream.split([len(s.h) for s in streams])
    return [StreamLoss(*terms) for terms in zip(kl, ce, parts, strict=True)]


class _Scores(torch.autograd.Function):
    """The terms of all streams, as (every kl, every ce, mean KL per stream), from one sweep.

    A sweep is one walk over all chunks of tokens.
    """

    @staticmethod
    def forward(ctx, job: _Job, *inputs: Tensor):
        ones = [_Factors(1.0, 1.0)] * len(job.streams) if any(ctx.needs_input_grad) else None
        sums, grads = _sweep(job, ones)
        kl = [s.stream.kl * s.kl.mean() for s in sums]
        ce = [s.stream.ce * s.ce for s in sums]
        per_stream = torch.cat([s.kl for s in sums])
        ctx.job, ctx.autocast = job, _autocast(inputs[0].device.type)
        ctx.save_for_backward(*grads)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(per_stream)
        return *kl, *ce, per_stream

    @staticmethod
    def backward(ctx, *by_term):  # pyright: ignore[reportIncompatibleMethodOverride]
        streams, grads = ctx.job.streams, ctx.saved_tensors
        n = len(streams)
        by_kl, by_ce = by_term[:n], by_term[n : 2 * n]
        live = [g for g, s in zip(by_kl, streams, strict=True) if s.kl]
        live += [g for g, s in zip(by_ce, streams, strict=True) if s.ce]
        if _is_one_number(live):  # the gradient formed in the sweep, times that number
            return None, *(None if g is None else g * live[0].to(g.dtype) for g in grads)
        factors = [
            _Factors(*(0.0 if g is None else g for g in pair))
            for pair in zip(by_kl, by_ce, strict=True)
        ]
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype, enabled):
            return None, *_sweep(ctx.job, factors)[1]


def _is_one_number(grads: Sequence[Tensor | None]) -> bool:
    """Return whether all of these scalars are one and the same number in memory.

    When terms are summed, autograd hands each of them the same scalar tensor. Comparing addresses
    shows this without reading the number, for which the host would have to wait for the device.
    Equal numbers at different addresses count as different; this costs a sweep, but the gradients
    are right all the same.
    """
    first = grads[0] if grads else None
    return first is not None and all(
        g is not None and g.data_ptr() == first.data_ptr() for g in grads
    )


def _autocast(kind: str) -> tuple[str, torch.dtype, bool]:
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


@torch.no_grad()
def _sweep(
    job: _Job, factors: Sequence[_Factors] | None
) -> tuple[list[_Sums], list[Tensor | None]]:
    """Return the sums of every stream over all tokens, and gradients if `factors` are given.

    The gradient is that of the sum of all terms, each times its factor; it is returned first for
    every stream's h, then for every parameter.
    """
    wanted = [None] * len(job.streams) if factors is None else factors
    sums = [_Sums(s, job.labels, f) for s, f in zip(job.streams, wanted, strict=True)]
    dparams: list[Tensor | None] = [None] * len(job.params)
    widest = max(len(s.h) for s in job.streams)
    step = max(1, max(MIN_ROWS, CHUNK // job.vocab_size) // widest)
    longest = max(s.h.shape[1] for s in job.streams)
    rooms: list[Tensor] = []  # memory for p and for log q, used by every chunk: fresh one is slow
    for a in range(0, longest, step):
        b = min(a + step, longest)
        logits = job.target.unembed(job.target.h[0, a:b], job.ids[a:b])
        if not rooms:
            dtype, size = torch.promote_types(logits.dtype, torch.float32), logits.numel()
            rooms = [logits.new_empty(n * size, dtype=dtype) for n in (1, widest)]
        log_p = _log_probs_in(rooms[1], logits)
        p = torch.exp(log_p, out=rooms[0][: log_p.numel()].view_as(log_p))
        with unrounded(p):
            p_log_p = torch.einsum("tv,tv->t", p, log_p)
        del logits
        chunk = _TargetChunk(a, p, p_log_p, job.ids[a:b], job.labels[a:b])
        for one in sums:
            for i, g in enumerate(one.add(chunk, job.params, rooms[1])):
                mine = dparams[i]
                dparams[i] = mine if g is None else g if mine is None else mine.add_(g)
    return sums, [*(s.dh if s.forming else None for s in sums), *dparams]


def _log_probs_in(room: Tensor, logits: Tensor) -> Tensor:
    """Return the log softmax of `logits`, written over the beginning of `room`."""
    out = room[: logits.numel()].view(logits.shape)
    return torch.log_softmax(logits, -1, dtype=out.dtype, out=out)


class _Sums:
    """Running sums of one stream: mean KL of each pass, mean cross entropy, gradient of h."""

    def __init__(self, stream: Stream, labels: Tensor, factors: _Factors | None) -> None:
        n_streams, self.n = stream.h.shape[:2]
        self.stream, self.forming = stream, factors is not None
        dtype = torch.promote_types(stream.h.dtype, torch.float32)
        self.kl = stream.h.new_zeros(n_streams, dtype=dtype)
        self.ce = stream.h.new_zeros((), dtype=dtype)
        self.n_labelled = n_streams * (labels[: self.n] >= 0).sum(dtype=dtype)
        if factors is not None:
            self.dh = torch.zeros_like(stream.h)
            per_token = stream.h.new_full((), stream.kl / (n_streams * self.n), dtype=dtype)
            self.c_kl = per_token * factors.kl
            self.c_ce = factors.ce * stream.ce / self.n_labelled

    def add(
        self, chunk: _TargetChunk, params: Sequence[Tensor], room: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Add the tokens of one chunk to the sums; return the gradients of `params` they give.

        The contents of `room` are lost.
        """
        s, a = self.stream, chunk.start
        m = min(len(chunk.ids), self.n - a)
        if m <= 0 or not (s.kl or s.ce):
            return ()
        p, ids, labels = chunk.p[:m], chunk.ids[:m], chunk.labels[:m]
        h = s.h[:, a : a + m].detach().requires_grad_()
        with torch.set_grad_enabled(self.forming):
            logits = s.unembed(h, ids.expand(len(h), -1))  # stream token vocab
        q = _log_probs_in(room, logits.detach())
        label = labels.clamp(min=0).expand(len(h), -1).unsqueeze(-1)
        labelled = (labels >= 0).to(q.dtype)
        if s.ce:
            self.ce -= (q.gather(-1, label).squeeze(-1) * labelled).sum() / self.n_labelled
        if s.kl:
            with unrounded(p):
                cross = torch.einsum("tv,stv->st", p, q)
            self.kl += (chunk.p_log_p[:m] - cross).sum(-1) / self.n
        if not self.forming:
            return ()
        c_ce = self.c_ce * labelled.unsqueeze(-1)  # token 1
        q.exp_().mul_(self.c_kl + c_ce).addcmul_(p, self.c_kl, value=-1)
        if s.ce:
            q.scatter_add_(-1, label, -c_ce.expand(len(h), -1, 1))
        dh, *rest = torch.autograd.grad(logits, [h, *params], q.to(logits.dtype), allow_unused=True)
        self.dh[:, a : a + m] = dh
        return tuple(rest)
