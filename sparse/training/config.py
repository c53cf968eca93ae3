"""The settings of a training run (`TrainConfig`), and what it needs of its batches (`BatchSource`).

loop.py reads both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from sparse.ops.csr_linear import Products


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long to train, how often to save, where to write. Times are in optimizer steps.

    A resumed run must have the settings it was started with, except for `folder`, `log_every`,
    `evaluate_every`, `checkpoint_every`, `keep_checkpoints`, `processes` and `shard`. Nothing that
    is computed depends on these seven, but for rounding and for dropout, which depend on the number
    of processes.
    """

    steps: int
    """Number of optimizer steps of the whole run. Every schedule (learning rate, sparsity) is
    stretched over it."""
    folder: str
    """Where log.jsonl and checkpoints/ go."""
    seed: int = 0
    """Fixes every random choice of the run."""
    log_every: int = 10
    """Optimizer steps between lines of the log. Several processes that train together also tell
    each other at these steps, and at no others, whether one of them was asked to stop."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations. 0 evaluates only after the last step."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    accumulate: int = 1
    """Number of forward and backward passes per optimizer step, each on an equal share of the
    batch. For a loss that is a mean over the batch, the gradient is that of the whole batch, up to
    rounding."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass under autocast. Parameters, gradients and Adam's moments stay
    float32. "fp16" multiplies the loss by a scale, so that small gradients do not vanish, and
    divides the gradients by it before they are normalised; it needs CUDA."""
    processes: int | None = None
    """How many processes must train together; any other number is a ValueError. None accepts the
    number that the launcher started, but refuses a launch that asked for several processes and
    started one."""
    shard: bool = False
    """Whether each process holds only its share of the parameters, gradients and moments (FSDP2).
    The parameters are gathered for every pass. The results are those of a run without sharding, up
    to rounding."""
    products: Products | None = None
    """Which library computes the products with sparse weights on a CPU. None: a new run takes
    `fastest_products()`, a resumed one what its checkpoint names (`with_products`). Either way the
    checkpoints name it, so that a run which goes on elsewhere goes on bit for bit, or says what is
    missing there."""

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
        if self.products not in (None, *get_args(Products)):
            raise ValueError(
                f"TrainConfig.products={self.products!r} must be one of {get_args(Products)}, or "
                "None"
            )


@runtime_checkable
class BatchSource(Protocol):
    """Batches in a fixed order, with a state from which iteration resumes.

    `state_dict` returns the state after the batches yielded so far, and `load_state_dict` continues
    from there. `sparse.text.batches.Batches` is one such source.
    """

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
