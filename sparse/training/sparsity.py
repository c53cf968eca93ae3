"""How many weights of which tensors are kept at each step, and the projection that does it.

The *density* of a tensor is the fraction of its entries that are kept. It *anneals*, that is falls,
from 1 to its target. A tensor's *budget* is the number of entries it keeps, floor(density * numel).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor as round_down
from math import log
from typing import Literal

from torch import nn

from sparse.model.blocks import MLP, Attention
from sparse.model.gpt import SparseGPT
from sparse.ops.project import project_

from .shard import whole_


@dataclass(frozen=True, kw_only=True, slots=True)
class Anneal:
    """The sparsity schedule: a pure function of the step (docs/method.md#the-anneal)."""

    target: float
    """Fraction of weights kept once annealed, in (0, 1]."""
    start: int | float
    """Optimizer step at which annealing begins; up to and including it every weight is kept."""
    end: int | float
    """Optimizer step from which the target is held."""
    mode: Literal["linear", "log"] = "linear"
    """How the fraction kept p falls with the step t. "linear": p falls along a line in t. "log":
    log p falls along a line in log t."""

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
        """Return p(t), the fraction of weights kept at t = `step`.

            "linear"    p = 1 + u (target - 1),    u = (t - start) / (end - start)
            "log"       p = target^u,              u = log(t / start) / log(end / start)

        u is clipped to [0, 1].
        """
        if step >= self.end or step <= self.start:
            return self.target if step >= self.end else 1.0
        if self.mode == "log":
            return self.target ** (log(step / self.start) / log(self.end / self.start))
        return 1.0 + (step - self.start) / (self.end - self.start) * (self.target - 1.0)

    def lr_scale(self, step: int) -> float:
        """Return the sharkfin factor of the learning rate, sqrt(target / p(t)).

        It is 1 once annealed and smaller before (docs/method.md#learning-rate).
        """
        return (self.target / self.keep(step)) ** 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityConfig:
    """How sparse the weights become and when.

    Densities are fractions of a tensor's entries; times are fractions of all optimizer steps.
    """

    density: float = 1 / 16
    """Final fraction kept in W_qkv, W_o, W_fc, W_proj and the position table, in (0, 1]."""
    embedding_density: float = 1 / 4
    """Final fraction kept in the embedding, the unembedding and (if sparse) the biases, in (0, 1].
    In the authors' script it is the density of the matrices times the expansion factor
    (docs/method.md#the-anneal)."""
    floor: int = 4
    """Number of entries that every neuron or attention channel keeps at least, so that none dies:
    in each row of W_qkv and W_fc and in each column of W_o and W_proj. They count towards the
    budget."""
    floor_axis: Literal["neurons", "rows"] = "neurons"
    """Which slices the floor protects. "neurons": those that `floor` names, one per neuron or
    attention channel. "rows": the rows of every projected matrix, embeddings and position table
    too, as in the replication (docs/method.md#where-sources-differ)."""
    sparse_biases: bool = True
    """Whether biases are projected. In the paper they are, in the authors' script they are not."""
    anneal_start: float = 0.01
    """Share of the steps before annealing starts, in [0, 1)."""
    anneal_end: float = 0.5
    """Share of the steps after which the target density is held, in (anneal_start, 1]."""
    anneal_mode: Literal["linear", "log"] = "linear"
    """How the density falls: `Anneal.mode`. "log" needs anneal_start above 0."""
    embedding_anneal: Literal["linked", "late"] = "linked"
    """When the embeddings become sparse. "linked": in step with the matrices. "late": they stay
    dense until the matrices' density has fallen to density / embedding_density, which the paper
    calls a schedule bug (docs/method.md#the-anneal)."""

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
        """Return the fractions kept at `step` of `steps`: of the matrices, of the embeddings.

        The equations are in docs/method.md#the-anneal.
        """
        rho = self.anneal(steps).keep(step)
        final = self.embedding_density
        if self.embedding_anneal == "late":
            return rho, min(1.0, rho * final / self.density)
        share = (rho - self.density) / (1 - self.density) if self.density < 1 else 0.0
        return rho, final + share * (1 - final)

    def check(self, model: SparseGPT) -> None:
        """Raise ValueError unless every tensor's final budget holds its floors."""
        check_budgets(budgets(model, self), (self.density, self.embedding_density))


@dataclass(frozen=True, slots=True)
class Budget:
    """One projected tensor, and the rule for the entries that it keeps."""

    name: str
    weight: nn.Parameter
    is_embedding: bool
    """Whether it follows the embeddings' density, as biases do too."""
    floor: int
    """Number of entries that each slice keeps at least; 0 for none."""
    dim: int
    """Which slices the floor protects: rows (0) or columns (1)."""

    def keep(self, densities: tuple[float, float]) -> int:
        """Return the number of entries it keeps, floor(density * numel).

        `densities` are those of the matrices and of the embeddings.
        """
        return round_down(densities[self.is_embedding] * self.weight.numel())


def budgets(model: SparseGPT, config: SparsityConfig) -> list[Budget]:
    """Return one Budget for every tensor that is projected.

    Norms, attention sinks, the bigram table and all buffers are not projected
    (docs/method.md#projection).
    """
    plan: dict[int, tuple[bool, int, int]] = {}  # by id: follows the embeddings, floor, dim
    for module in model.modules():
        if isinstance(module, Attention):
            plan[id(module.qkv.weight)] = (False, config.floor, 0)
            plan[id(module.out.weight)] = (False, config.floor, 1)
        elif isinstance(module, MLP):
            plan[id(module.fc.weight)] = (False, config.floor, 0)
            plan[id(module.proj.weight)] = (False, config.floor, 1)
    for p in (*model.model.wte.parameters(), *model.lm_head.parameters()):
        plan[id(p)] = (True, 0, 0)
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
    """Project every tensor of `plan` in place to its budget at these densities."""
    for budget in plan:
        keep = budget.keep(densities)
        if keep < budget.weight.numel():
            with whole_(budget.weight) as weight:
                matrix = weight if weight.ndim == 2 else weight.view(1, -1)
                project_(matrix, keep, budget.floor, budget.dim)


def check_budgets(plan: list[Budget], densities: tuple[float, float]) -> None:
    """Raise ValueError where a tensor's budget is smaller than the sum of its floors."""
    for b in plan:
        n_slices = b.weight.shape[b.dim] if b.floor else 0
        if b.keep(densities) < n_slices * b.floor:
            raise ValueError(
                f"{b.name}: a budget of {b.keep(densities)} of {b.weight.numel()} entries is below "
                f"the floor of {b.floor} for each of {n_slices} neurons; raise the density to at "
                f"least {n_slices * b.floor / b.weight.numel():.5f} or lower the floor"
            )


class Sparsifier:
    """The anneal and the projection of one model through one run.

    The tensors are looked up in the model at every use and not held here, because sharding
    (shard.py) replaces them by others. Raises ValueError where a tensor's final budget is smaller
    than the sum of its floors.
    """

    def __init__(self, model: SparseGPT, config: SparsityConfig, steps: int) -> None:
        self.model, self.config, self.steps = model, config, steps
        self.anneal = config.anneal(steps)
        check_budgets(self.budgets, config.densities(steps, steps))

    @property
    def budgets(self) -> list[Budget]:
        """The projected tensors of the model, as they are now."""
        return budgets(self.model, self.config)

    def project(self, step: int) -> dict[str, float]:
        """Project every tensor to its budget after optimizer step `step`; return the densities.

        The last step uses the densities of step S, the end of the run, so that the target is
        reached even where annealing ends with the run.
        """
        last = step + 1 == self.steps
        matrices, embeddings = self.config.densities(self.steps if last else step, self.steps)
        project_model_(self.budgets, (matrices, embeddings))
        return {"density/matrices": matrices, "density/embeddings": embeddings}


def decayed_names(model: SparseGPT) -> frozenset[str]:
    """Return the names of the parameters to which the recipe applies weight decay.

    They are the parameters with two axes, except the bigram table
    (docs/method.md#the-training-step).
    """
    named = model.named_parameters()
    return frozenset(name for name, p in named if p.ndim > 1 and name != "bigram")
