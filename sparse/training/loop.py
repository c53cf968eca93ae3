"""The one training loop: order of operations, learning rates, gradient scaling, decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from sparse.ops.seeds import seed_of

from .config import BatchSource, TrainConfig
from .groups import Group, decay_, scale_
from .processes import Interrupted, accelerator_for, stop_requests
from .run_state import RunState
from .shard import gathered, prepared


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

    One step t (docs/method.md#the-training-step): learning rates of t; losses and their backward;
    the pooled gradient of each group scaled; Adam; `after_step(t)`, which projects and may return
    numbers to log;
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
    what = f"train, processes: {n}"
    return tqdm(
        total=steps, initial=done, desc=what, unit="step", disable=hidden, dynamic_ncols=True
    )


def _seed(seed: int, step: int, rank: int) -> None:
    """What a module draws in a step (dropout) depends on these alone."""
    torch.manual_seed(seed_of(seed, step, rank))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _short(shown: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in shown.items()}
