"""Training a weight-sparse twin together with the bridges to a frozen dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from bridges.losses.moments import Moments, of_all_processes
from bridges.maps.bridge import BridgeSet
from bridges.protocol import FrozenModel, fingerprint
from sparse.model.gpt import SparseGPT
from sparse.model.modes import mode
from sparse.ops.csr_linear import WORTH_REBUILDING, Products, csr_products, fastest_products
from sparse.training.config import BatchSource
from sparse.training.groups import Group, warmup_decay
from sparse.training.loop import fit
from sparse.training.processes import accelerator_for
from sparse.training.run_state import with_products
from sparse.training.sparsity import Sparsifier, decayed_names

from .config import CotrainConfig
from .hybrid import draw_positions, draw_sites
from .objective import WHOLE, Draw, Part, Share, losses
from .validate import calibrate, validate


class Cotraining(nn.Module):
    """The module that `fit` trains: the sparse model and the bridges are its parameters.

    It also holds the dense model, but not as a submodule, so that the optimizer, the checkpoints
    and the distributed wrappers do not see the frozen weights.
    """

    dense: FrozenModel

    def __init__(
        self, dense: FrozenModel, sparse: SparseGPT, bridges: BridgeSet, config: CotrainConfig
    ) -> None:
        super().__init__()
        self.sparse, self.bridges, self.config = sparse, bridges, config
        object.__setattr__(self, "dense", dense)  # frozen: not in DDP, optimizer or checkpoint
        m, n = config.sites_per_sequence, len(bridges.config.sites)
        if config.hybrid_sites != "all" and m > n:
            raise ValueError(
                f"CotrainConfig.sites_per_sequence={m}, but {n} sites are bridged; draw {n} or "
                'fewer, or take hybrid_sites="all"'
            )
        self.sparsifier = Sparsifier(sparse, config.sparsity, config.train.steps)
        self.products: Products = config.train.products or fastest_products()

    def forward(
        self, ids: Int[Tensor, "batch pos"], step: int, part: Part = WHOLE
    ) -> dict[str, Tensor]:
        """Return the weighted losses of one batch, or of one part of it, at an optimizer step.

        `ids` are the rows of this process. `part` comes from `of_whole`; without it `ids` are
        everything that this process has of the batch.
        """
        c, (world, rank) = self.config, _world()
        with csr_products(self.sparse, WORTH_REBUILDING, self.products):
            return losses(
                self.dense,
                self.sparse,
                self.bridges,
                ids,
                c.weights,
                draw=self._draw(ids, step, part, world, rank),
                share=Share(part, world),
                normalised=c.nmse,
                decoder_trains_trunk=c.decoder_trains_trunk,
            )

    def _draw(self, ids: Tensor, step: int, part: Part, world: int, rank: int) -> Draw:
        """Return the sites and positions drawn for the rows of this part.

        Every process draws for the whole batch, from (seed, step), and takes its own rows of the
        result. So the draws do not depend on how the batch is shared out.
        """
        c, sites, positions = self.config, None, None
        own = slice(part.number * len(ids), (part.number + 1) * len(ids))
        n = world * part.of * len(ids)  # sequences of the whole batch
        if c.hybrid_sites != "all":
            bridged, m = self.bridges.config.sites, c.sites_per_sequence
            sites = draw_sites(bridged, n, step, c.train.seed, m)[rank::world][own]
        if c.hybrid_tokens < 1:
            drawn = draw_positions(n, ids.shape[1], c.hybrid_tokens, step, c.train.seed)
            positions = drawn[rank::world][own]
        return Draw(sites, positions)

    @torch.no_grad()
    def of_whole(self, parts: Sequence[Int[Tensor, "part pos"]]) -> list[Part]:
        """Return one `Part` for each part of this process's share of a batch.

        The errors of the bridges are ratios with denominators over the whole batch, which no part
        can compute from its own rows. So both models are run on all parts first, without gradient
        and without hybrid passes, and every `Part` gets the moments of all rows of all processes.
        Where the errors have weight 0 nothing is run.
        """
        world, n = _world()[0], len(parts)
        if not self.config.weights.nmse:
            return [Part(i, n, None) for i in range(n)]
        config, seen = self.bridges.config, []
        for ids in parts:
            with csr_products(self.sparse, WORTH_REBUILDING, self.products):
                z, h = self.sparse.residuals(ids), self.dense.residuals(ids)
            bridged = [z[t] for t in config.sparse_sites] + [h[s] for s in config.sites]
            ordinary = [self.bridges.ordinary(s, h[s]) for s in config.sites]
            seen.append(list(map(Moments.of, bridged, ordinary * 2)))
        mine = [reduce(Moments.join, of_parts) for of_parts in zip(*seen, strict=True)]
        whole = of_all_processes(mine, world)
        return [Part(i, n, whole) for i in range(n)]

    def groups(self) -> list[Group]:
        """Return the two parameter groups: the twin's and the bridges'.

        The twin is trained by the recipe of a sparse model (sharkfin, eps 0.1, decay), the bridges
        by Adam with a small eps and no decay. Each group's gradient is normalised by its own size,
        so that the width of the bridges does not change the twin's step
        (docs/method.md#co-training-step).
        """
        c, steps = self.config, self.config.train.steps
        sharkfin = self.sparsifier.anneal.lr_scale

        def lr(t: int) -> float:
            return c.lr * warmup_decay(t, steps, c.warmup) * sharkfin(t)

        def bridge_lr(t: int) -> float:
            return c.bridge_lr * warmup_decay(t, steps, c.warmup)

        return [
            Group(
                name="sparse",
                params=dict(self.sparse.named_parameters()),
                lr=lr,
                weight_decay=c.weight_decay,
                decayed=decayed_names(self.sparse),
            ),
            Group(
                name="bridges",
                params=dict(self.bridges.named_parameters()),
                lr=bridge_lr,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.0,
            ),
        ]


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

    The bridges' centring, scale and limits are measured on the first batches, unless training
    resumes from a checkpoint in `config.train.folder`, which holds them. Every evaluation scores
    the `validation` batches, with hybrid passes at all bridged sites. Raises ValueError where the
    models and the bridges do not fit each other, or the models have different vocabularies.

    >>> import tempfile
    >>> from bridges import BridgeConfig, BridgeSet, CotrainConfig, cotrain
    >>> from dense import tiny
    >>> from sparse import Batches, SparseGPT, SparseGPTConfig, TrainConfig, load_corpus, pack
    >>> dense = tiny()
    >>> twin = SparseGPT(SparseGPTConfig(vocab_size=dense.vocab_size, hidden_size=64))
    >>> bridges = BridgeSet(BridgeConfig.between(dense, twin, k=16))
    >>> blocks = pack(load_corpus(documents=20).train, dense.tokenizer, length=32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train = TrainConfig(steps=2, folder=folder)
    ...     config = CotrainConfig(train=train, calibration_tokens=256)
    ...     cotrain(dense, twin, bridges, Batches(blocks, 4), config)
    >>> bridges.dense_fingerprint == dense.fingerprint
    True
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
    config = replace(config, train=with_products(config.train))
    accelerator = accelerator_for(config.train, accelerator)
    dense.to(accelerator.device)
    module = Cotraining(dense, sparse, bridges, config).to(accelerator.device)
    if config.calibration_tokens:
        calibrate(dense, bridges, batches, config.calibration_tokens, accelerator.device)

    def evaluate() -> dict[str, float]:
        how = {"progress": accelerator.is_main_process}
        return validate(dense, sparse, bridges, validation, accelerator.device, accelerator, **how)

    identity = asdict(config) | {"dense": fingerprint(dense), "bridges": asdict(bridges.config)}
    identity |= {"sparse": sparse.config.architecture()}
    del identity["train"]  # `fit` adds these itself
    with mode(sparse, training=True):
        fit(
            module,
            batches,
            config.train,
            after_step=module.sparsifier.project,
            evaluate=evaluate,
            accelerator=accelerator,
            identity=identity,
        )
    bridges.dense_fingerprint = fingerprint(dense)
    bridges.sparse_fingerprint = fingerprint(sparse)


def _world() -> tuple[int, int]:
    """Return how many processes train together, and the rank of this one among them."""
    if not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()
