"""Training a weight-sparse GPT alone, by the published recipe (Gao et al. 2025).

One optimizer step t of S, in this order:

    rho_t, e_t   densities of matrices and embeddings              SparsityConfig.densities
    lr_t         = lr * warmup_decay(t) * sharkfin(rho_t)
    g            gradient of the cross entropy of position j on token j+1, nats per token
    r            = ||g||_2 / sqrt(n)   over all n entries of all parameters together
    g            <- g / (r + 1e-5)
    p            <- Adam(g), betas 0.9 and 0.95, eps 0.1, no decay of its own
    p            <- the floor(density * numel) largest entries of every projected tensor
    p            <- p - weight_decay * lr_t * p    for matrices and tables, not the bigram table

After step t a projected tensor has exactly as many nonzero entries as its budget, with one
exception: the projection may have to choose entries that are zero, and these stay zero. That
happens where a row or column has fewer nonzeros than its floor, or a tensor fewer than its budget.

The published sources differ from each other, and for each difference a field of a config decides
which of them is followed. "Authors" is the authors' released script, "replication" an independent
one (docs/method.md#where-sources-differ), and the last column is what `gao2025` (recipes.py) takes.

    field                paper           authors             replication     gao2025
    -- PretrainConfig
    scaling              clip            normalise           normalise       normalise
    decay                adamw           after_projection    adamw           after_projection
    decayed              not said        matrices            all             matrices
    sharkfin             1/sqrt, scale   normalised          unnormalised    normalised
                         not said
    -- SparsityConfig
    embedding_density    = density       e * density         = density       e * density
    embedding_anneal     late            linked              linked          linked
    anneal_mode          linear          linear; log is an   linear          linear
                                         option there
    sparse_biases        True            False               False           True
    floor_axis           neurons         neurons             rows            neurons
    -- SparseGPTConfig
    positions            none            learned             none            none
    position_init        -               zero                -               zero, if learned
    bigram_table         True            True                False           True
    bigram_fixed         False           False; True in      -               False
                                         older models
    bigram_freeze_last   not said        True                -               True
    -- TrainConfig
    mixed_precision      not said        fp16                bf16 weights    no

Two variants are not offered: floors that exceed the budget, and weights held in bfloat16
(docs/method.md#pitfalls).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from sparse.model.gpt import SparseGPT
from sparse.model.modes import mode
from sparse.ops.csr_linear import WORTH_REBUILDING, Products, csr_products, fastest_products

from .config import BatchSource, TrainConfig
from .groups import Group, warmup_decay
from .heldout import _cross_entropy, heldout_nats
from .loop import fit
from .processes import accelerator_for
from .run_state import with_products
from .sparsity import Sparsifier, SparsityConfig, decayed_names


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything about the training that is not the model's shape.

    The defaults are those of docs/method.md#the-training-step.
    """

    train: TrainConfig
    """Steps, folder, checkpoints, seed, precision."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """How sparse the weights become and when."""
    lr: float = 1.28e-2
    """Peak learning rate, which the schedules multiply. With the sharkfin "normalised" it is the
    rate at the final density."""
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises from 0, in [0, 1)."""
    sharkfin: Literal["normalised", "unnormalised", "none"] = "normalised"
    """Factor of the learning rate that follows rho_t, the density of the matrices at step t (rho_T
    at the end); the paper calls it the sharkfin (docs/method.md#learning-rate). "normalised":
    sqrt(rho_T / rho_t), which ends at 1. "unnormalised": 1 / sqrt(rho_t), which is 1/sqrt(rho_T)
    times as much. "none": 1."""
    scaling: Literal["normalise", "clip", "none"] = "normalise"
    """How the gradients are scaled by their common root mean square r: `Group.scaling`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's running means of the gradient and of its square, in [0, 1)."""
    eps: float = 0.1
    """Adam's eps, in units of the gradient after `scaling`."""
    weight_decay: float = 0.1
    """Share of a weight that one step removes, per unit of learning rate."""
    decay: Literal["after_projection", "adamw"] = "after_projection"
    """When weights decay: `Group.decay`."""
    decayed: Literal["matrices", "all"] = "matrices"
    """What decays. "matrices": tensors of two axes except the bigram table. "all": everything."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"PretrainConfig.warmup={self.warmup} must be in [0, 1)")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"PretrainConfig.{name}={getattr(self, name)} must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"PretrainConfig.betas={self.betas} must be in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"PretrainConfig.weight_decay={self.weight_decay} must be at least 0")


class Pretraining(nn.Module):
    """The trainable module that `fit` takes: a sparse model and its cross entropy.

    Raises ValueError where a tensor's final budget is smaller than the sum of its floors
    (`SparsityConfig.floor`).
    """

    def __init__(self, model: SparseGPT, config: PretrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.sparsifier = Sparsifier(model, config.sparsity, config.train.steps)
        self.products: Products = config.train.products or fastest_products()

    def forward(self, ids: Int[Tensor, "batch pos"], step: int) -> dict[str, Tensor]:
        """Return {"ce": nats per token, mean over the pos - 1 predicted positions}."""
        with csr_products(self.model, WORTH_REBUILDING, self.products):
            return {"ce": _cross_entropy(self.model, ids, "mean")}

    def lr(self, step: int) -> float:
        """Return lr * warmup_decay * sharkfin at an optimizer step."""
        c, anneal = self.config, self.sparsifier.anneal
        fin = {
            "normalised": anneal.lr_scale(step),
            "unnormalised": anneal.keep(step) ** -0.5,
            "none": 1.0,
        }
        return c.lr * warmup_decay(step, c.train.steps, c.warmup) * fin[c.sharkfin]

    def groups(self) -> list[Group]:
        """Return one group: the gradients of all parameters are scaled together."""
        c, params = self.config, dict(self.model.named_parameters())
        decayed = decayed_names(self.model) if c.decayed == "matrices" else frozenset(params)
        return [
            Group(
                name="sparse",
                params=params,
                lr=self.lr,
                betas=c.betas,
                eps=c.eps,
                scaling=c.scaling,
                weight_decay=c.weight_decay,
                decay=c.decay,
                decayed=decayed,
            )
        ]


def pretrain(
    model: SparseGPT,
    batches: BatchSource,
    config: PretrainConfig,
    validation: Iterable[Int[Tensor, "_ pos"]] = (),
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Train `model` in place; return its loss on `validation`, {"ce": nats per token}.

    A run whose folder `config.train.folder` holds a checkpoint is resumed from there. `validation`
    holds the batches that every evaluation scores; the processes share them. Without any, nothing
    is evaluated and {} is returned.

    >>> import tempfile
    >>> import torch
    >>> from sparse import Batches, PretrainConfig, SparseGPT, SparseGPTConfig, SparsityConfig
    >>> from sparse import TrainConfig, pretrain
    >>> model = SparseGPT(SparseGPTConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1))
    >>> blocks = torch.randint(40, (8, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train, sparsity = TrainConfig(steps=2, folder=folder), SparsityConfig(density=1 / 4)
    ...     config = PretrainConfig(train=train, sparsity=sparsity)
    ...     scores = pretrain(model, Batches(blocks, 4), config, [blocks[:2]])
    >>> list(scores)  # nats per token on held-out text
    ['ce']
    """
    config = replace(config, train=with_products(config.train))
    accelerator = accelerator_for(config.train, accelerator)
    module = Pretraining(model.to(accelerator.device), config)  # pyright: ignore[reportArgumentType]
    validation = list(validation)

    def evaluate() -> dict[str, float]:
        return {"ce": heldout_nats(model, validation, accelerator)} if validation else {}

    identity = asdict(config) | {"model": model.config.architecture()}
    del identity["train"]  # `fit` adds these itself
    with mode(model, training=True):
        fit(
            module,
            batches,
            config.train,
            after_step=module.sparsifier.project,
            evaluate=evaluate if validation else None,
            accelerator=accelerator,
            identity=identity,
        )
    return evaluate()
