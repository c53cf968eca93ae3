"""How many weights survive at each step, and which: the schedule and the exact projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import floor as round_down
from math import log
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .activation import BITS
from .blocks import MLP, Attention
from .model import SparseGPT
from .shard import whole_

BLOCK = 1 << 17
"""Entries that a CPU looks at together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anneal:
    """The sparsity schedule: a pure function of the optimizer step (method.md 2.2)."""

    target: float
    """Fraction of weights kept once annealed, in (0, 1]."""
    start: int | float
    """Optimizer step at which annealing begins; up to it every weight is kept."""
    end: int | float
    """Optimizer step from which the target is held."""
    mode: Literal["linear", "log"] = "linear"
    """"linear": p falls along a line in t. "log": log p falls along a line in log t."""

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"Anneal.target={self.target} must be in (0, 1]")
        if not 0 <= self.start < self.end:
            raise ValueError(f"Anneal needs 0 <= start < end, got {self.start}, {self.end}")
        if self.mode == "log" and self.start == 0:
            raise ValueError(
                "Anneal: mode 'log' takes the logarithm of the step, so start must be above 0"
            )

    def keep(self, step: int) -> float:
        """p(t) = 1 + u (target - 1)  with  u = (t - start) / (end - start) clipped to [0, 1].

        In mode "log": p(t) = target^u  with  u = log(t / start) / log(end / start), clipped too.
        """
        if step >= self.end or step <= self.start:
            return self.target if step >= self.end else 1.0
        if self.mode == "log":
            return self.target ** (log(step / self.start) / log(self.end / self.start))
        return 1.0 + (step - self.start) / (self.end - self.start) * (self.target - 1.0)

    def lr_scale(self, step: int) -> float:
        """The sharkfin factor sqrt(target / p(t)): 1 once annealed, smaller before (2.3)."""
        return (self.target / self.keep(step)) ** 0.5


@torch.no_grad()
def project_(weight: Float[Tensor, "out in"], keep: int, floor: int = 0, dim: int = 0) -> None:
    """Zero all but `keep` entries of `weight` in place, largest magnitudes first.

    Each row (`dim=0`) or column (`dim=1`) is first granted its own `floor` largest entries, so no
    neuron dies; the rest of the budget goes to the largest of what remains. Exactly `keep` entries
    are chosen; ties go to the lowest index (method.md 2.4). A chosen zero stays zero.
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
        torch.autograd.graph.increment_version(weight)  # numpy wrote behind torch's back
    elif weight.is_cuda and (kernels := _kernels()) and kernels.fits(weight, floor, dim):
        kernels.project_(weight, keep, floor, dim)
        torch.autograd.graph.increment_version(weight)
    else:
        weight.masked_fill_(~chosen_reference(weight, keep, floor, dim), 0.0)


@cache
def _kernels():
    """The Triton kernels, imported when the first CUDA tensor comes; None without triton."""
    return import_module(".kernels_project", __package__) if find_spec("triton") else None


def chosen_reference(
    weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int
) -> Bool[Tensor, "out in"]:
    """Mark the entries that `project_` keeps: the definition, by two stable sorts."""
    score = weight.abs()
    if floor:
        across = 1 - dim
        order = score.argsort(dim=across, descending=True, stable=True)
        score = score.scatter(across, order.narrow(across, 0, floor), torch.inf)
    best = score.flatten().argsort(descending=True, stable=True)[:keep]
    chosen = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    return chosen.index_fill(0, best, True).view(weight.shape)


def chosen_cpu(
    weight: Float[Tensor, "out in"], keep: int, floor: int, dim: int
) -> Bool[Tensor, "out in"]:
    """Mark the same entries on the bits of |weight|, which order as |weight| does.

    If the plain global choice gives every slice its floor, it is the answer. Otherwise the slices
    that lack entries get theirs, and the smallest that other slices can spare pay for them.
    """
    bits = weight.detach().contiguous().view(BITS[weight.dtype][0]).numpy()
    chosen = _largest(bits.reshape(-1), keep).reshape(bits.shape)
    if floor:
        narrow = np.uint16 if bits.shape[1 - dim] < 1 << 16 else np.int64  # a fifth of the time
        counts = chosen.view(np.uint8).sum(axis=1 - dim, dtype=narrow).astype(np.int64)
        lacking = np.flatnonzero(counts < floor)
        if lacking.size:
            extra = int((floor - counts[lacking]).sum())
            lines = bits[lacking] if dim == 0 else bits[:, lacking].T
            for places in _largest_per_row(_magnitude(lines), floor):
                chosen[(lacking, places) if dim == 0 else (places, lacking)] = True
            _drop_smallest(chosen, bits, np.maximum(counts - floor, 0), extra, dim)
    return torch.from_numpy(chosen)


def _magnitude(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """|x| as an integer, from the bits of x."""
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out, order="C")


def _largest(bits: np.ndarray, keep: int) -> np.ndarray:
    """Mark the `keep` largest magnitudes of a flat array, ties by lowest index.

    A sample brackets the threshold, so that only the entries near it are looked at one by one.
    Where the sample misleads the bracket is opened: the answer does not depend on it.
    """
    chosen, rest, v = _split(bits, *_bracket(bits, keep))
    places = keep - np.count_nonzero(chosen)
    if not 0 <= places <= rest.size:
        chosen, rest, v = _split(bits, 0, np.iinfo(bits.dtype).max)
        places = keep
    if places:
        t = np.partition(v, v.size - places)[v.size - places]
        reach = v >= t
        chosen[rest] = reach
        if excess := np.count_nonzero(reach) - places:
            chosen[rest[v == t][-excess:]] = False
    return chosen


def _bracket(bits: np.ndarray, keep: int) -> tuple[int, int]:
    """Two magnitudes of an even sample, three standard errors to either side of the threshold."""
    least, most = 0, np.iinfo(bits.dtype).max
    n = max(4096, bits.size // 64)
    if bits.size < 8 * n:
        return least, most
    sample = _magnitude(bits[:: bits.size // n | 1])  # an odd stride visits every column
    n, p = sample.size, keep / bits.size
    slack = 3 * (n * p * (1 - p)) ** 0.5 + 3
    below, above = n - int(n * p + slack), n - int(n * p - slack)
    inside = [i for i in (below, above) if 0 <= i < n]
    if inside:
        sample.partition(inside)
    lo = int(sample[below]) if below >= 0 else least
    return lo, int(sample[above]) if above < n else most


def _split(bits: np.ndarray, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mark the magnitudes above `hi`; return that, and where and what those in lo..hi are.

    A block at a time, so that what is written is read from the cache.
    """
    chosen = np.empty(bits.size, dtype=bool)
    a, near = np.empty(BLOCK, dtype=bits.dtype), np.empty(BLOCK, dtype=bool)
    rest, values = [], []
    for i in range(0, bits.size, BLOCK):
        c = chosen[i : i + BLOCK]
        x = _magnitude(bits[i : i + BLOCK], out=a[: c.size])
        np.greater(x, hi, out=c)
        at = np.flatnonzero(np.not_equal(np.greater_equal(x, lo, out=near[: c.size]), c))
        values.append(x[at])
        rest.append(at + i)
    return chosen, np.concatenate(rest), np.concatenate(values)


def _largest_per_row(a: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Yield the column of every row's largest entry, then of the next, `n` in all; spoils `a`."""
    rows = np.arange(len(a))
    for _ in range(n):
        best = a.argmax(axis=1)  # of equal ones the first
        yield best
        a[rows, best] = -1


def _drop_smallest(
    chosen: np.ndarray, bits: np.ndarray, spare: np.ndarray, n: int, dim: int
) -> None:
    """Unmark the `n` smallest chosen entries, highest index first, at most spare[s] of slice s."""
    at = np.flatnonzero(chosen)[::-1]
    line = at // bits.shape[1] if dim == 0 else at % bits.shape[1]
    at, line = at[spare[line] > 0], line[spare[line] > 0]
    v, m = _magnitude(bits.reshape(-1)[at]), 2 * n
    while True:
        low = np.flatnonzero(v <= np.partition(v, m)[m]) if m < v.size else np.arange(v.size)
        low = low[v[low].argsort(kind="stable")]
        free = low[_occurrence(line[low]) < spare[line[low]]]
        if free.size >= n or low.size == v.size:
            break
        m *= 4
    chosen.reshape(-1)[at[free[:n]]] = False


def _occurrence(x: np.ndarray) -> np.ndarray:
    """How often the value of each entry has come before it."""
    order = x.argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(x.size) - np.searchsorted(x[order], x[order])
    return rank


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityConfig:
    """How sparse the weights become and when. Fractions are of entries; times are of all steps."""

    density: float = 1 / 16
    """Final fraction kept in W_qkv, W_o, W_fc, W_proj and the position table, in (0, 1]."""
    embedding_density: float = 1 / 4
    """Final fraction kept in the embedding, the unembedding and (if sparse) the biases, in (0, 1];
    the authors make it denser than the matrices by the expansion factor (method.md 2.2)."""
    floor: int = 4
    """Entries every row of W_qkv, W_fc and every column of W_o, W_proj keeps, inside the budget."""
    floor_axis: Literal["neurons", "rows"] = "neurons"
    """What the floor protects. "neurons": as said above, one slice per neuron or attention channel.
    "rows": the rows of every projected matrix, embeddings too (the replication, method.md 9)."""
    sparse_biases: bool = True
    """Whether biases are projected (the paper does, the authors' script does not)."""
    anneal_start: float = 0.01
    """Share of the steps before annealing starts, in [0, 1)."""
    anneal_end: float = 0.5
    """Share of the steps after which the target density is held, in (anneal_start, 1]."""
    anneal_mode: Literal["linear", "log"] = "linear"
    """Shape of the way down: `Anneal.mode`; "log" needs anneal_start above 0."""
    embedding_anneal: Literal["linked", "late"] = "linked"
    """"linked": in step with the matrices. "late": dense until the matrices' density has fallen to
    density / embedding_density, the paper's "schedule bug" (method.md 2.2)."""

    def __post_init__(self) -> None:
        for name in ("density", "embedding_density"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"SparsityConfig.{name}={getattr(self, name)} must be in (0, 1]")
        if not 0 <= self.anneal_start < self.anneal_end <= 1:
            times = (self.anneal_start, self.anneal_end)
            raise ValueError(
                f"SparsityConfig needs 0 <= anneal_start < anneal_end <= 1, got {times}"
            )
        if self.floor < 0:
            raise ValueError(f"SparsityConfig.floor={self.floor} must be at least 0")

    def anneal(self, steps: int) -> Anneal:
        """Return the schedule of the matrices for a run of `steps` optimizer steps."""
        start, end = self.anneal_start * steps, self.anneal_end * steps
        return Anneal(target=self.density, start=start, end=end, mode=self.anneal_mode)

    def densities(self, step: int, steps: int) -> tuple[float, float]:
        """Return the fractions of matrices and of embeddings kept at `step` of `steps`."""
        rho = self.anneal(steps).keep(step)
        final = self.embedding_density
        if self.embedding_anneal == "late":
            return rho, min(1.0, rho * final / self.density)
        share = (rho - self.density) / (1 - self.density) if self.density < 1 else 0.0
        return rho, final + share * (1 - final)

    def check(self, model: SparseGPT) -> None:
        """Raise ValueError unless every tensor's final budget holds its floor."""
        check_budgets(budgets(model, self), (self.density, self.embedding_density))


@dataclass(frozen=True, slots=True)
class Budget:
    """One projected tensor."""

    name: str
    weight: nn.Parameter
    is_embedding: bool
    """Whether it follows the embeddings' density."""
    floor: int
    dim: int

    def keep(self, densities: tuple[float, float]) -> int:
        """Return the number of entries it keeps, floor(density * numel)."""
        return round_down(densities[self.is_embedding] * self.weight.numel())


def budgets(model: SparseGPT, config: SparsityConfig) -> list[Budget]:
    """Return every tensor that is projected; norms, sinks and the bigram table are not."""
    plan: dict[int, tuple[bool, int, int]] = {}  # by id: follows the embeddings, floor, dim
    for module in model.modules():
        if isinstance(module, Attention):
            plan[id(module.qkv.weight)] = (False, config.floor, 0)
            plan[id(module.out.weight)] = (False, config.floor, 1)
        elif isinstance(module, MLP):
            plan[id(module.fc.weight)] = (False, config.floor, 0)
            plan[id(module.proj.weight)] = (False, config.floor, 1)
    plan[id(model.model.wte.weight)] = plan[id(model.lm_head.weight)] = (True, 0, 0)
    if model.model.wpe is not None:
        plan[id(model.model.wpe.weight)] = (False, 0, 0)
    if config.floor_axis == "rows":
        plan = {key: (of_embeddings, config.floor, 0) for key, (of_embeddings, *_) in plan.items()}
    if config.sparse_biases:
        named = model.named_parameters()
        biases = (p for n, p in named if n.endswith(".bias") and "norm" not in n)
        plan |= {id(p): (True, 0, 0) for p in biases}
    named = ((name, p) for name, p in model.named_parameters() if id(p) in plan)
    return [Budget(name, p, *plan[id(p)]) for name, p in named]


def project_model_(plan: list[Budget], densities: tuple[float, float]) -> None:
    """Project every tensor of `plan` to its budget at these densities."""
    for budget in plan:
        keep = budget.keep(densities)
        if keep < budget.weight.numel():
            with whole_(budget.weight) as weight:
                matrix = weight if weight.ndim == 2 else weight.view(1, -1)
                project_(matrix, keep, budget.floor, budget.dim)


def check_budgets(plan: list[Budget], densities: tuple[float, float]) -> None:
    """Raise unless every tensor's final budget holds its floor."""
    for b in plan:
        n_slices = b.weight.shape[b.dim] if b.floor else 0
        if b.keep(densities) < n_slices * b.floor:
            raise ValueError(
                f"{b.name}: a budget of {b.keep(densities)} of {b.weight.numel()} entries is below "
                f"the floor of {b.floor} for each of {n_slices} neurons; raise the density to at "
                f"least {n_slices * b.floor / b.weight.numel():.5f} or lower the floor"
            )
