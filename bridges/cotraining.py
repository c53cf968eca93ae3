"""Training a weight-sparse twin together with the bridges to a frozen dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse.csr import WORTH_REBUILDING, csr_products
from sparse.model import SparseGPT
from sparse.pretrain import mode
from sparse.project import Budget, budgets, check_budgets, project_model_
from sparse.train import BatchSource, Group, accelerator_for, fit, warmup_decay

from .bridge import BridgeSet
from .hybrid import draw_positions, draw_sites, run_passes, score_passes
from .losses import Moments, Normalised, Scored, moments_of, nmse, of_all_processes
from .models import FrozenModel, ResidualModel, fingerprint
from .settings import CotrainConfig, Weights


def losses(
    dense: ResidualModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    ids: Int[Tensor, "batch pos"],
    w: Weights,
    drawn: Int[Tensor, "batch draw"] | None = None,
    positions: Int[Tensor, "batch drawn"] | None = None,
    decoder_trains_trunk: bool = True,
    processes: int = 1,
    whole: Sequence[Moments] | None = None,
    normalised: Normalised = "fvu",
) -> dict[str, Float[Tensor, ""]]:
    """Return the terms of the co-training loss, each weighted; their sum is what we descend.

        ce       -log p_sparse(next token), mean over the pos - 1 predicted positions
        kl       KL(dense || sparse), mean over all positions
        encode   mean over sites of NMSE(encode(h), z), z detached
        decode   mean over sites of NMSE(decode(z), h)
        up       mean over sites of KL(dense || sparse resumed from encode(h))
        down     mean over sites of KL(dense || dense resumed from decode(z))

    h is at a bridge's dense site and z at its sparse site, where the passes resume too. Gao et al.
    2025, section 3.3; gradient flow of method.md 3.4: the dense model is frozen, its residuals and
    logits are constants, but its tails pass gradients to the decoders. With `drawn` every sequence
    is resumed at its own sites only, with `positions` the hybrid KLs are taken at those only; both
    without bias. Nats per token for ce, kl, up and down. A term of weight 0 is 0 and costs nothing.
    Where `processes` train together, each with its own rows, the mean of their losses, and of the
    gradients, is that of all rows. So it is where `ids` is one of several equal parts of a batch
    and `whole` holds the moments of all of it (`Cotraining.of_whole`).
    """
    pairs = bridges.config.pairs
    run = run_passes(dense, sparse, bridges, ids, drawn, hybrid=w.hybrid > 0)
    scored = score_passes(dense, sparse, run, ids, (w.ce, w.kl, w.hybrid), positions)
    zero = ids.new_zeros((), dtype=torch.float32)
    none = Scored(zero, zero, zero[None])
    encode = decode = zero
    if w.nmse:
        h, up, down = ([x[s] for s in pairs] for x in (run.h, run.up, run.down))
        z = [run.z[t] for t in pairs.values()]
        fixed = [x.detach() for x in z]
        if not decoder_trains_trunk:
            down = [bridges.decode(s, x) for s, x in zip(pairs, fixed, strict=True)]
        below = whole or moments_of([*z, *h], processes)
        share = below[0].n / ids.numel()  # numerators of all parts are summed, gradients averaged

        def error(x: list[Tensor], target: list[Tensor], of: Sequence[Moments]) -> Tensor:
            each = (nmse(*pair, normalised) for pair in zip(x, target, of, strict=True))
            return w.nmse * share * torch.stack(list(each)).mean()

        encode, decode = error(up, fixed, below[: len(pairs)]), error(down, h, below[len(pairs) :])
    return {
        "ce": scored.get("main", none).ce,
        "kl": scored.get("main", none).kl,
        "encode": encode,
        "decode": decode,
        "up": scored.get("up", none).kl,
        "down": scored.get("down", none).kl,
    }


class Part(NamedTuple):
    """Which of a batch's equal parts this is, and what it needs of the whole."""

    number: int
    """From 0."""
    of: int
    """Number of parts."""
    whole: Sequence[Moments] | None
    """Moments of the sparse, then the dense residuals at the bridged sites, over all parts."""


class Cotraining(nn.Module):
    """The one trainable module: sparse model and bridges inside, the dense model beside."""

    dense: FrozenModel

    def __init__(
        self, dense: FrozenModel, sparse: SparseGPT, bridges: BridgeSet, config: CotrainConfig
    ) -> None:
        super().__init__()
        self.sparse, self.bridges, self.config = sparse, bridges, config
        object.__setattr__(self, "dense", dense)  # frozen: not in DDP, optimizer or checkpoint
        steps, m, n = config.train.steps, config.sites_per_sequence, len(bridges.config.sites)
        if config.hybrid_sites != "all" and m > n:
            raise ValueError(
                f"CotrainConfig.sites_per_sequence={m}, but {n} sites are bridged; draw {n} or "
                'fewer, or take hybrid_sites="all"'
            )
        self.anneal = config.sparsity.anneal(steps)
        check_budgets(self.plan, config.sparsity.densities(steps, steps))

    @property
    def plan(self) -> list[Budget]:
        """The projected tensors, looked up anew: sharding replaces them."""
        return budgets(self.sparse, self.config.sparsity)

    def forward(
        self, ids: Int[Tensor, "batch pos"], step: int, part: Part | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted losses of one batch, or of a part of it, at an optimizer step."""
        c, drawn, positions = self.config, None, None
        world, rank = _world()
        i, parts, whole = part or Part(0, 1, None)
        # draws are those of the batch of all processes and parts; ours are some of its rows
        mine, n = slice(i * len(ids), (i + 1) * len(ids)), world * parts * len(ids)
        if c.hybrid_sites != "all":
            sites, m = self.bridges.config.sites, c.sites_per_sequence
            drawn = draw_sites(sites, n, step, c.train.seed, m)[rank::world][mine]
        if c.hybrid_tokens < 1:
            taken = draw_positions(n, ids.shape[1], c.hybrid_tokens, step, c.train.seed)
            positions = taken[rank::world][mine]
        with csr_products(self.sparse, WORTH_REBUILDING):
            return losses(
                self.dense,
                self.sparse,
                self.bridges,
                ids,
                c.weights,
                drawn,
                positions,
                c.decoder_trains_trunk,
                world,
                whole,
                c.nmse,
            )

    @torch.no_grad()
    def of_whole(self, parts: Sequence[Int[Tensor, "part pos"]]) -> list[Part]:
        """Return, for each part of this process's share of a batch, what it needs of the whole.

        The errors of the bridges are ratios, whose denominators are of the whole batch: one pass
        through either model, without gradient and without hybrids, before the first part's own.
        """
        world, n = _world()[0], len(parts)
        if not self.config.weights.nmse:
            return [Part(i, n, None) for i in range(n)]
        config, seen = self.bridges.config, []
        for ids in parts:
            with csr_products(self.sparse, WORTH_REBUILDING):
                z, h = self.sparse.residuals(ids), self.dense.residuals(ids)
            bridged = [z[t] for t in config.sparse_sites] + [h[s] for s in config.sites]
            seen.append(list(map(Moments.of, bridged)))
        mine = [reduce(Moments.join, of_parts) for of_parts in zip(*seen, strict=True)]
        whole = of_all_processes(mine, world)
        return [Part(i, n, whole) for i in range(n)]

    def groups(self) -> list[Group]:
        """The twin by the sparse recipe, the bridges by plain Adam; normalised separately."""
        c, steps = self.config, self.config.train.steps
        twin = dict(self.sparse.named_parameters())
        decayed = frozenset(n for n, p in twin.items() if p.ndim > 1 and n != "bigram")

        def lr(t: int) -> float:
            return c.lr * warmup_decay(t, steps, c.warmup) * self.anneal.lr_scale(t)

        def bridge_lr(t: int) -> float:
            return c.bridge_lr * warmup_decay(t, steps, c.warmup)

        return [
            Group(name="sparse", params=twin, lr=lr, weight_decay=c.weight_decay, decayed=decayed),
            Group(
                name="bridges",
                params=dict(self.bridges.named_parameters()),
                lr=bridge_lr,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.0,
            ),
        ]

    def project(self, step: int) -> dict[str, float]:
        """Project every budgeted tensor to the density of `step`; return the densities."""
        c = self.config
        # the last step reaches the target even where annealing ends with the run
        t = c.train.steps if step + 1 == c.train.steps else step
        matrices, embeddings = c.sparsity.densities(t, c.train.steps)
        project_model_(self.plan, (matrices, embeddings))
        return {"density/matrices": matrices, "density/embeddings": embeddings}


def cotrain(
    dense: FrozenModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    batches: BatchSource,
    config: CotrainConfig,
    validation: Sequence[Int[Tensor, "batch pos"]] = (),
    accelerator: Accelerator | None = None,
) -> None:
    """Train `sparse` and `bridges` in place against the frozen `dense`.

    Bridges take their centring and scale from the first batches unless a checkpoint in
    `config.train.folder` is resumed. `validation` batches are scored at every evaluation, at all
    sites. Raises ValueError where the models do not fit.
    """
    bridges.check(dense, sparse)
    if not isinstance(validation, Sequence):
        raise ValueError(
            f"cotrain: validation is a {type(validation).__name__}, which may be spent after one "
            "evaluation; pass a list of batches"
        )
    if dense.vocab_size != sparse.vocab_size:
        raise ValueError(
            f"the dense model has {dense.vocab_size} tokens and the sparse one "
            f"{sparse.vocab_size}; both must share one tokenizer: set "
            "SparseGPTConfig.vocab_size to the dense model's"
        )
    accelerator = accelerator_for(config.train, accelerator)
    dense.model.to(accelerator.device)
    module = Cotraining(dense, sparse, bridges, config).to(accelerator.device)
    if config.calibration_tokens:
        calibrate(dense, bridges, batches, config.calibration_tokens, accelerator.device)

    def evaluate() -> dict[str, float]:
        return validate(dense, sparse, bridges, validation, accelerator.device, accelerator)

    identity = asdict(config) | {"dense": fingerprint(dense), "bridges": asdict(bridges.config)}
    identity |= {"sparse": sparse.config.architecture()}
    del identity["train"]  # `fit` adds these itself
    with mode(sparse, training=True):
        fit(
            module,
            batches,
            config.train,
            after_step=module.project,
            evaluate=evaluate,
            accelerator=accelerator,
            identity=identity,
        )
    bridges.dense_fingerprint = fingerprint(dense)
    bridges.sparse_fingerprint = fingerprint(sparse)


def _world() -> tuple[int, int]:
    """How many processes train together, and which of them this is."""
    if not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


@torch.no_grad()
def calibrate(
    dense: ResidualModel, bridges: BridgeSet, batches: BatchSource, n_tokens: int, device
) -> None:
    """Set the bridges' centring and scale from the run's first `n_tokens` tokens."""
    state, stream = batches.state_dict(), iter(batches)
    moments: list[Moments] = []
    while not moments or moments[0].n < n_tokens:
        of_batch = [Moments.of(h) for h in dense.residuals(next(stream).to(device))]
        moments = list(map(Moments.join, moments, of_batch)) if moments else of_batch
    batches.load_state_dict(state)
    bridges.centre(moments)


@torch.no_grad()
def validate(
    dense: ResidualModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    validation: Sequence[Int[Tensor, "batch pos"]],
    device: torch.device | str = "cpu",
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Return the unweighted terms over `validation`, at all bridges, and for each where it has one.

    Keys: ce, ce_dense, kl (nats per token); encode.s, decode.s (fraction of variance, NMSE);
    up.s, down.s (nats per token), s the bridge's dense site, and the means of the four over sites.
    With an accelerator its processes share the batches; all of them return the same numbers.
    """
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    n, sums = len(validation), {}
    # a process that has no share measures a batch for the names alone
    for i in range(rank, n, world) if rank < n else range(min(n, 1)):
        with mode(sparse, training=False), csr_products(sparse):
            measured = _measure(dense, sparse, bridges, validation[i].to(device))
        for name, value in measured.items():
            sums[name] = sums.get(name, 0.0) + value.item() * (rank < n)
    if accelerator and sums:
        mine = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
        total = accelerator.reduce(mine, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        sums = dict(zip(sums, total, strict=True))
    return {name: value / n for name, value in sums.items()}


def _measure(
    dense: ResidualModel, sparse: SparseGPT, bridges: BridgeSet, ids: Tensor
) -> dict[str, Tensor]:
    run, pairs = run_passes(dense, sparse, bridges, ids), bridges.config.pairs
    scored = score_passes(dense, sparse, run, ids, (1.0, 1.0, 1.0), with_dense=True)
    out = {"ce": scored["main"].ce, "ce_dense": scored["dense"].ce, "kl": scored["main"].kl}
    per_site = {
        "encode": [nmse(run.up[s], run.z[t]) for s, t in pairs.items()],
        "decode": [nmse(run.down[s], run.h[s]) for s in pairs],
        "up": list(scored["up"].per_stream),
        "down": list(scored["down"].per_stream),
    }
    for name, values in per_site.items():
        out[name] = torch.stack(values).mean()
        out |= {f"{name}.{s}": value for s, value in zip(pairs, values, strict=True)}
    return out
