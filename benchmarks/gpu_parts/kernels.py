"""The kernels: each against the plain form of the same quantity, and against its floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from abs_topk import plain as topk_gather_scatter
from projection import plain_ as two_topks_
from torch import Tensor

from bridges.losses.chunked import Stream, score_streams
from bridges.losses.quantities import kl_nats
from sparse import abs_topk
from sparse.ops.abs_topk import kept_reference
from sparse.ops.attention_sink import flash_sink, masked_sink
from sparse.ops.project import chosen_reference, project_
from sparse.training.sparsity import Budget

from .measure import Ceilings, Clock, Row, apart, spread

HALF, FULL = torch.bfloat16, torch.float32
DENSITY = 1 / 16
SIZES = {  # by kind of device; the twins of GPT-2 are 1024 and 2048 wide, their MLPs four times
    "cuda": {
        "topk": [(16384, 1024), (16384, 2048), (16384, 4096), (4096, 8192)],
        "project": [(768, 768), (4096, 1024), (8192, 2048), (4096, 4096)],
        "attention": [(32, 64, 512, 16), (32, 128, 512, 16), (8, 16, 1024, 64)],
        "losses": [(4096, 1024, 768, 50257), (16384, 2048, 768, 50257)],
    },
    "cpu": {
        "topk": [(4, 32)],
        "project": [(24, 16)],
        "attention": [(1, 2, 16, 8)],
        "losses": [(32, 16, 12, 64)],
    },
}


def abs_topk_rows(clock: Clock, top: Ceilings) -> Iterator[Row]:
    """AbsTopK, forward and backward. On a CPU the Triton kernels run in Triton's interpreter.

    Bytes: x and y once forward; dy, y and dx once backward.
    """
    for n, d in SIZES[clock.device.type]["topk"]:
        for dtype in (HALF, FULL):
            x = torch.randn(n, d, device=clock.device).to(dtype).requires_grad_()
            dy, k = torch.randn_like(x), d // 4

            def both(form: Callable, x=x, dy=dy, k=k) -> tuple[Tensor, Tensor]:
                y = form(x, k)
                return y.detach(), torch.autograd.grad(y, x, dy)[0]

            ours = partial(both, abs_topk if x.is_cuda else _by_kernels)
            mine, theirs = clock.turns(ours, partial(both, topk_gather_scatter))
            kept = kept_reference(x.detach(), k)
            want = [torch.where(kept, t, 0.0) for t in (x.detach(), dy)]
            n_bytes = 5 * x.numel() * x.element_size()
            yield Row(
                part="abs_topk",
                case=f"{n} x {d} {_short(dtype)}",
                reference="topk, gather, scatter",
                reference_ms=1e3 * median(theirs),
                apart=apart(ours(), want),
                floor="5 numbers moved per entry",
                floor_ms=1e3 * top.seconds(n_bytes),
                **spread(mine),
            )


class _ByKernels(torch.autograd.Function):
    """The Triton kernels themselves, which `abs_topk` calls on CUDA only."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int) -> Tensor:
        y = _kernels().forward(x, k)
        ctx.save_for_backward(y)
        ctx.k = k
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _kernels().backward(dy, *ctx.saved_tensors, ctx.k), None


_by_kernels = _ByKernels.apply


def _kernels() -> Any:
    return import_module("sparse.ops.abs_topk_cuda")


def projection_rows(clock: Clock, top: Ceilings) -> Iterator[Row]:
    """The projection of a matrix with a floor per row, after a copy of the weights as they were.

    Bytes: the copy and the projection each read and write every weight once.
    """
    project = project_ if clock.device.type == "cuda" else _project_by_kernels
    for shape in SIZES[clock.device.type]["project"]:
        weight = torch.randn(shape, device=clock.device)
        floor = min(4, shape[1] // 16)
        budget = Budget("", torch.nn.Parameter(weight), False, floor, 0)
        keep = budget.keep((DENSITY, DENSITY))
        room, other = torch.empty_like(weight), torch.empty_like(weight)

        def ours(room=room, weight=weight, keep=keep, floor=floor) -> None:
            project(room.copy_(weight), keep, floor, 0)

        def plain(other=other, weight=weight, keep=keep, budget=budget) -> None:
            two_topks_(budget, other.copy_(weight), keep)

        mine, theirs = clock.turns(ours, plain)
        kept = chosen_reference(weight, keep, floor, 0)
        yield Row(
            part="projection",
            case=f"{shape[0]} x {shape[1]} fp32, {DENSITY:g} kept",
            reference="two topks, masks",
            reference_ms=1e3 * median(theirs),
            apart=apart([room], [torch.where(kept, weight, 0.0)]),
            floor="4 numbers moved per weight",
            floor_ms=1e3 * top.seconds(4 * weight.nbytes),
            **spread(mine),
        )


def _project_by_kernels(weight: Tensor, keep: int, floor: int, dim: int) -> None:
    import_module("sparse.ops.project_cuda").project_(weight, keep, floor, dim)


def attention_rows(clock: Clock, top: Ceilings) -> Iterator[Row]:
    """Attention with sinks, forward and backward.

    FLOPs: 2 products forward, 5 backward, of T^2 / 2 scores: 7 B H T^2 d_head. Bytes: q, k, v, y
    forward; these, dy and three gradients backward.
    """
    for size in SIZES[clock.device.type]["attention"]:
        n, n_head, length, d_head = size
        for dtype in (HALF, FULL):
            made = [torch.randn(n, length, n_head, d_head, device=clock.device) for _ in range(3)]
            x = [t.to(dtype).transpose(1, 2).requires_grad_() for t in made]
            x += [torch.randn(n_head, device=clock.device).requires_grad_()]
            dy = torch.randn_like(x[0])

            def both(form: Callable, x=x, dy=dy, scale=d_head**-0.5) -> list[Tensor]:
                y = form(*x, scale)
                return [y.detach(), *torch.autograd.grad(y, x, dy)]

            ours, plain = partial(both, flash_sink), partial(both, _masked)
            mine, theirs = clock.turns(ours, plain)
            flops, n_bytes = 7 * n * n_head * length**2 * d_head, 12 * x[0].nbytes
            yield Row(
                part="attention with sinks",
                case=f"{n} x {n_head} heads x {length} x {d_head} {_short(dtype)}",
                reference="a mask with an extra column",
                reference_ms=1e3 * median(theirs),
                apart=apart(ours(), plain()),
                floor="7 B H T^2 d_head FLOPs, or 12 tensors moved",
                floor_ms=1e3 * top.seconds(n_bytes, flops, dtype),
                **spread(mine),
            )


def _masked(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float) -> Tensor:
    return masked_sink(q, k, v, None, sink, scale).transpose(1, 2)


def loss_rows(clock: Clock, top: Ceilings) -> Iterator[Row]:
    """KL and cross entropy of a stream in chunks, with gradients, under bfloat16 autocast.

    FLOPs: the logits of both models forward, and two products of the twin's backward.
    """
    for n, d, d_dense, vocab in SIZES[clock.device.type]["losses"]:
        make = partial(torch.randn, device=clock.device)
        heads = [(make(vocab, w) / w**0.5).requires_grad_() for w in (d_dense, d)]
        h = [make(1, n, w).requires_grad_() for w in (d_dense, d)]
        ids = torch.randint(vocab, (n,), device=clock.device)
        wanted = [h[1], heads[1]]

        def chunks(h=h, heads=heads, ids=ids, vocab=vocab, wanted=wanted) -> list[Tensor]:
            tails = [lambda x, _, w=w: F.linear(x, w) for w in heads]
            with torch.autocast(ids.device.type, HALF):
                stream = Stream(tails[1], h[1], kl=1.0, ce=1.0)
                target = Stream(tails[0], h[0])
                (found,) = score_streams(target, [stream], ids, ids, vocab, [heads[1]])
                total = found.kl + found.ce
            return [found.kl.detach(), *torch.autograd.grad(total, wanted)]

        def whole(h=h, heads=heads, ids=ids, wanted=wanted) -> list[Tensor]:
            with torch.autocast(ids.device.type, HALF):
                p, q = (F.linear(x[0], w) for x, w in zip(h, heads, strict=True))
                kl = kl_nats(p.detach(), q).mean()
                total = kl + F.cross_entropy(q.float(), ids)
            return [kl.detach(), *torch.autograd.grad(total, wanted)]

        mine, theirs = clock.turns(chunks, whole)
        yield Row(
            part="chunked losses",
            case=f"{n} tokens, {d} wide, vocabulary {vocab}, bf16",
            reference="all logits at once",
            reference_ms=1e3 * median(theirs),
            apart=apart(chunks(), whole()),
            floor="2 n V (d_dense + 3 d) FLOPs",
            floor_ms=1e3 * top.seconds(flops=2 * n * vocab * (d_dense + 3 * d)),
            **spread(mine),
        )


def _short(dtype: torch.dtype) -> str:
    return {HALF: "bf16", FULL: "fp32"}[dtype]
