"""Products with weights that are mostly zero, on a CPU, by compressed rows (CSR).

    y = x W^T + b        dx = g W        dW = g^T x

g is the gradient of y. In compressed rows only the nonzero weights are stored, so the first two
products cost one multiply-add per nonzero weight and row of x. The third stays dense, because Adam
needs the gradient of every entry. The sums are those of the dense products in another order, so
results differ from them by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csc_array, csr_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

MAX_DENSITY = 1 / 8
"""Fraction of nonzero weights from which the dense product is as fast."""
ROWS_AT_ONCE = 256
"""Rows of x per product, so that x and y stay in the cache; 128 to 512 are equally fast."""

WORTH_REBUILDING = 1 << 16
"""Least number of entries of a weight that is worth compressing anew at every training step,
measured at 1,024 rows of x or more. For smaller ones the two transposes cost more than is saved."""


@contextmanager
def csr_products(model: nn.Module, min_entries: int = 0) -> Iterator[tuple[str, ...]]:
    """Run the sparse linears of `model` by compressed rows while the context is open.

    Yields their names. They are the nn.Linear modules with float32 or float64 weights on the CPU,
    of at least `min_entries` entries, fewer than 1/8 of them nonzero. All other products run as
    they do without the context. So do

    - products under autocast;
    - all products of a model under gradient checkpointing, whose backward pass computes them again,
      perhaps outside the context;
    - all products of a model whose sublayers are compiled (a module's `sublayers_compiled`).

    The weights are read once, on entry. A weight that is changed inside is a ValueError at its next
    use, as far as torch sees the change; it does not see a write through `.data`. Gradients are
    those for the weights as read, and the backward pass may run after the context has closed. A NaN
    or infinity in x reaches only the outputs that have a nonzero weight for it; in a dense product
    it would reach all.
    """
    matrices, names = {}, []
    linears = [] if _checkpoints(model) or _is_compiled(model) else model.named_modules()
    for name, module in linears:
        if not isinstance(module, nn.Linear) or module.weight.numel() < min_entries:
            continue
        if matrix := _compress(name, module.weight):
            matrices[id(module.weight)] = matrix
            names.append(name)
    # without matrices no mode is entered, since torch.compile would trace it
    with _Products(matrices) if matrices else nullcontext():
        yield tuple(names)


def _checkpoints(model: nn.Module) -> bool:
    return any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _is_compiled(model: nn.Module) -> bool:
    return any(getattr(m, "sublayers_compiled", False) for m in model.modules())


class _Matrix:
    """A weight, its nonzero entries in compressed rows, and its version when they were read."""

    def __init__(self, name: str, weight: Tensor, rows: csr_array) -> None:
        self.name, self.weight, self.version = name, weight, weight._version
        self.rows, self.columns = rows, rows.T  # both share one set of arrays


def _compress(name: str, weight: Tensor) -> _Matrix | None:
    """Return the weight in compressed rows, or None where the dense product is as fast."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return None
    w = np.from_dlpack(weight.detach())  # .numpy() would keep a gathered shard from being freed
    nonzero = w != 0
    if np.count_nonzero(nonzero) >= MAX_DENSITY * w.size:
        return None
    n, width = w.shape
    at = np.flatnonzero(nonzero)
    starts = np.searchsorted(at, np.arange(n + 1) * width).astype(np.int32)
    values, columns = w.reshape(-1)[at], (at % width).astype(np.int32)
    return _Matrix(name, weight, csr_array((values, columns, starts), shape=w.shape))


class _Products(TorchFunctionMode):
    """A mode of torch that computes F.linear for the weights it knows; no module is changed."""

    def __init__(self, matrices: dict[int, _Matrix]) -> None:
        super().__init__()
        self.matrices = matrices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and not torch.is_autocast_enabled("cpu"):
            matrix, x, bias = self._find(*args, **kwargs)
            if matrix is not None:
                return _Linear.apply(x, matrix.weight, bias, matrix.rows, matrix.columns)
        return func(*args, **kwargs)

    def _find(self, input, weight, bias=None):
        matrix = self.matrices.get(id(weight))
        if matrix is None or input.dtype != weight.dtype or input.shape[-1:] != weight.shape[1:]:
            return None, input, bias
        if weight._version != matrix.version:
            raise ValueError(
                f"csr_products: the weight of {matrix.name or 'the model'} was changed inside the "
                "context, which has read it at its entry; close the context before the change"
            )
        return matrix, input, bias


class _Linear(torch.autograd.Function):
    """x W^T + b with W in compressed rows, and its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, rows, columns) -> Tensor:
        ctx.columns, ctx.width = columns, weight.shape[1]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        y = _times(rows, _flat(x), weight.shape[0])
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        g = _flat(grad)
        shape = (*grad.shape[:-1], ctx.width)
        dx = _times(ctx.columns, g, ctx.width).view(shape) if wants_x else None
        dweight = g.t() @ _flat(x) if wants_weight else None
        return dx, dweight, g.sum(0) if wants_bias else None, None, None


def _flat(x: Tensor) -> Tensor:
    """Return x with all leading axes as one; x may be empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _times(matrix: csr_array | csc_array, x: Tensor, width: int) -> Tensor:
    """Return x M^T for a compressed M of `width` rows."""
    y = x.new_empty(len(x), width)
    for i in range(0, len(x), ROWS_AT_ONCE):
        part = x[i : i + ROWS_AT_ONCE].t().contiguous().numpy()
        y[i : i + ROWS_AT_ONCE] = torch.from_numpy(matrix @ part).t()
    return y
