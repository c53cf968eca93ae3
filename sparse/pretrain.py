"""Training a weight-sparse GPT alone, by the published recipe (Gao et al. 2025; method.md 2).

One optimizer step t of S, in this order:

    rho_t, e_t   densities of matrices and embeddings              SparsityConfig.densities
    lr_t         = lr * warmup_decay(t) * sharkfin(rho_t)
    g            gradient of the cross entropy of position j on token j+1, nats per token
    r            = ||g||_2 / sqrt(n)   over all n parameters together
    g            <- g / (r + 1e-5)
    p            <- Adam(g), betas 0.9 and 0.95, eps 0.1, no decay of its own
    p            <- the floor(density * numel) largest entries of every projected tensor
    p            <- p - weight_decay * lr_t * p    for matrices and tables, not the bigram table

After step t a projected tensor has exactly its budget of nonzero entries, less one for every entry
that was chosen while itself exactly zero (a slice with fewer nonzeros than its floor, or a tensor
with fewer than its budget).

The sources differ, and a field decides each difference. "Authors" is their released script,
"replication" an independent one (method.md 9); `gao2025` takes the last column.

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
    positions            none            learned, table      none            none
                                         zero at first
    bigram_table         True            True                False           True
    bigram_fixed         False           False; True in      -               False
                                         older models
    bigram_freeze_last   not said        True                -               True
    -- TrainConfig
    mixed_precision      not said        fp16                bf16 weights    no

Refused rather than offered: floors above the budget, weights in bfloat16 (method.md 10: 5 and 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import SparseGPTConfig
from .csr import WORTH_REBUILDING, csr_products
from .model import SparseGPT
from .project import Budget, SparsityConfig, budgets, check_budgets, project_model_
from .train import BatchSource, Group, TrainConfig, accelerator_for, fit, warmup_decay


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything about the training that is not the model's shape. Defaults: method.md 2.5."""

    train: TrainConfig
    """Steps, folder, checkpoints, seed, precision."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """How sparse the weights become and when."""
    lr: float = 1.28e-2
    """Learning rate that the schedules multiply; with the sharkfin "normalised", it is in units of
    the normalised gradient at the final density."""
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises from 0, in [0, 1)."""
    sharkfin: Literal["normalised", "unnormalised", "none"] = "normalised"
    """The factor of the learning rate while annealing. "normalised": sqrt(rho_T / rho_t), 1 at the
    end. "unnormalised": 1 / sqrt(rho_t), which is 1/sqrt(rho_T) times as much. "none": 1."""
    scaling: Literal["normalise", "clip", "none"] = "normalise"
    """What happens to the pooled gradient of root mean square r: `Group.scaling`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's averages of the gradient and of its square, in [0, 1)."""
    eps: float = 0.1
    """Adam's eps, in units of the scaled gradient."""
    weight_decay: float = 0.1
    """Decay per unit of learning rate."""
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

    Raises ValueError where a tensor's final budget does not hold its floor.
    """

    def __init__(self, model: SparseGPT, config: PretrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        steps = config.train.steps
        self.anneal = config.sparsity.anneal(steps)
        check_budgets(self.plan, config.sparsity.densities(steps, steps))

    @property
    def plan(self) -> list[Budget]:
        """The projected tensors, looked up anew: sharding replaces them."""
        return budgets(self.model, self.config.sparsity)

    def forward(self, ids: Int[Tensor, "batch pos"], step: int) -> dict[str, Tensor]:
        """Return {"ce": nats per token, mean over the pos - 1 predicted positions}."""
        with csr_products(self.model, WORTH_REBUILDING):
            return {"ce": _cross_entropy(self.model, ids, "mean")}

    def lr(self, step: int) -> float:
        """Return lr * warmup_decay * sharkfin at an optimizer step."""
        c = self.config
        fin = {
            "normalised": self.anneal.lr_scale(step),
            "unnormalised": self.anneal.keep(step) ** -0.5,
            "none": 1.0,
        }
        return c.lr * warmup_decay(step, c.train.steps, c.warmup) * fin[c.sharkfin]

    def groups(self) -> list[Group]:
        """Return one group: the gradients of all parameters are scaled together."""
        c, params = self.config, dict(self.model.named_parameters())
        decayed = {n for n, p in params.items() if p.ndim > 1 and n != "bigram"}
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
                decayed=frozenset(params if c.decayed == "all" else decayed),
            )
        ]

    def project(self, step: int) -> dict[str, float]:
        """Project every budgeted tensor to the density of `step`; return the densities."""
        steps = self.config.train.steps
        # the last step reaches the target even where annealing ends with the run
        t = steps if step + 1 == steps else step
        matrices, embeddings = self.config.sparsity.densities(t, steps)
        project_model_(self.plan, (matrices, embeddings))
        return {"density/matrices": matrices, "density/embeddings": embeddings}


def pretrain(
    model: SparseGPT,
    batches: BatchSource,
    config: PretrainConfig,
    validation: Iterable[Int[Tensor, "_ pos"]] = (),
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Train `model` in place on `batches`, resuming from `config.train.folder` where it can.

    `validation` holds batches that are scored at every evaluation, shared among the processes.
    Returns what the trained model scores on them: {"ce": nats per token}, or {} without any.
    """
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
            after_step=module.project,
            evaluate=evaluate if validation else None,
            accelerator=accelerator,
            identity=identity,
        )
    return evaluate()


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put `model` into training or evaluation mode, and back (dropout is off while evaluating)."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@torch.no_grad()
def heldout_nats(
    model: SparseGPT,
    batches: Iterable[Int[Tensor, "_ pos"]],
    accelerator: Accelerator | None = None,
) -> float:
    """Return the cross entropy over all predicted tokens of `batches`, in nats per token.

    With an accelerator its processes share the batches; all of them return the same number.
    """
    world = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    sums = torch.zeros(2, dtype=torch.float64, device=model.lm_head.weight.device)  # nats, tokens
    with csr_products(model), mode(model, training=False):
        for i, ids in enumerate(batches):
            if i % world == rank:
                ids = ids.to(sums.device)
                sums[0] += _cross_entropy(model, ids, "sum").double()
                sums[1] += ids[:, 1:].numel()
    if accelerator:
        sums = accelerator.reduce(sums, "sum")
    nats, tokens = sums.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    if not tokens:
        raise ValueError("heldout_nats: there is no token to predict; give held-out text")
    return nats / tokens


def unigram_nats(
    blocks: Int[Tensor, "block pos"],
    batches: Iterable[Int[Tensor, "_ _"]],
    vocab_size: int,
) -> float:
    """Return what knowing only how often each token occurs in `blocks` costs on `batches`.

        -mean log q(v),   q(v) = (count of v in blocks + 1) / (tokens in blocks + vocab_size)

    over the same tokens as `heldout_nats`, in nats per token: the control of a language model.
    """
    log_q = (torch.bincount(blocks.flatten(), minlength=vocab_size).double() + 1).log()
    log_q -= log_q.logsumexp(0)
    return -torch.cat([log_q[ids[:, 1:].cpu()].flatten() for ids in batches]).mean().item()


def _cross_entropy(
    model: SparseGPT, ids: Int[Tensor, "batch pos"], over: Literal["mean", "sum"]
) -> Float[Tensor, ""]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction=over)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model's shape and its training, with the batches it was published for."""

    model: SparseGPTConfig
    """The shape; `SparseGPT(preset.model)` builds it."""
    pretrain: PretrainConfig
    """The training; `.sparsity` and `.train` are inside."""
    batch_size: int
    """Sequences per optimizer step, over all processes."""
    length: int
    """Tokens per sequence."""


def gao2025(
    folder: str,
    expansion: int | float = 4,
    pfrac: int | float = 1 / 4,
    *,
    tokens: int | float = 32e9,
    steps: int | None = None,
    batch_size: int = 512,
    length: int = 256,
    model: dict[str, Any] | None = None,
    sparsity: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **recipe: Any,
) -> Preset:
    """Return the published recipe at expansion factor e and nonzero budget pfrac.

        d = 256 e,  d_mlp = 1024 e,  d_head = 16,  n_head = 16 e,  L = 8,  V = 2048
        density = pfrac / e^2,   embedding_density = pfrac / e
        S = floor(tokens / (batch_size * length)),   unless `steps` says otherwise

    (method.md 1.3, 2.1-2.5.) `model`, `sparsity`, `train` and `recipe` replace single fields of
    SparseGPTConfig, SparsityConfig, TrainConfig and PretrainConfig. Attention sinks are on, as in
    the authors' later models. The row of the last token, which should be the end of text, is not
    trained in the bigram table; model=dict(bigram_freeze_last=False) trains it. Raises ValueError
    where e and pfrac ask for more than every weight.
    """
    width = _width(expansion, pfrac)
    shape: dict[str, Any] = dict(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=8,
        num_attention_heads=width // 16,
        head_dim=16,
        max_position_embeddings=1024,
        activation_fraction=0.25,
        attention_sinks=True,
        bigram_table=True,
        bigram_freeze_last=True,
        positions="none",
    )
    densities: dict[str, Any] = dict(
        density=pfrac / expansion**2, embedding_density=pfrac / expansion
    )
    steps = steps or int(tokens // (batch_size * length))
    return Preset(
        model=SparseGPTConfig(**shape | (model or {})),
        pretrain=PretrainConfig(
            train=TrainConfig(**{"steps": steps, "folder": folder, **(train or {})}),
            sparsity=SparsityConfig(**densities | (sparsity or {})),
            **recipe,
        ),
        batch_size=batch_size,
        length=length,
    )


def _width(expansion: int | float, pfrac: int | float) -> int:
    """Check both and return 256 e."""
    if not 0 < pfrac <= min(expansion, expansion**2):
        raise ValueError(
            f"gao2025: pfrac={pfrac} at expansion={expansion} keeps no weight, or more than all; "
            "take it above 0 and at most the smaller of the expansion and its square"
        )
    width = round(256 * expansion)
    if width % 16:
        raise ValueError(
            f"gao2025: expansion={expansion} gives a width of {width}, which heads of 16 do not "
            "divide; take a multiple of 1/16"
        )
    return width
