"""The one training loop: order of operations, learning rates, gradient scaling, decay."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .run_state import BatchSource, Interrupted, RunState, TrainConfig, stop_requests
from .shard import gathered, own, prepared, sum_over_shards

__all__ = [
    "BatchSource",
    "Group",
    "Interrupted",
    "TrainConfig",
    "Trainable",
    "check_processes",
    "fit",
]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a learning rate and one pooled gradient size.

    r = root mean square of the gradients over all entries of the group (method.md 2.1, step 4).
    """

    name: str
    params: dict[str, nn.Parameter]
    lr: Callable[[int], float]
    """Learning rate as a pure function of the optimizer step."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 0.1
    """Adam's eps, in units of the scaled gradient."""
    scaling: Literal["normalise", "clip", "none"] = "normalise"
    """"normalise": g <- g / (r + 1e-5), which also scales small gradients up. "clip":
    g <- g / max(r, 1). "none": g as it is."""
    weight_decay: float = 0.1
    """p <- p - weight_decay * lr * p for `decayed` parameters."""
    decay: Literal["after_projection", "adamw"] = "after_projection"
    """When: "after_projection" at the end of the step, "adamw" before Adam's update."""
    decayed: frozenset[str] = frozenset()
    """Names of the parameters that decay."""


@runtime_checkable
class Trainable(Protocol):
    """A module whose forward returns the weighted losses; their sum is what we descend."""

    def __call__(self, ids: Tensor, step: int) -> dict[str, Tensor]: ...

    def groups(self) -> list[Group]: ...


@runtime_checkable
class NeedsWhole(Protocol):
    """A module whose losses on a part of a batch depend on the rest of it."""

    def of_whole(self, parts: Sequence[Tensor]) -> Sequence[Any]:
        """Return, per part, what `forward` takes after the step; called before the first part."""
        ...


def warmup_decay(step: int, steps: int, warmup: float = 0.01) -> float:
    """Return t/w below w = floor(warmup * steps), then 1 - (t-w)/(steps-w) (method.md 2.3)."""
    w = int(warmup * steps)
    return step / w if step < w else 1 - (step - w) / (steps - w)


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

    One step t (method.md 2.1): learning rates of t; losses and their backward; the pooled gradient
    of each group scaled; Adam; `after_step(t)`, which projects and may return numbers to log;
    weight decay. Every choice is a function of t and the seed, so a resumed run gives the losses
    of an undisturbed one bit for bit. `identity` is what must not change between the two.

    Every process calls `after_step` and `evaluate`; where `config.shard` splits the parameters,
    they are split in `after_step` (`shard.whole_` gathers one) and whole in `evaluate`. SIGINT and
    SIGTERM let the step end, save, and raise Interrupted; of several processes one is enough, and
    all stop at the next line of the log.
    """
    accelerator = accelerator_for(config, accelerator)
    with prepared(module, accelerator, config.shard) as wrapped:
        groups: list[Group] = module.groups()  # pyright: ignore[reportCallIssue]
        adam = [{"params": list(g.params.values()), "betas": g.betas, "eps": g.eps} for g in groups]
        optimizer = accelerator.prepare_optimizer(torch.optim.Adam(adam, lr=0.0, fused=True))
        named = {f"{g.name}/{name}": p for g in groups for name, p in g.params.items()}
        run = RunState(module, named, optimizer, batches, config, accelerator, identity or {})
        halted = _steps(run, wrapped, groups, after_step, evaluate)
    if halted:
        raise Interrupted(halted)


def _steps(
    run: RunState,
    wrapped: nn.Module,
    groups: list[Group],
    after_step: Callable[[int], dict[str, float] | None] | None,
    evaluate: Callable[[], dict[str, float]] | None,
) -> str:
    """Take the steps that are left; return "", or why they stopped before the last."""
    config, accelerator, step = run.config, run.accelerator, run.resume()
    bar = _bar(config.steps, step, accelerator)
    with bar, stop_requests() as stop:
        stream = iter(run.batches)
        while step < config.steps:
            _seed(config.seed, step, accelerator.process_index)
            ids = run.share(next(stream))
            losses = _backward(run.module, wrapped, ids, step, config, accelerator)
            lr = {g.name: g.lr(step) for g in groups}
            rms = _update(groups, run.optimizer, lr, accelerator)
            notes = (after_step(step) if after_step else None) or {}
            for group in groups:
                if group.decay == "after_projection":
                    decay_(group, lr[group.name])
            step += 1
            bar.update()
            last, alone = step == config.steps, accelerator.num_processes == 1
            halt = bool(stop) and alone
            if last or step % config.log_every == 0:
                terms, sizes, asked = run.read(step, losses, rms, bool(stop))
                bar.set_postfix(_short(run.log(step, terms, sizes, lr, notes)))
                halt |= asked
            if evaluate and (last or _due(step, config.evaluate_every)):
                with gathered(wrapped):
                    run.write({"step": step} | {f"val/{n}": v for n, v in evaluate().items()})
            if halt or last or step % config.checkpoint_every == 0:
                run.read(step, losses, rms)  # never save what a broken step left
                run.save(step)
            if halt and not last:
                who = stop[0] if stop else "a signal to another process"
                return f"stopped by {who} after step {step}; its state is saved"
    return ""


def accelerator_for(config: TrainConfig, given: Accelerator | None) -> Accelerator:
    """Return the given accelerator, or a new one; refuse one that computes otherwise."""
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
    """Raise ValueError for a launch that came out otherwise than it was asked for.

    `asked` is `TrainConfig.processes`, `world` the number of processes that train together.
    `accelerate launch --num_processes 2` starts one process where there is no GPU, and says so only
    by naming a master; with --multi_gpu, or torchrun, it starts two that train apart.
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
            f"TrainConfig.processes={asked}, but {world} train{'s' * (world == 1)} together; "
            f"{remedy}"
        )


def _backward(
    module: nn.Module,
    wrapped: nn.Module,
    ids: Tensor,
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Leave the gradient of the batch in the parameters and return its losses."""
    wrapped.zero_grad(set_to_none=True)
    n, total = config.accumulate, {}
    parts, known = ids.chunk(n), [()] * n
    if n > 1 and isinstance(module, NeedsWhole):
        with accelerator.autocast(), gathered(wrapped):
            known = [(x,) for x in module.of_whole(parts)]
    for i, part in enumerate(parts):
        with nullcontext() if i == n - 1 else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                losses = wrapped(part, step, *known[i])
            accelerator.backward(torch.stack(list(losses.values())).sum() / n)
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach() / n
    return total


def _update(
    groups: list[Group], optimizer: Any, lr: dict[str, float], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Scale the gradients, decay where AdamW does, take Adam's step; return the gradients' RMS."""
    accelerator.unscale_gradients(optimizer)
    rms = {g.name: scale_(list(g.params.values()), g.scaling) for g in groups}
    for group, slot in zip(groups, optimizer.param_groups, strict=True):
        slot["lr"] = lr[group.name]
        if group.decay == "adamw":
            decay_(group, lr[group.name])
    optimizer.step()
    return rms


def _bar(steps: int, done: int, accelerator: Accelerator) -> tqdm:
    hidden, n = not accelerator.is_main_process, accelerator.num_processes
    what = f"train, {n} process{'es' * (n > 1)}"
    return tqdm(
        total=steps, initial=done, desc=what, unit="step", disable=hidden, dynamic_ncols=True
    )


def _seed(seed: int, step: int, rank: int) -> None:
    """What a module draws in a step (dropout) depends on these alone."""
    digest = sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _short(shown: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in shown.items()}


@torch.no_grad()
def scale_(params: list[nn.Parameter], how: Literal["normalise", "clip", "none"]) -> Tensor:
    """Scale the gradients as `Group.scaling` says; return their root mean square before."""
    grads = [p.grad for p in params if p.grad is not None]
    n = sum(p.numel() for p in params)
    norms = torch.stack(torch._foreach_norm(own(grads)))  # pyright: ignore
    rms = sum_over_shards(norms.square().sum(), grads).sqrt() / n**0.5
    if how != "none":
        factor = 1 / (rms + 1e-5) if how == "normalise" else 1 / rms.clamp(min=1.0)
        torch._foreach_mul_(own(grads), factor)  # pyright: ignore
    return rms


@torch.no_grad()
def decay_(group: Group, lr: float) -> None:
    """p <- p - weight_decay * lr * p for the group's decayed parameters."""
    decayed = [group.params[name] for name in sorted(group.decayed)]
    if decayed and group.weight_decay:
        torch._foreach_mul_(own(decayed), 1 - group.weight_decay * lr)  # pyright: ignore
