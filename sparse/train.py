"""The one training loop: order of operations, schedules, log, checkpoints, resume."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import read_folder, steps_saved, write_folder
from .files import replace_files


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long to train, how often to save, where to write. Times are in optimizer steps."""

    steps: int
    """Optimizer steps in all; the schedules stretch over them."""
    folder: str
    """Where log.jsonl and checkpoints/ go."""
    seed: int = 0
    """Fixes every random choice of the run."""
    log_every: int = 10
    """Optimizer steps between lines of the log."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations, 0 for none but the last."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; parameters and moments stay float32."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name}={getattr(self, name)} must be at least 1")
        if self.evaluate_every < 0:
            raise ValueError(
                f"TrainConfig.evaluate_every={self.evaluate_every} must not be below 0"
            )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a learning rate and one pooled gradient normalisation.

    The gradients of a group are divided by their root mean square r over all its entries:
    g <- g / (r + 1e-5), a normalisation and not a clipping (method.md 2.1, step 4).
    """

    name: str
    params: dict[str, nn.Parameter]
    lr: Callable[[int], float]
    """Learning rate as a pure function of the optimizer step."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 0.1
    """Adam's eps, in units of the normalised gradient."""
    weight_decay: float = 0.1
    """p <- p - weight_decay * lr * p after the projection, for `decayed` parameters."""
    decayed: frozenset[str] = frozenset()
    """Names of the parameters that decay."""


@runtime_checkable
class Trainable(Protocol):
    """A module whose forward returns the weighted losses; their sum is what we descend."""

    def __call__(self, ids: Tensor, step: int) -> dict[str, Tensor]: ...

    def groups(self) -> list[Group]: ...


@runtime_checkable
class BatchSource(Protocol):
    """Batches in a fixed order that can be left and taken up again."""

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def warmup_decay(step: int, steps: int, warmup: float = 0.01) -> float:
    """Return t/w below w = floor(warmup * steps), then 1 - (t-w)/(steps-w) (method.md 2.3)."""
    w = int(warmup * steps)
    return step / w if step < w else 1 - (step - w) / (steps - w)


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command resumes it."""


def fit(
    module: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    after_step: Callable[[int], dict[str, float] | None] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    accelerator: Accelerator | None = None,
    identity: dict[str, Any] | None = None,
) -> None:
    """Train `module` on `batches`, resuming from the newest checkpoint in `config.folder`.

    One step t (method.md 2.1): learning rates of t; losses and their backward; pooled gradient
    normalisation per group; Adam; `after_step(t)`, which projects and may return numbers to log;
    weight decay. Every choice is a function of t and the seed, so a resumed run gives the losses
    of an undisturbed one bit for bit. `identity` is what must not change between the two.
    """
    torch.manual_seed(config.seed)
    accelerator = accelerator or Accelerator(mixed_precision=config.mixed_precision)
    groups = module.groups()  # pyright: ignore[reportCallIssue]
    adam = [{"params": list(g.params.values()), "betas": g.betas, "eps": g.eps} for g in groups]
    optimizer = torch.optim.Adam(adam, lr=0.0, fused=True)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    run = _Run(module, groups, optimizer, batches, config, accelerator, identity or {})
    step = run.resume()
    bar = tqdm(
        total=config.steps,
        initial=step,
        desc="train",
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    with bar, _stop_requests() as stop:
        stream = iter(batches)
        while step < config.steps:
            ids = run.share(next(stream))
            for group, slot in zip(groups, optimizer.param_groups, strict=True):
                slot["lr"] = group.lr(step)
            optimizer.zero_grad(set_to_none=True)
            with accelerator.autocast():
                losses = wrapped(ids, step)
            accelerator.backward(torch.stack(list(losses.values())).sum())
            rms = {g.name: normalise_(list(g.params.values())) for g in groups}
            optimizer.step()
            notes = (after_step(step) if after_step else None) or {}
            for group, slot in zip(groups, optimizer.param_groups, strict=True):
                decay_(group, slot["lr"])
            step += 1
            bar.update()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                shown = run.log(step, losses, rms, notes)
                bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
            if evaluate and (last or _due(step, config.evaluate_every)):
                run.write({"step": step} | {f"val/{n}": v for n, v in evaluate().items()})
            if stop or last or step % config.checkpoint_every == 0:
                run.save(step, losses, rms)
            if stop and not last:
                raise Interrupted(f"stopped by {stop[0]} after step {step}; its state is saved")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@torch.no_grad()
def normalise_(params: list[nn.Parameter]) -> Tensor:
    """Divide the gradients by their pooled root mean square plus 1e-5; return that value."""
    grads = [p.grad for p in params if p.grad is not None]
    n = sum(p.numel() for p in params)
    norms = torch.stack(torch._foreach_norm(grads))  # pyright: ignore
    rms = norms.square().sum().sqrt() / n**0.5
    torch._foreach_mul_(grads, 1 / (rms + 1e-5))  # pyright: ignore
    return rms


@torch.no_grad()
def decay_(group: Group, lr: float) -> None:
    """p <- p - weight_decay * lr * p for the group's decayed parameters."""
    decayed = [group.params[name] for name in sorted(group.decayed)]
    if decayed and group.weight_decay:
        torch._foreach_mul_(decayed, 1 - group.weight_decay * lr)  # pyright: ignore


class _Run:
    """What `fit` writes and reads: the log and the checkpoints of one run."""

    def __init__(self, module, groups, optimizer, batches, config, accelerator, identity) -> None:
        self.module, self.groups, self.optimizer = module, groups, optimizer
        self.batches, self.config, self.accelerator = batches, config, accelerator
        self.identity = json.loads(json.dumps(identity | asdict(config)))
        self.folder = Path(config.folder)
        self.started, self.tokens = monotonic(), 0

    def share(self, ids: Tensor) -> Tensor:
        """This process's rows of the batch that all processes train on together."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if len(ids) % world:
            raise ValueError(
                f"a batch of {len(ids)} sequences cannot be shared by {world} processes evenly; "
                f"take a batch size that is a multiple of {world}"
            )
        self.tokens += ids.numel()
        return ids[rank::world].to(self.accelerator.device)

    def log(self, step: int, losses: dict[str, Tensor], rms: dict[str, Tensor], notes) -> dict:
        """Write one line."""
        terms = self.numbers(step, losses, rms)
        total = sum(terms.values())
        seconds = monotonic() - self.started
        self.write(
            {"step": step, "loss/total": total}
            | {f"loss/{name}": value for name, value in terms.items()}
            | {f"lr/{g.name}": g.lr(step - 1) for g in self.groups}
            | {f"grad_rms/{name}": value.item() for name, value in rms.items()}
            | notes
            | {"time/seconds": seconds, "time/tokens_per_second": self.tokens / seconds}
        )
        return {"loss": total} | terms

    def numbers(
        self, step: int, losses: dict[str, Tensor], rms: dict[str, Tensor]
    ) -> dict[str, float]:
        """The losses as numbers; refuse to go on where they or the gradients are none."""
        terms = {name: value.item() for name, value in losses.items()}
        seen = terms | {f"gradient of {name}": value.item() for name, value in rms.items()}
        if not all(map(isfinite, seen.values())):
            raise FloatingPointError(
                f"the loss at step {step} is {sum(terms.values())} ({seen}); the checkpoint before "
                "it is whole: lower the learning rate or raise the warm-up and resume"
            )
        return terms

    def write(self, line: dict) -> None:
        """Append a line to log.jsonl."""
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

    def save(self, step: int, losses: dict[str, Tensor], rms: dict[str, Tensor]) -> None:
        """Write a checkpoint and drop the oldest; never one that a broken step left."""
        self.numbers(step, losses, rms)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        moments = {
            f"{group.name}/{name}/{key}": value
            for group in self.groups
            for name, p in group.params.items()
            for key, value in self.optimizer.state[p].items()
        }
        tensors = {"module": self.module.state_dict(), "adam": moments}
        state = {"step": step, "batches": self.batches.state_dict(), "identity": self.identity}
        folder = self.folder / "checkpoints"
        write_folder(folder / f"step-{step:08d}", tensors, state)
        for old in steps_saved(folder)[: -self.config.keep_checkpoints]:
            _remove(old)

    def resume(self) -> int:
        """Load the newest checkpoint, cut the log back to it, and return its step (0: none)."""
        checkpoints = self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            for partial in checkpoints.glob("*.partial"):
                shutil.rmtree(partial)
        saved = steps_saved(checkpoints)
        if not saved:
            self._cut_log(0)
            return 0
        tensors, state = read_folder(saved[-1], "module", "adam")
        self._same_run(state["identity"], saved[-1])
        self.module.load_state_dict(tensors["module"])
        for group in self.groups:
            for name, p in group.params.items():
                self.optimizer.state[p] = {
                    key: tensors["adam"][f"{group.name}/{name}/{key}"].to(p.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.batches.load_state_dict(state["batches"])
        self._cut_log(state["step"])
        return state["step"]

    def _same_run(self, saved: dict, folder: Path) -> None:
        mine = self.identity
        differ = [k for k in sorted(saved.keys() | mine.keys()) if saved.get(k) != mine.get(k)]
        differ = [k for k in differ if k not in ("folder", "keep_checkpoints", "checkpoint_every")]
        if differ:
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


def _remove(folder: Path) -> None:
    """Remove a checkpoint: first its name, so that a kill half way leaves no damaged one."""
    gone = folder.with_name(f"{folder.name}.partial")
    folder.rename(gone)
    shutil.rmtree(gone)


@contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """Collect the names of SIGINT and SIGTERM instead of dying in the middle of a step."""
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
