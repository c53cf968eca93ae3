"""The files of a training run: its log (log.jsonl) and its checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from sparse.ops.csr_linear import fastest_products
from sparse.storage.atomic import replace_files
from sparse.storage.checkpoint import read_folder, remove_folder, steps_saved, write_folder

from .config import BatchSource, TrainConfig
from .shard import split_like, whole

# The fields of TrainConfig that a resumed run may change. The last two may change because losses
# and gradients are those of the joint batch, however it is shared among processes.
FREE = {"folder", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
FREE |= {"processes", "shard"}
# What runs did whose checkpoints do not name a field, because they are older than it.
BEFORE = {"products": "scipy"}


def with_products(config: TrainConfig) -> TrainConfig:
    """Return `config` with its `products` decided: as given, as resumed, or the fastest here.

    What a run computes with is chosen once, when it starts, and read from its newest checkpoint
    when it resumes. A checkpoint made before there was a choice stands for "scipy".

    >>> from sparse import TrainConfig, with_products
    >>> with_products(TrainConfig(steps=1, folder="runs/new")).products in ("mkl", "scipy")
    True
    """
    if config.products is not None:
        return config
    saved = steps_saved(Path(config.folder) / "checkpoints")
    if not saved:
        return replace(config, products=fastest_products())
    _, state = read_folder(saved[-1])
    return replace(config, products=(BEFORE | state["identity"])["products"])


class RunState:
    """The log and the checkpoints of one run, which `fit` writes and reads."""

    def __init__(
        self,
        module: nn.Module,
        named: dict[str, nn.Parameter],
        optimizer: Any,
        batches: BatchSource,
        config: TrainConfig,
        accelerator: Accelerator,
        identity: dict[str, Any],
    ) -> None:
        """Take what a checkpoint holds.

        `named` holds the trained parameters under "group/name". `identity` holds, besides the
        fields of `config`, the settings that a checkpoint must share with this run to be resumed.
        """
        self.module, self.named, self.optimizer = module, named, optimizer
        self.batches, self.config, self.accelerator = batches, config, accelerator
        self.identity = json.loads(json.dumps(identity | asdict(config)))
        self.folder = Path(config.folder)
        self.started, self.tokens = monotonic(), 0

    def share(self, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "part pos"]:
        """Return this process's rows of the batch that all processes train on together.

        Raises ValueError unless the number of rows is a multiple of processes times
        `config.accumulate`.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = world * self.config.accumulate
        if len(ids) % parts:
            raise ValueError(
                f"a batch of {len(ids)} sequences cannot be shared by {world} processes and "
                f"{self.config.accumulate} passes evenly; take a batch size that is a multiple of "
                f"{parts}"
            )
        self.tokens += ids.numel()
        return ids[rank::world].to(self.accelerator.device, non_blocking=True)

    def read(
        self, step: int, losses: dict[str, Tensor], rms: dict[str, Tensor], asked: bool = False
    ) -> tuple[dict[str, float], dict[str, float], bool]:
        """Return the losses, the gradient sizes, and whether any process was asked to stop.

        Losses and sizes are means over all processes. `asked` says whether this process was asked
        to stop. Here the host waits for the device and the processes wait for each other, so `fit`
        calls this only where it logs or saves. Raises FloatingPointError, in every process, where
        a loss is not finite (or a gradient size, unless a scaler handles overflows).
        """
        values = [*losses.values(), *rms.values()]
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        mine = torch.stack([*(v.detach().float() for v in values), flag])
        *numbers, any_asked = self.accelerator.reduce(mine, "mean").tolist()  # pyright: ignore
        terms = dict(zip(losses, numbers[: len(losses)], strict=True))
        sizes = dict(zip(rms, numbers[len(losses) :], strict=True))
        seen = dict(terms)
        if self.accelerator.scaler is None:  # a scaler skips steps whose gradients overflow
            seen |= {f"gradient of {name}": value for name, value in sizes.items()}
        if not all(map(isfinite, seen.values())):
            raise FloatingPointError(
                f"the loss at step {step} is {sum(terms.values())} ({seen}); the checkpoint before "
                "it is whole: lower the learning rate or raise the warm-up and resume"
            )
        return terms, sizes, any_asked > 0

    def log(
        self,
        step: int,
        terms: dict[str, float],
        rms: dict[str, float],
        lr: dict[str, float],
        notes: dict[str, float],
    ) -> dict[str, float]:
        """Write one line of the log; return the losses, which the progress bar shows."""
        total = sum(terms.values())
        seconds = monotonic() - self.started
        self.write(
            {"step": step, "loss/total": total}
            | {f"loss/{name}": value for name, value in terms.items()}
            | {f"lr/{name}": value for name, value in lr.items()}
            | {f"grad_rms/{name}": value for name, value in rms.items() if isfinite(value)}
            | notes
            | {"time/seconds": seconds, "time/tokens_per_second": self.tokens / seconds}
        )
        return {"loss": total} | terms

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to log.jsonl; only the main process does."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "log.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(
                error.errno,
                f"could not append to {path} ({error.strerror or error}); the checkpoints are "
                "whole: free some space and start the same command again to resume",
            ) from error

    def save(self, step: int) -> None:
        """Write a checkpoint and delete all but the newest `config.keep_checkpoints`.

        Every process calls this, and it returns in all of them once the checkpoint is on disk.
        """
        main = self.accelerator.is_main_process
        moments = {
            f"{name}/{key}": value
            for name, p in self.named.items()
            for key, value in self.optimizer.state[p].items()
        }
        parts = {"module": self.module.state_dict(), "adam": moments}
        tensors = {stem: whole(named, keep=main) for stem, named in parts.items()}
        if main:
            state = {"step": step, "batches": self.batches.state_dict(), "identity": self.identity}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            folder = self.folder / "checkpoints"
            write_folder(folder / f"step-{step:08d}", tensors, state)
            for old in steps_saved(folder)[: -self.config.keep_checkpoints]:
                remove_folder(old)
        # wait: if a process ended now, the launcher could kill the one that is still writing
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the newest checkpoint and return its step, 0 where there is none.

        The lines of the log that were written after that step are removed. Raises ValueError where
        the checkpoint belongs to a run of other settings.
        """
        checkpoints = self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            for partial in checkpoints.glob("*.partial"):
                shutil.rmtree(partial)
            for partial in self.folder.glob("log.jsonl.*.partial"):
                partial.unlink()
        self.accelerator.wait_for_everyone()
        saved = steps_saved(checkpoints)
        if not saved:
            self._cut_log(0)
            return 0
        tensors, state = read_folder(saved[-1], "module", "adam")
        self._same_run(state["identity"], saved[-1])
        self.batches.load_state_dict(state["batches"])
        mine = self.module.state_dict()
        loaded = tensors["module"].items()
        self.module.load_state_dict(
            {n: split_like(t, mine[n]) if n in mine else t for n, t in loaded}
        )
        for name, p in self.named.items():
            self.optimizer.state[p] = {
                "step": tensors["adam"][f"{name}/step"].to(p.device),
                "exp_avg": split_like(tensors["adam"][f"{name}/exp_avg"], p),
                "exp_avg_sq": split_like(tensors["adam"][f"{name}/exp_avg_sq"], p),
            }
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._cut_log(state["step"])
        return state["step"]

    @property
    def alone(self) -> bool:
        """Whether one process trains."""
        return self.accelerator.num_processes == 1

    def evaluated(self, step: int) -> bool:
        """Return whether the log has the evaluation of a step, or there is no log that could."""
        path = self.folder / "log.jsonl"
        lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return not lines or any(line["step"] == step and "loss/total" not in line for line in lines)

    def _same_run(self, saved: dict, folder: Path) -> None:
        mine, saved = self.identity, BEFORE | saved
        differ = [k for k in sorted(saved.keys() | mine.keys()) if saved.get(k) != mine.get(k)]
        if differ := [k for k in differ if k not in FREE]:
            changes = "; ".join(f"{k}: {saved.get(k)} there, {mine.get(k)} here" for k in differ)
            raise ValueError(
                f"{folder} belongs to another run ({changes}); give the settings it was made with "
                "to resume it, or another output folder to start anew"
            )

    def _cut_log(self, step: int) -> None:
        path = self.folder / "log.jsonl"
        if self.accelerator.is_main_process and path.exists():
            lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            replace_files(self.folder, {path.name: "".join(kept)})
