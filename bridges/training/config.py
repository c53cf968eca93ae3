"""The settings of a co-training: coefficients, learning rates, what is drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from bridges.losses.quantities import Normalised
from sparse.training.config import TrainConfig
from sparse.training.sparsity import SparsityConfig

HybridSites = Literal["sampled", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """The coefficient of each term of the loss (docs/method.md#co-training-loss)."""

    ce: float = 1.0
    """Cross entropy of the sparse model."""
    kl: float = 1.0
    """Distillation: KL(dense || sparse)."""
    nmse: float = 1.0
    """Normalised squared error of encoders and of decoders."""
    hybrid: float = 1.0
    """KL of the hybrid passes in both directions."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 0:
                raise ValueError(
                    f"LossWeights.{f.name}={getattr(self, f.name)} must not be below 0"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class CotrainConfig:
    """Everything about the co-training that is not the models' shape."""

    train: TrainConfig
    """Steps, folder, checkpoints, seed."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """How sparse the twin's weights become and when."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Coefficients of the loss."""
    nmse: Normalised = "fvu"
    """By what the squared errors of the bridges are divided (docs/method.md#normalised-error)."""
    hybrid_sites: HybridSites = "sampled"
    """At which bridged sites a sequence crosses from one model to the other. "sampled": at sites
    drawn at random for each sequence, which is cheap and leaves the mean over sites unbiased.
    "all": at every one, which has no sampling noise."""
    sites_per_sequence: int = 1
    """How many different sites a sequence draws when sampled; 1 to the number bridged."""
    hybrid_tokens: float = 1.0
    """Fraction of a sequence's positions at which the hybrid KLs are taken, in (0, 1]. The
    positions are drawn anew for each sequence and step, so the mean over them is unbiased. The
    passes themselves run over all positions: only the unembedding gets cheaper."""
    decoder_trains_trunk: bool = True
    """Whether the decoder's error also reaches the sparse trunk (docs/method.md#gradient-flow)."""
    lr: float = 3e-2
    """Learning rate of the twin, before the warm-up, the linear decay and the sharkfin factor
    scale it (docs/method.md#learning-rate). The twin's gradients are normalised, Adam's eps is 0.1.
    """
    bridge_lr: float = 3e-3
    """Peak learning rate of the bridges, which have warm-up and linear decay but no sharkfin. Their
    gradients are normalised apart from the twin's, Adam's eps is 1e-8."""
    weight_decay: float = 0.1
    """Decay of the twin's matrices per unit of learning rate; bridges do not decay."""
    warmup: float = 0.02
    """Share of the steps over which the learning rates rise from 0."""
    calibration_tokens: int = 16384
    """At least so many tokens give, at the start, the mean and the scale of the dense residual at
    each site (whole batches are taken). With 0 the bridges neither centre nor scale it."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"CotrainConfig.warmup={self.warmup} must be in [0, 1)")
        for name in ("lr", "bridge_lr", "sites_per_sequence"):
            if getattr(self, name) <= 0:
                raise ValueError(f"CotrainConfig.{name}={getattr(self, name)} must be above 0")
        for name, known in (("nmse", Normalised), ("hybrid_sites", HybridSites)):
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"CotrainConfig.{name}={value!r} must be one of {get_args(known)}")
        if self.calibration_tokens < 0:
            raise ValueError(
                f"CotrainConfig.calibration_tokens={self.calibration_tokens} must not be below 0"
            )
        if not 0 < self.hybrid_tokens <= 1:
            raise ValueError(f"CotrainConfig.hybrid_tokens={self.hybrid_tokens} must be in (0, 1]")
        w = self.weights
        if not (w.nmse or w.hybrid) or not (w.ce or w.kl or w.hybrid):
            raise ValueError(
                f"CotrainConfig.weights={w} leave the {'bridges' if w.ce or w.kl else 'twin'} "
                "untrained; give nmse or hybrid, and ce, kl or hybrid, a weight above 0"
            )
