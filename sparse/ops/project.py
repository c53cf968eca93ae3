"""The projection: keep exactly k weights of a matrix, and of these at least a floor per neuron.

`chosen_reference` defines which entries are kept. project_cpu.py and project_cuda.py find the same
ones faster, and `project_` decides which of them runs.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .bits import BITS
from .project_cpu import chosen_cpu


@torch.no_grad()
def project_(weight: Float[Tensor, "out in"], keep: int, floor: int = 0, dim: int = 0) -> None:
    """Set all but `keep` entries of `weight` to zero in place; the largest magnitudes are kept.

    First the `floor` largest entries of each row (`dim=0`) or column (`dim=1`) are chosen, so that
    no neuron dies; the rest of the `keep` places go to the largest entries that remain. Of equal
    magnitudes those of lowest index are chosen (docs/method.md#projection). An entry that is chosen
    while it is zero stays zero, so fewer than `keep` nonzeros may be left. Raises ValueError where
    the floors do not fit into `keep`, or `keep` into the matrix.

    >>> import torch
    >>> from sparse import project_
    >>> weight = torch.tensor([[5.0, 4.0, 3.0], [0.3, 0.2, 0.1]])
    >>> project_(weight, keep=3, floor=1)  # without the floor the second neuron would die
    >>> weight
    tensor([[5.0000, 4.0000, 0.0000],
            [0.3000, 0.0000, 0.0000]])
    """
    if dim not in (0, 1):
        raise ValueError(f"project_: dim={dim} must be 0 (protect rows) or 1 (protect columns)")
    n_slices, width = weight.shape if dim == 0 else weight.shape[::-1]
    if not (0 <= floor <= width and n_slices * floor <= keep <= weight.numel()):
        raise ValueError(
            f"project_: cannot keep {keep} of a {weight.shape[0]}x{weight.shape[1]} matrix with "
            f"{floor} per {'row' if dim == 0 else 'column'}; keep must be in "
            f"{n_slices * floor}..{weight.numel()}; raise the density or lower the floor"
        )
    if weight.device.type == "cpu":
        chosen = chosen_cpu(weight, keep, floor, dim).numpy()
        bits = weight.detach().view(BITS[weight.dtype][0]).numpy()
        np.multiply(bits, chosen, out=bits)
        torch.autograd.graph.increment_version(weight)  # torch did not see numpy write to it
    elif weight.is_cuda and (kernels := _kernels()) and kernels.fits(weight, floor, dim):
        kernels.project_(weight, keep, floor, dim)
        torch.autograd.graph.increment_version(weight)
    else:
        weight.masked_fill_(~chosen_reference(weight, keep, floor, dim), 0.0)


@cache
def _kernels():
    """Return the module of Triton kernels, or None without triton.

    It is imported when the first CUDA tensor comes, so that a CPU needs no triton.
    """
    return import_module(".project_cuda", __package__) if find_spec("triton") else None


def chosen_reference(
    weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int
) -> Bool[Tensor, "out in"]:
    """Mark the entries that `project_` keeps; this is the definition, by two stable sorts.

        score  = |w|,  and infinity for the `floor` largest entries of every slice
        chosen = the `keep` highest scores, ties to the lowest index

    The slices are the rows (`dim=0`) or the columns (`dim=1`).
    """
    score = weight.abs()
    if floor:
        across = 1 - dim
        order = score.argsort(dim=across, descending=True, stable=True)
        score = score.scatter(across, order.narrow(across, 0, floor), torch.inf)
    best = score.flatten().argsort(descending=True, stable=True)[:keep]
    chosen = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    return chosen.index_fill(0, best, True).view(weight.shape)
