"""What a co-training is told: coefficients, learning rates, what is drawn at random."""

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
    """"sampled": each sequence draws its own sites, unbiased. "all": each at every site, exact."""
    sites_per_sequence: int = 1
    """How many different sites a sequence draws when sampled; 1 to the number bridged."""
    hybrid_tokens: float = 1.0
    """Fraction of a sequence's positions at which the hybrid KLs are taken, in (0, 1]. Drawn anew
    for each sequence and step, unbiased; the passes themselves run over all positions."""
    decoder_trains_trunk: bool = True
    """Whether the decoder's error also reaches the sparse trunk (docs/method.md#gradient-flow)."""
    lr: float = 3e-2
    """Peak learning rate of the twin at its final density; gradients are normalised, eps is 0.1."""
    bridge_lr: float = 3e-3
    """Peak learning rate of the bridges; gradients are normalised, eps is 1e-8."""
    weight_decay: float = 0.1
    """Decay of the twin's matrices per unit of learning rate; bridges do not decay."""
    warmup: float = 0.02
    """Share of the steps over which the learning rates rise from 0."""
    calibration_tokens: int = 16384
    """Tokens from which the dense residual's mean and scale per site are taken at the start; 0:
    residuals are taken as they are, uncentred and unscaled."""

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
