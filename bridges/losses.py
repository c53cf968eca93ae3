"""One function per quantity, one unit each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import mse_loss

CHUNK = 2**21  # logits that exist at once for one model: 8 MB in float32
MIN_ROWS = 256  # but at least so many rows of them, however large the vocabulary


def log_probs(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Return log softmax over the full vocabulary, in float32 or better."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kl_nats(
    target: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(p || q) at each position in nats, p from `target` and q from `logits`.

        KL = sum_v p_v (log p_v - log q_v),     d KL / d logits = q - p

    Both may be logits or log-probabilities; the target is a constant (no gradient reaches it). One
    number per position: the caller writes the mean.
    """
    return _KL.apply(target, logits)  # pyright: ignore[reportReturnType]


class _KL(torch.autograd.Function):
    """The gradient in closed form: half the passes over the vocabulary that autograd would make."""

    @staticmethod
    def forward(ctx, target: Tensor, logits: Tensor) -> Tensor:
        log_p, log_q = log_probs(target), log_probs(logits)
        p = log_p.exp()
        ctx.save_for_backward(p, log_q)
        ctx.dtype = logits.dtype
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


class Ending(NamedTuple):
    """The last residuals of several passes through one model, and what they are scored by."""

    unembed: Callable[[Tensor, Tensor], Tensor]
    """The model's end: (residuals at the last site, their tokens) in any shape to logits."""
    h: Float[Tensor, "stream token d"]
    """Residuals at the last site, at all of the tokens or at the first few."""
    kl: float = 0.0
    """Coefficient of the mean over streams and tokens of KL(target || stream)."""
    ce: float = 0.0
    """Coefficient of the mean over streams and labelled tokens of -log p(label)."""


class Scored(NamedTuple):
    """The terms of an `Ending`, in nats per token, weighted; gradients flow through both."""

    kl: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    per_stream: Float[Tensor, " stream"]
    """Mean KL of each stream, unweighted and detached; zeros where `Ending.kl` is 0."""


def score_endings(
    target: Ending,
    endings: Sequence[Ending],
    ids: Int[Tensor, " token"],
    labels: Int[Tensor, " token"],
    vocab_size: int,
    params: Sequence[Tensor] = (),
) -> list[Scored]:
    """Return KL to the target and cross entropy of every ending, without all logits at once.

        kl = c_kl mean_{stream, token} sum_v p_v (log p_v - log q_v)           as `kl_nats`
        ce = c_ce mean_{stream, labelled token} -log q_label                   as `ce_nats`
        d (kl + ce) / d logits = c_kl (q - p) / n + c_ce (q - 1_label) / n_labelled

    p is the first stream of `target`, a constant computed once for all endings; `labels` is -1 at
    tokens without one. Gradients flow to every `h` and to those of `params` that an `unembed`
    reads. Some CHUNK logits exist at a time, and what follows from their gradient is formed before
    they go: the sum of all terms costs no second look at them. Terms that are differentiated
    apart, or weighted differently afterwards, are swept over once more.
    """
    ends = [e._replace(h=e.h.detach()) for e in endings]  # the graph runs through apply's inputs
    params = [p for p in params if p.requires_grad]
    job = dict(target=target._replace(h=target.h.detach()), endings=ends, params=params)
    job |= dict(ids=ids, labels=labels, vocab_size=vocab_size)
    inputs = (*(e.h for e in endings), *params)
    *terms, per_stream = _Scores.apply(job, *inputs)  # pyright: ignore
    streams = per_stream.split([len(e.h) for e in endings])
    return [Scored(*x) for x in zip(terms[::2], terms[1::2], streams, strict=True)]


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job: dict[str, Any], *inputs: Tensor):
        forming = any(ctx.needs_input_grad)
        ones = [1.0] * (2 * len(job["endings"]))
        tallies, grads = _sweep(**job, scales=ones if forming else None)
        per_stream = torch.cat([t.kl for t in tallies])
        ctx.job, ctx.autocast = job, _autocast(inputs[0].device.type)
        ctx.save_for_backward(*grads)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(per_stream)
        return *(x for t in tallies for x in (t.end.kl * t.kl.mean(), t.end.ce * t.ce)), per_stream

    @staticmethod
    def backward(ctx, *by_term):  # pyright: ignore[reportIncompatibleMethodOverride]
        *scales, _ = by_term
        grads = ctx.saved_tensors
        coefficients = [c for e in ctx.job["endings"] for c in (e.kl, e.ce)]
        live = [s for s, c in zip(scales, coefficients, strict=True) if c]
        if any(s is None or s.data_ptr() != live[0].data_ptr() for s in live):
            # not one number for all terms, so what was formed with one is not their gradient
            kind, dtype, enabled = ctx.autocast
            with torch.autocast(kind, dtype, enabled):
                grads = _sweep(**ctx.job, scales=[0.0 if s is None else s for s in scales])[1]
            return None, *grads
        return None, *(None if g is None else g * live[0].to(g.dtype) for g in grads)


def _autocast(kind: str) -> tuple[str, torch.dtype, bool]:
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


@torch.no_grad()
def _sweep(
    target: Ending,
    endings: list[Ending],
    ids: Tensor,
    labels: Tensor,
    vocab_size: int,
    params: list[Tensor],
    scales: list[Any] | None,
) -> tuple[list[_Tally], list[Tensor | None]]:
    """Walk over the tokens chunk by chunk.

    Return the tallies and, with `scales`, the gradients of sum_i scales_i term_i: those of every
    ending's h, then those of the parameters.
    """
    pairs = [None] * len(endings) if scales is None else zip(scales[::2], scales[1::2], strict=True)
    tallies = [_Tally(e, labels, pair) for e, pair in zip(endings, pairs, strict=True)]
    dparams: list[Tensor | None] = [None] * len(params)
    rows = max(MIN_ROWS, CHUNK // vocab_size)
    step = max(1, rows // max(len(e.h) for e in endings))
    longest = max(e.h.shape[1] for e in endings)
    rooms: list[Tensor] = []  # for p, and for what else is as large: fresh memory is slow
    for a in range(0, longest, step):
        b = min(a + step, longest)
        logits = target.unembed(target.h[0, a:b], ids[a:b])
        if not rooms:
            dtype, size = torch.promote_types(logits.dtype, torch.float32), logits.numel()
            widest = max(len(e.h) for e in endings)
            rooms = [logits.new_empty(n * size, dtype=dtype) for n in (1, widest)]
        log_p = _log_probs_in(rooms[1], logits)
        p = torch.exp(log_p, out=rooms[0][: log_p.numel()].view_as(log_p))
        p_log_p = torch.einsum("tv,tv->t", p, log_p)
        del logits
        for tally in tallies:
            grads = tally.add(a, p, p_log_p, ids[a:b], labels[a:b], params, rooms[1])
            for i, g in enumerate(grads):
                mine = dparams[i]
                dparams[i] = mine if g is None else g if mine is None else mine.add_(g)
    return tallies, [*(t.dh if t.forming else None for t in tallies), *dparams]


def _log_probs_in(room: Tensor, logits: Tensor) -> Tensor:
    """`log_probs`, written over the beginning of `room`."""
    out = room[: logits.numel()].view(logits.shape)
    return torch.log_softmax(logits, -1, dtype=out.dtype, out=out)


class _Tally:
    """Running sums of one ending: mean KL per stream, mean cross entropy, gradient of h."""

    def __init__(self, end: Ending, labels: Tensor, scales: tuple[Any, Any] | None) -> None:
        n_streams, self.n = end.h.shape[:2]
        self.end, self.forming = end, scales is not None
        dtype = torch.promote_types(end.h.dtype, torch.float32)
        self.kl = end.h.new_zeros(n_streams, dtype=dtype)
        self.ce = end.h.new_zeros((), dtype=dtype)
        self.n_labelled = n_streams * (labels[: self.n] >= 0).sum(dtype=dtype)
        if scales is not None:
            self.dh = torch.zeros_like(end.h)
            self.c_kl = end.h.new_full((), end.kl / (n_streams * self.n), dtype=dtype) * scales[0]
            self.c_ce = scales[1] * end.ce / self.n_labelled

    def add(
        self,
        a: int,
        p: Tensor,
        p_log_p: Tensor,
        ids: Tensor,
        labels: Tensor,
        params: list[Tensor],
        room: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Score the tokens from `a` on, whose target is `p`; return gradients of `params`.

        `p_log_p` is sum_v p_v log p_v of every token; `room` is written over.
        """
        e, m = self.end, min(len(ids), self.n - a)
        if m <= 0 or not (e.kl or e.ce):
            return ()
        p, labels = p[:m], labels[:m]
        h = e.h[:, a : a + m].detach().requires_grad_()
        with torch.set_grad_enabled(self.forming):
            logits = e.unembed(h, ids[:m].expand(len(h), -1))  # stream token vocab
        q = _log_probs_in(room, logits.detach())
        label = labels.clamp(min=0).expand(len(h), -1).unsqueeze(-1)
        labelled = (labels >= 0).to(q.dtype)
        if e.ce:
            self.ce -= (q.gather(-1, label).squeeze(-1) * labelled).sum() / self.n_labelled
        if e.kl:
            self.kl += (p_log_p[:m] - torch.einsum("tv,stv->st", p, q)).sum(-1) / self.n
        if not self.forming:
            return ()
        c_ce = self.c_ce * labelled.unsqueeze(-1)  # token 1
        q.exp_().mul_(self.c_kl + c_ce).addcmul_(p, self.c_kl, value=-1)
        if e.ce:
            q.scatter_add_(-1, label, -c_ce.expand(len(h), -1, 1))
        dh, *rest = torch.autograd.grad(logits, [h, *params], q.to(logits.dtype), allow_unused=True)
        self.dh[:, a : a + m] = dh
        return tuple(rest)


class Moments(NamedTuple):
    """Count, mean and spread of vectors; those of two sets together are `of one + of the other`."""

    n: float
    mean: Float[Tensor, " d"]
    spread: Float[Tensor, ""]
    """sum_t |x_t - mean|^2"""

    @classmethod
    def of(cls, x: Float[Tensor, "*batch d"]) -> Moments:
        """Return the moments of vectors, in float32 or better."""
        flat = x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        mean = flat.mean(0)  # torch.var_mean over the first axis is much slower on a CPU
        return cls(len(flat), mean, (flat - mean).square_().sum())

    def join(self, other: Moments) -> Moments:
        """Return the moments of both sets as one (Chan et al. 1983), exact but for rounding.

        mean = (n m + n' m') / (n + n'),   spread = s + s' + |m' - m|^2 n n' / (n + n')
        """
        n, away = self.n + other.n, other.mean - self.mean
        spread = self.spread + other.spread + away.square().sum() * (self.n * other.n / n)
        return Moments(n, self.mean + away * (other.n / n), spread)


def moments_of(targets: Sequence[Float[Tensor, "*batch _"]], processes: int = 1) -> list[Moments]:
    """Return the moments of each target.

    With `processes` above 1 every process calls this with its own rows, equally many, and gets the
    moments of all rows.
    """
    return of_all_processes([Moments.of(t) for t in targets], processes)


def of_all_processes(mine: Sequence[Moments], processes: int) -> list[Moments]:
    """Join each process's moments of equally many rows; every process gets those of all rows."""
    if processes == 1:
        return list(mine)
    sent = torch.cat([torch.cat([m.mean, m.spread[None]]) for m in mine])
    everyones = [torch.empty_like(sent) for _ in range(processes)]
    torch.distributed.all_gather(everyones, sent)
    per_target = zip(*(x.split([len(m.mean) + 1 for m in mine]) for x in everyones), strict=True)
    return [
        reduce(Moments.join, (Moments(m.n, x[:-1], x[-1]) for x in parts))
        for m, parts in zip(mine, per_target, strict=True)
    ]


Normalised = Literal["fvu", "per_token", "uncentred"]


def nmse(
    x: Float[Tensor, "*batch d"],
    target: Float[Tensor, "*batch d"],
    moments: Moments | None = None,
    by: Normalised = "fvu",
) -> Float[Tensor, ""]:
    """Return a normalised squared error, a fraction; 0 is perfect. t over batch and positions:

        "fvu"        sum_t |x_t - target_t|^2 / sum_t |target_t - mean|^2
        "per_token"  mean_t (|x_t - target_t|^2 / (|target_t - mean|^2 + 1e-8))
        "uncentred"  sum_t |x_t - target_t|^2 / sum_t |target_t|^2

    Definitions A, B and C of method.md 3.3; the first is the fraction of variance unexplained, 1
    where x is as good as the mean. Denominators are detached, so the target cannot lower its loss
    by growing. `moments` are those of the whole of which `target` holds some rows, by default of
    the target itself; the errors of all its parts add up to that of the whole.
    """
    x, target = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, target))
    n, mean, spread = moments or Moments.of(target)
    if by == "per_token":
        away = (target.detach() - mean).square().sum(-1) + 1e-8
        return ((x - target).square().sum(-1) / away).sum() / n
    below = spread if by == "fvu" else spread + n * mean.square().sum()
    return mse_loss(x, target, reduction="sum") / below
