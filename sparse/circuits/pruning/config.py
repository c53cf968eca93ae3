"""The settings of pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparse.storage.records import checked


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """How to prune (docs/method.md#pruning). The defaults fit a model of 2 layers, 256 wide."""

    target_loss: float = 0.15
    """Loss that the circuit should reach on the validation split, in nats per prompt; chance is
    ln 2."""
    margin: float = 1 / 3
    """Share of the target that is held back, in [0, 1): the size is chosen to meet the goal
    (1 - margin) target_loss, because the test split has other words than the validation split."""
    ablation: Literal["mean", "zero"] = "mean"
    """What a node outside the circuit is held at: its mean over the training text, or zero."""
    n_steps: int = 600
    """Optimizer steps on tau, the learned score of each node (learn.py)."""
    n_pairs: int = 32
    """Pairs of the train split per step; all of them where there are fewer."""
    lr: float = 3e-2
    """AdamW step size at the start; it falls linearly to 0."""
    k_coef: float = 1e-3
    """Nats that one kept node costs. Smaller needs more steps
    (docs/method.md#first-measurements)."""
    theta: float = 1.0
    """Temperature of the gradient that stands in for that of the mask (mask.py), in units of tau;
    above 0."""
    beta2: float = 0.95
    """AdamW's second moment decay, in (0, 1)."""
    weight_decay: float = 1e-3
    """AdamW's pull of tau towards 0, per unit of step size."""
    clip: float = 1.0
    """Norm to which a larger gradient of tau is scaled down."""
    start: Literal["flat", "noise"] = "noise"
    """How tau starts. "flat": at `bias`. "noise": normally distributed about `bias`."""
    bias: float = 0.1
    """Mean of tau at the start, in [-1, 1]. A node is kept where tau >= 0, so with a bias well
    above `noise` every node starts kept."""
    noise: float = 0.01
    """Standard deviation of tau at the start."""
    window: int = 12
    """Number of sizes just below the one found by bisection that are tried too, because the loss is
    not monotone in the size."""
    clean_up: float = 0.005
    """Nats by which the validation loss may rise in all while the clean-up drops nodes one by one;
    0 leaves the clean-up out."""
    n_trials: int = 200
    """Number of nodes that the clean-up tries to drop at most, the least needed first."""
    seed: int = 0
    """Seed of the noise in the start and of the pairs drawn for each step."""

    def __post_init__(self) -> None:
        positive = ("target_loss", "n_pairs", "lr", "theta", "clip")
        at_least_0 = ("n_steps", "k_coef", "weight_decay", "noise", "window", "clean_up")
        at_least_0 += ("n_trials", "seed")
        for name in (*positive, *at_least_0):
            value = getattr(self, name)
            if value < 0 or (value == 0 and name in positive):
                bound = "above 0" if name in positive else "at least 0"
                raise ValueError(f"PruneConfig.{name}={value} must be {bound}")
        if not (0 <= self.margin < 1 and 0 < self.beta2 < 1 and -1 <= self.bias <= 1):
            raise ValueError(
                "PruneConfig needs margin in [0, 1), beta2 in (0, 1) and bias in [-1, 1], got "
                f"{self.margin}, {self.beta2}, {self.bias}"
            )
        for name, known in (("ablation", ("mean", "zero")), ("start", ("flat", "noise"))):
            if getattr(self, name) not in known:
                raise ValueError(f"PruneConfig.{name}={getattr(self, name)!r} must be in {known}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruneConfig:
        """Return the config with these fields; an unknown key is a ValueError."""
        return cls(**checked(cls, values, "PruneConfig"))
