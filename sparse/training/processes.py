"""How many processes train together, and how a signal asks them to stop.

shard.py splits the parameters among them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from .config import TrainConfig

PATIENCE = 2.0
"""Seconds that what is under way has to end by itself after a signal."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command resumes it."""


class Abandoned(Exception):
    """What was under way was given up because it was asked to stop; nothing it did counts."""


class StopRequest:
    """Whether a signal has asked to stop, and which. It is true once one has."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._open = self._late = False

    def __bool__(self) -> bool:
        return bool(self.names)

    def note(self, number: int, _frame: Any = None) -> None:
        """Note a signal; its patience begins now."""
        self.names.append(signal.Signals(number).name)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def end(self, _number: int = 0, _frame: Any = None) -> None:
        """Give up what is under way, if it may be given up, now or when it begins."""
        self._late = True
        if self._open:
            raise Abandoned

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Raise Abandoned in this block where a signal has waited PATIENCE seconds for its end."""
        self._open = True
        try:
            if self._late:
                raise Abandoned
            yield
        finally:
            self._open = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yield an object to which SIGINT and SIGTERM are noted while the context is open.

    So a signal does not end the process in the middle of a step; the loop looks at the object after
    the step. Where a block of the loop may be abandoned and takes longer than PATIENCE seconds
    more, it is. Outside the main thread no signal can be caught, and nothing is noted.
    """
    asked = StopRequest()
    kinds: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = {}
    if threading.current_thread() is not threading.main_thread():
        kinds = ()  # only the main thread may handle signals
    try:
        for kind in kinds:
            before[kind] = signal.signal(kind, asked.note)
        if kinds and hasattr(signal, "SIGALRM"):
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, asked.end)
        yield asked
    finally:
        if hasattr(signal, "SIGALRM") and signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
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


def launched(processes: int | None = None, threads: int | None = None) -> PartialState:
    """Meet the other processes of an `accelerate launch`, and share the CPU's threads with them.

    Each process gets `threads`, by default its share of the cores; `accelerate launch` would leave
    one. Raises ValueError where there are other than the asked `processes` (`check_processes`).

    >>> import torch
    >>> from sparse import launched
    >>> launched(threads=torch.get_num_threads()).num_processes
    1
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(processes, state.num_processes)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // state.num_processes))
    return state


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
