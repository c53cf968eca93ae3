"""Measure speed and memory of a few real training steps on the device at hand.

    seconds of a step = fixed + tokens * per_token

What is fixed is the optimizer and the projection, which touch every parameter once; what grows with
the tokens are the passes. They are timed apart within one step, so that a probe of a few sequences
predicts a step of many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bridges.maps.bridge import BridgeSet
from bridges.protocol import FrozenModel
from bridges.training.config import CotrainConfig
from bridges.training.cotrain import Cotraining
from sparse.model.gpt import SparseGPT
from sparse.training.loop import fit
from sparse.training.shard import AllStop

NEVER = 10**9
"""A number of steps that no measurement reaches."""
SLOW = 0.5
"""Seconds of a step of one sequence from which on sizes are not tried one by one."""
TIMED = 2
"""Steps that are timed, after a first one that warms up; the faster of them counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """What `time_steps` measured. A number is None where it could not be measured."""

    device: str
    sequences: int = 0
    """Sequences of the measured step, over all processes and all passes. A measured step has at
    most two passes, even where the steps of the run have more."""
    length: int = 0
    """Tokens of a sequence."""
    seconds: float | None = None
    """Seconds of one step: forward and backward passes, optimizer and projection."""
    fixed: float = 0.0
    """Those of them that do not grow with the tokens: optimizer and projection."""
    peak: int | None = None
    """Bytes of memory at the peak."""
    peak_of: str = ""
    """How the peak was measured: by torch.cuda.max_memory_allocated, or as the largest resident
    size of the process."""
    failed: str = ""
    """The first size that did not fit, and the error; empty where every size tried did fit."""

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens per second over all processes."""
        return None if self.seconds is None else self.sequences * self.length / self.seconds

    def of(self, tokens: int | float) -> float | None:
        """Return the seconds of a step of so many tokens over all processes."""
        if self.seconds is None:
            return None
        per_token = (self.seconds - self.fixed) / (self.sequences * self.length)
        return self.fixed + tokens * per_token


class _Enough(AllStop):
    """Raised to end the training before it has written anything."""


class _Clocked:
    """A source of random tokens that notes when each step asks for a batch, and when it updates.

    After `steps` steps it raises `_Enough` instead of giving another batch; after two, if these
    took longer than `enough` seconds.
    """

    def __init__(self, ids: Tensor, device: torch.device, steps: int, enough: float) -> None:
        self.ids, self.device, self.steps, self.enough = ids, device, steps, enough
        self.times: list[float] = []
        self.updates: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.times.append(self._now())
            n, spent = len(self.times) - 1, self.times[-1] - self.times[0]
            if n == self.steps or (n == 2 and spent > self.enough):
                raise _Enough
            yield self.ids

    def update(self, *_: Any) -> None:
        """Note that the passes of a step are over and its update begins."""
        self.updates.append(self._now())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("a probe is never resumed")


def time_steps(
    dense: FrozenModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    config: CotrainConfig,
    batch: int,
    length: int,
    accelerator: Accelerator,
    seconds: float = 20.0,
) -> StepTime:
    """Return time and memory of the steps that `cotrain` would take, on random tokens.

    A pass of one sequence per process is tried first, then one of twice as many, and so on up to
    the size of one pass of the planned step, as long as all steps together would stay within
    `seconds` (compilation does not count). A slow device goes straight to the largest that would.
    The result is that of the largest size that fitted. The timed steps have the twin at its final
    density.

    The steps are taken by `fit` itself, which is stopped before it writes. So no file is written
    and the random numbers drawn later are the same as without this call. But `sparse` and `bridges`
    are changed: build them anew before training. Raises ValueError for a batch that processes and
    passes cannot share evenly.

    >>> from accelerate import Accelerator
    >>> from bridges import BridgeConfig, BridgeSet, CotrainConfig, time_steps
    >>> from dense import tiny
    >>> from sparse import SparseGPT, SparseGPTConfig, TrainConfig
    >>> dense = tiny()
    >>> twin = SparseGPT(SparseGPTConfig(vocab_size=dense.vocab_size, hidden_size=64))
    >>> bridges = BridgeSet(BridgeConfig.between(dense, twin, k=16))
    >>> config = CotrainConfig(train=TrainConfig(steps=1000, folder="runs/a"))
    >>> found = time_steps(dense, twin, bridges, config, 1, 32, Accelerator())
    >>> found.sequences, found.tokens_per_second > 0
    (1, True)
    """
    device, world = accelerator.device, accelerator.num_processes
    most, n = rows_per_pass(batch, world, config.train.accumulate), 1
    dense.to(device)
    best, spent = StepTime(device=_name(device)), 0.0
    while True:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # each step seeds
            found = _try(dense, sparse, bridges, config, n * world, length, accelerator, seconds)
        if isinstance(found, str):
            return replace(best, failed=f"{n} x {length} tokens a process: {found}")
        # of several processes the slowest counts, and all go on or none
        took = _slowest(found.seconds or 0.0, accelerator)
        best, spent = replace(found, seconds=took), spent + (1 + TIMED) * took
        n, tried = _next(n, most, took, seconds - spent), n
        if n == tried:
            return best


def _next(n: int, most: int, took: float, left: float) -> int:
    """Return the size to try after `n`; `n` itself where there is none, or no time for it.

    It is twice as large. On a slow device it is as large as a step to warm up and a timed one allow
    in the time that is `left`: a large pass costs less per token than a small one.
    """
    two = 2 * took / n  # seconds of two steps, per sequence
    if n == most or min(2 * n, most) * two > left:
        return n
    larger = min(2 * n, most)
    while took > SLOW and 2 * larger <= most and 2 * larger * two <= left:
        larger *= 2
    return larger


def rows_per_pass(batch: int, processes: int, accumulate: int) -> int:
    """Return the number of sequences in a pass of one process.

    Raises ValueError where the batch cannot be shared evenly.
    """
    parts = processes * accumulate
    if batch < 1 or batch % parts:
        raise ValueError(
            f"a batch of {batch} sequences cannot be shared by {processes} processes and "
            f"{accumulate} passes evenly; take a multiple of {parts}"
        )
    return batch // parts


def _try(
    dense: FrozenModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    config: CotrainConfig,
    sequences: int,
    length: int,
    accelerator: Accelerator,
    seconds: float,
) -> StepTime | str:
    """Return what a few steps took, or the first line of the error if they ran out of memory."""
    device, short = accelerator.device, _short(config)
    module = Cotraining(dense, sparse, bridges, short).to(device)
    ids = torch.randint(dense.vocab_size, (sequences * short.train.accumulate, length))
    # several processes must all take the same number of steps, whatever their clocks say
    enough = seconds / 4 if accelerator.num_processes == 1 else math.inf
    batches = _Clocked(ids, device, 1 + TIMED, enough)

    def at_the_end(step: int) -> dict[str, float]:
        return module.sparsifier.project(short.train.steps)  # the twin's final density

    _reset_peak(device)
    handle = register_optimizer_step_pre_hook(batches.update)
    try:
        fit(module, batches, short.train, at_the_end, accelerator=accelerator)
    except _Enough:
        times, peak, of = batches.times, *_peak(device)
        steps = zip(times[1:], batches.updates[1:], times[2:], strict=False)
        took, fixed = min((end - begun, end - update) for begun, update, end in steps)
        return StepTime(
            device=_name(device),
            sequences=len(ids),
            length=length,
            seconds=took,
            fixed=fixed,
            peak=peak,
            peak_of=of,
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return str(error).split("\n")[0]
    finally:
        handle.remove()
        module.zero_grad(set_to_none=True)
        accelerator.free_memory()
    raise AssertionError("fit ended before it was stopped")


def _short(config: CotrainConfig) -> CotrainConfig:
    """Return the config of a run that takes a few steps of the same kind and writes nothing."""
    train = replace(
        config.train,
        steps=2 + TIMED,  # one more than are taken: what follows the last is not reached
        folder=str(Path(config.train.folder) / "never written"),
        accumulate=min(2, config.train.accumulate),
        log_every=NEVER,
        checkpoint_every=NEVER,
        evaluate_every=0,
    )
    return replace(config, train=train)


def _slowest(seconds: float, accelerator: Accelerator) -> float:
    mine: Any = torch.tensor([seconds], device=accelerator.device)
    return float(accelerator.gather(mine).max())  # pyright: ignore


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5")


def _peak(device: torch.device) -> tuple[int | None, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated"
    status = Path("/proc/self/status")
    if not status.exists():
        return None, "no resident peak on this system"
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024, "resident peak (VmHWM)"
