"""Products with weights that are mostly zero, on a CPU, by compressed rows (CSR).

    y = x W^T + b        dx = g W        dW = g^T x

g is the gradient of y. In compressed rows only the nonzero weights are stored, so the first two
products cost one multiply-add per nonzero weight and row of x. The third stays dense, because Adam
needs the gradient of every entry. The sums are those of the dense products in another order, so
results differ from them by rounding only. Which library computes them is `Products`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

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

Products = Literal["scipy", "mkl", "dense"]
"""Which library computes the products with a sparse weight.

    value       y and dx                   dW
    "scipy"     scipy                      torch's dense product
    "mkl"       MKL, by torch's CSR        oneDNN (formerly MKL-DNN) in float32, torch in float64
    "dense"     torch's dense product      torch's dense product: no weight is compressed

All are equal but for rounding. "mkl" needs a torch that was built with MKL and oneDNN.
"""


def fastest_products() -> Products:
    """Return the value of `Products` that is fastest here: "mkl" where torch has it, else "scipy".

    It follows from how torch was built and from nothing else, so the same torch always gives the
    same answer.
    """
    return "mkl" if _has_mkl() else "scipy"


def _has_mkl() -> bool:
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@contextmanager
def csr_products(
    model: nn.Module, min_entries: int = 0, products: Products = "scipy"
) -> Iterator[tuple[str, ...]]:
    """Run the sparse linears of `model` by compressed rows while the context is open.

    Yields their names. They are the nn.Linear modules with float32 or float64 weights on the CPU,
    of at least `min_entries` entries, fewer than 1/8 of them nonzero; with `products="dense"` there
    are none. All other products run as they do without the context. So do

    - products under autocast;
    - all products of a model under gradient checkpointing, whose backward pass computes them again,
      perhaps outside the context;
    - all products of a model whose sublayers are compiled (a module's `sublayers_compiled`).

    The weights are read once, on entry. A weight that is changed inside is a ValueError at its next
    use, as far as torch sees the change; it does not see a write through `.data`. Gradients are
    those for the weights as read, and the backward pass may run after the context has closed. A NaN
    or infinity in x reaches only the outputs that have a nonzero weight for it; in a dense product
    it would reach all. Raises ValueError for "mkl" where torch lacks it.
    """
    matrices, names = {}, []
    dense = products == "dense" or _checkpoints(model) or _is_compiled(model)
    for name, module in [] if dense else model.named_modules():
        if not isinstance(module, nn.Linear) or module.weight.numel() < min_entries:
            continue
        if matrix := _compress(name, module.weight, products):
            matrices[id(module.weight)] = matrix
            names.append(name)
    # without matrices no mode is entered, since torch.compile would trace it
    with _Products(matrices) if matrices else nullcontext():
        yield tuple(names)


def _checkpoints(model: nn.Module) -> bool:
    return any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _is_compiled(model: nn.Module) -> bool:
    return any(getattr(m, "sublayers_compiled", False) for m in model.modules())


class _Library(NamedTuple):
    """How one library computes the three products. Its matrices are in a form of its own."""

    stored: Callable[[csr_array | csc_array], Any]
    """Returns a compressed matrix in the library's form."""
    times: Callable[[Any, Tensor], Tensor]
    """Returns M X for a stored M and a dense X, whose columns are the rows of x."""
    gradient: Callable[[Tensor, Tensor], Tensor]
    """Returns g^T x for dense g and x."""


def _torch_csr(matrix: csr_array | csc_array) -> Tensor:
    rows = matrix.tocsr()
    parts = map(torch.from_numpy, (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():  # torch calls the whole layout a beta
        warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
        return torch.sparse_csr_tensor(*parts, size=rows.shape, check_invariants=False)


def _scipy_times(matrix: csr_array | csc_array, x: Tensor) -> Tensor:
    return torch.from_numpy(matrix @ x.numpy())


def _torch_gradient(g: Tensor, x: Tensor) -> Tensor:
    return g.t() @ x


def _onednn_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Return g^T x by oneDNN, which has neither float64 nor sums of no terms.

    torch's own product is MKL's, which uses AVX-512 on Intel's processors only: on an AMD EPYC of
    family 26 oneDNN is 1.4 to 2.1 times as fast.
    """
    if g.dtype != torch.float32 or not len(g):
        return _torch_gradient(g, x)
    return torch.ops.mkldnn._linear_pointwise(g.t(), x.t(), None, "none", [], "")


_LIBRARIES = {
    "scipy": _Library(lambda matrix: matrix, _scipy_times, _torch_gradient),
    "mkl": _Library(_torch_csr, torch.mm, _onednn_gradient),
}


class _Matrix:
    """A weight, its nonzero entries in compressed rows, and its version when they were read."""

    def __init__(self, name: str, weight: Tensor, rows: csr_array, library: _Library) -> None:
        self.name, self.weight, self.version = name, weight, weight._version
        self.library, self.rows, self.columns = library, *map(library.stored, (rows, rows.T))


def _compress(name: str, weight: Tensor, products: Products) -> _Matrix | None:
    """Return the weight in compressed rows, or None where the dense product is as fast."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return None
    w = np.from_dlpack(weight.detach())  # .numpy() would keep a gathered shard from being freed
    nonzero = w != 0
    if np.count_nonzero(nonzero) >= MAX_DENSITY * w.size:
        return None
    if products == "mkl" and not _has_mkl():
        raise ValueError(
            'csr_products: products="mkl", but this torch was built without MKL or without oneDNN; '
            'install one that has both, or take "scipy" or "dense"'
        )
    n, width = w.shape
    at = np.flatnonzero(nonzero)
    starts = np.searchsorted(at, np.arange(n + 1) * width).astype(np.int32)
    values, columns = w.reshape(-1)[at], (at % width).astype(np.int32)
    rows = csr_array((values, columns, starts), shape=w.shape)
    return _Matrix(name, weight, rows, _LIBRARIES[products])


class _Products(TorchFunctionMode):
    """A mode of torch that computes F.linear for the weights it knows; no module is changed."""

    def __init__(self, matrices: dict[int, _Matrix]) -> None:
        super().__init__()
        self.matrices = matrices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and not torch.is_autocast_enabled("cpu"):
            m, x, bias = self._find(*args, **kwargs)
            if m is not None:
                return _Linear.apply(x, m.weight, bias, m.library, m.rows, m.columns)
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
    def forward(ctx, x: Tensor, weight: Tensor, bias, library: _Library, rows, columns) -> Tensor:
        ctx.library, ctx.columns, ctx.width = library, columns, weight.shape[1]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        y = _times(library, rows, _flat(x), weight.shape[0])
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
        dx = _times(ctx.library, ctx.columns, g, ctx.width).view(shape) if wants_x else None
        dweight = ctx.library.gradient(g, _flat(x)) if wants_weight else None
        return dx, dweight, g.sum(0) if wants_bias else None, None, None, None


def _flat(x: Tensor) -> Tensor:
    """Return x with all leading axes as one; x may be empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _times(library: _Library, matrix: Any, x: Tensor, width: int) -> Tensor:
    """Return x M^T for a stored M of `width` rows."""
    y = x.new_empty(len(x), width)
    for i in range(0, len(x), ROWS_AT_ONCE):
        part = x[i : i + ROWS_AT_ONCE].t().contiguous()
        y[i : i + ROWS_AT_ONCE] = library.times(matrix, part).t()
    return y
