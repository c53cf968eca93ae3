"""What a training run is told, and what it reads its batches from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long to train, how often to save, where to write. Times are in optimizer steps.

    A resumed run may change `folder`, the four fields that say how often something is written, and
    on how many processes it runs: nothing that is computed depends on them (dropout does on the
    last, and rounding).
    """

    steps: int
    """Optimizer steps in all; the schedules stretch over them."""
    folder: str
    """Where log.jsonl and checkpoints/ go."""
    seed: int = 0
    """Fixes every random choice of the run."""
    log_every: int = 10
    """Optimizer steps between lines of the log. Where several processes train together they also
    agree here, and only here, whether one of them was asked to stop."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations, 0 for none but the last."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step, each on an equal share of the batch. The
    gradient is that of the whole batch, up to rounding, for losses that are means over it."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass; parameters, gradients and moments stay float32. "fp16" scales
    the loss, takes the scale off again before the gradients are looked at, and needs CUDA."""
    processes: int | None = None
    """How many processes must train together; None takes what the launcher started, and refuses a
    launch of several that came out as one."""
    shard: bool = False
    """Whether each process holds only its share of the parameters, gradients and moments (FSDP2),
    gathered for every pass. The numbers are those without, up to rounding."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name}={getattr(self, name)} must be at least 1")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"TrainConfig.processes={self.processes} must be at least 1, or None")
        if self.evaluate_every < 0:
            raise ValueError(
                f"TrainConfig.evaluate_every={self.evaluate_every} must not be below 0"
            )


@runtime_checkable
class BatchSource(Protocol):
    """Batches in a fixed order that can be left and taken up again."""

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
