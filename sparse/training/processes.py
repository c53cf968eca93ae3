"""How many processes train together, and how a signal asks them to stop.

shard.py splits the parameters among them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from .config import TrainConfig


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command resumes it."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Yield a list to which SIGINT and SIGTERM add their names while the context is open.

    So a signal does not end the process in the middle of a step; the loop looks at the list after
    the step. Outside the main thread no signal can be caught, and the list stays empty.
    """
    asked: list[str] = []
    kinds: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = {}
    if threading.current_thread() is not threading.main_thread():
        kinds = ()  # only the main thread may handle signals
    try:
        for kind in kinds:
            before[kind] = signal.signal(kind, lambda n, _: asked.append(signal.Signals(n).name))
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def accelerator_for(config: TrainConfig, given: Accelerator | None) -> Accelerator:
    """Return the `given` accelerator, or a new one, after checking that it fits `config`.

    Raises ValueError for fp16 without CUDA, for an accelerator of another precision than
    `config.mixed_precision`, and for another number of processes (`check_processes`).
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(
            "TrainConfig.mixed_precision='fp16' needs CUDA, and there is none here; take 'bf16', "
            "which needs no scaling of the loss, or 'no'"
        )
    accelerator = given or Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.mixed_precision != config.mixed_precision:
        raise ValueError(
            f"TrainConfig.mixed_precision={config.mixed_precision!r}, but the accelerator computes "
            f"in {accelerator.mixed_precision!r}; give both the same"
        )
    check_processes(config.processes, accelerator.num_processes)
    return accelerator


def check_processes(asked: int | None, world: int) -> None:
    """Raise ValueError where the launcher did not start what it was asked to start.

    `asked` is `TrainConfig.processes`, `world` the number of processes that train together. On a
    machine without a GPU, `accelerate launch --num_processes 2` starts a single process; the only
    trace of the request is MASTER_PORT in its environment. With --multi_gpu there, or with
    torchrun, two processes start, but each trains alone and both would write the same folder.

    >>> from sparse import check_processes
    >>> check_processes(None, world=1)  # nothing was asked for, and one process trains
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    remedy = (
        "on a CPU, start them with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node "
        f"{max(asked or 2, launched)} SCRIPT`; on GPUs, see that torch.cuda.is_available()"
    )
    if world == 1 < launched:
        raise ValueError(
            f"{launched} processes were started, but this one trains alone, and each would write "
            f"the same folder; {remedy}"
        )
    one_of_many = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if asked is None and world == 1 and "WORLD_SIZE" not in os.environ and one_of_many:
        raise ValueError(
            "`accelerate launch` was asked for several processes and started one; "
            f"{remedy}; if one is meant, say TrainConfig.processes=1"
        )
    if asked not in (None, world):
        raise ValueError(
            f"TrainConfig.processes={asked}, but the number that train together is {world}; "
            f"{remedy}"
        )
