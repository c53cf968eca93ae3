"""AbsTopK: keep the k largest magnitudes of every vector, exactly, on every device.

    y_i = x_i  if i is among the first k by (|x| descending, index ascending), else +0

|x| is ordered by its bits without the sign, which have the order of the numbers. A NaN is above
infinity in this order, so that it is kept, and can be seen, rather than dropped. `kept_reference`
is the definition. The implementations find the k-th magnitude and keep what is above it: numpy on a
CPU (abs_topk_cpu.py), a Triton kernel on CUDA (abs_topk_cuda.py) and `kept_threshold` elsewhere.
All give the same bits.

The gradient reaches the entries where y is not 0, and all entries of a vector whose y has fewer
than k nonzeros. So the backward pass needs only y. That costs no memory, because the next layer
keeps y for its own backward pass anyway.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .abs_topk_cpu import backward_cpu, forward_cpu
from .bits import BITS, magnitude


def abs_topk(x: Float[Tensor, "*batch d"], k: int) -> Float[Tensor, "*batch d"]:
    """Keep the `k` entries of largest magnitude in each vector and zero the rest.

        y_i = x_i  if |x_i| is one of the k largest in |x|, else 0

    Exactly k entries are kept; of equal magnitudes, those of lowest index are. The gradient reaches
    the kept entries. Where fewer than k entries of a vector are nonzero, nothing is dropped, y = x,
    and the gradient is the identity; if it only reached the k chosen entries, index order would
    decide which zeros may grow. Raises ValueError for k outside 1..d and for a dtype that is not
    float64, float32, bfloat16 or float16.

    >>> import torch
    >>> from sparse import abs_topk
    >>> abs_topk(torch.tensor([1.0, -3.0, 2.0, 0.5]), k=2)
    tensor([ 0., -3.,  2.,  0.])
    """
    d = x.shape[-1]
    if not 1 <= k <= d:
        raise ValueError(f"abs_topk: k={k} is outside 1..{d}, the width of x")
    if x.dtype not in BITS:
        raise ValueError(f"abs_topk: {x.dtype} is none of {', '.join(map(str, BITS))}; cast x")
    return x if k == d else torch.ops.sparse_bridges.abs_topk(x, k)


def kept_reference(x: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """Mark the first k entries by (|x| descending, index ascending); this is the definition."""
    order = magnitude(x).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)


def kept_threshold(x: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """Mark the same entries, found from the k-th magnitude t.

    It runs on any device and does not make the host wait for the device.
    """
    a = magnitude(x)
    t = a.topk(k, dim=-1).values[..., -1:]
    above, tied = a > t, a == t
    places = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= places))


def passes_gradient(y: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """Mark the entries of x that the gradient of y = abs_topk(x, k) reaches."""
    kept = magnitude(y) != 0
    return kept | (kept.sum(-1, keepdim=True) < k)


def _forward(x: Tensor, k: int) -> Tensor:
    return torch.where(kept_threshold(x, k), x, 0.0).contiguous()


def _backward(grad: Tensor, y: Tensor, k: int) -> Tensor:
    return torch.where(passes_gradient(y, k), grad, 0.0).contiguous()


@cache
def _kernels():
    """Return the module of Triton kernels, or None without triton.

    It is imported when the first CUDA tensor comes, so that a CPU needs no triton.
    """
    return import_module(".abs_topk_cuda", __package__) if find_spec("triton") else None


def _forward_cuda(x: Tensor, k: int) -> Tensor:
    kernels = _kernels()
    return (kernels.forward if kernels and kernels.fits(x) else _forward)(x, k)


def _backward_cuda(grad: Tensor, y: Tensor, k: int) -> Tensor:
    kernels = _kernels()
    return (kernels.backward if kernels and kernels.fits(y) else _backward)(grad, y, k)


def _declare() -> None:
    """Register abs_topk and its backward as operators of torch.

    So torch.compile treats each as one operation, and each device gets its own implementation.
    """
    torch.library.define("sparse_bridges::abs_topk", "(Tensor x, int k) -> Tensor")
    torch.library.define(
        "sparse_bridges::abs_topk_backward", "(Tensor grad, Tensor y, int k) -> Tensor"
    )
    ops = torch.ops.sparse_bridges
    kinds = {
        "abs_topk": (_forward, forward_cpu, _forward_cuda),
        "abs_topk_backward": (_backward, backward_cpu, _backward_cuda),
    }
    for name, (anywhere, cpu, cuda) in kinds.items():
        op = f"sparse_bridges::{name}"
        torch.library.impl(op, "CompositeExplicitAutograd", anywhere)
        torch.library.impl(op, "CPU", cpu)
        torch.library.impl(op, "CUDA", cuda)
        torch.library.register_fake(op, lambda x, *_: x.new_empty(x.shape))

    def keep_output(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)
        ctx.k = inputs[-1]

    def keep_input(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.k = inputs[-1]

    torch.library.register_autograd(
        "sparse_bridges::abs_topk",
        lambda ctx, grad: (ops.abs_topk_backward(grad, *ctx.saved_tensors, ctx.k), None),
        setup_context=keep_output,
    )
    torch.library.register_autograd(
        "sparse_bridges::abs_topk_backward",  # linear in grad, so its own backward
        lambda ctx, grad: (ops.abs_topk_backward(grad, *ctx.saved_tensors, ctx.k), None, None),
        setup_context=keep_input,
    )


_declare()


class AbsTopK(nn.Module):
    """AbsTopK as a module, which keeps k of `width` entries; each node location is one.

    Its output holds the values of the nodes at the location, so a hook on it reads or replaces
    them (`sparse.circuits.taps.edited`).
    """

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.width, self.k = width, k

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return abs_topk(x, self.k)

    def extra_repr(self) -> str:
        return f"{self.width}, k={self.k}"
