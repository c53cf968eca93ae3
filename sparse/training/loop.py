"""The one training loop, `fit`: it trains a sparse model alone, and a twin with its bridges.

The settings are in config.py, the groups of parameters in groups.py, the log and the checkpoints in
run_state.py, and what concerns several processes in processes.py and shard.py.
"""

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
from .processes import Abandoned, Interrupted, StopRequest, accelerator_for, stop_requests
from .run_state import RunState, with_products
from .shard import gathered, prepared


@runtime_checkable
class Trainable(Protocol):
    """A module that `fit` can train.

    Calling it with (ids, step) returns the loss terms by name, each already multiplied by its
    weight. Their sum is minimised. `groups` returns the parameters to train.
    """

    def __call__(self, ids: Tensor, step: int) -> dict[str, Tensor]: ...

    def groups(self) -> list[Group]: ...


@runtime_checkable
class NeedsWhole(Protocol):
    """A module whose losses on one part of a batch depend on the other parts too.

    A ratio of sums over the batch is such a loss. It matters only where `TrainConfig.accumulate`
    cuts the batch into parts.
    """

    def of_whole(self, parts: Sequence[Tensor]) -> Sequence[Any]:
        """Return one value per part, which `forward` gets as its third argument after the step.

        `fit` calls this with all parts of a batch before it runs the first of them.
        """
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
    """Train `module` (a `Trainable`) in place, resuming from a checkpoint in `config.folder`.

    One optimizer step t does this, in order (docs/method.md#the-training-step):

        1. run the losses of one batch forward and backward
        2. scale the gradients of each group by their common size (`groups.scale_`)
        3. decay the weights of groups with decay "adamw"
        4. take Adam's step at the learning rates of t
        5. call `after_step(t)`, which projects the weights and may return numbers to log
        6. decay the weights of groups with decay "after_projection" (the default)

    Every random choice is a function of t and the seed, so that a run which was stopped and resumed
    from its newest checkpoint has the losses of an undisturbed one, bit for bit. `identity` holds
    further settings that must be the same in both; a checkpoint with others is a ValueError.

    Every process calls `after_step` and `evaluate`. With `config.shard` the parameters are still
    split among the processes in `after_step` (`shard.whole_` gathers one of them), and whole in
    `evaluate`.

    SIGINT and SIGTERM let the step under way end; then the state is saved and Interrupted is
    raised. A step or an evaluation that takes more than 2 s longer (`PATIENCE`) is abandoned, and
    taken anew when the run resumes. Where several processes train, a signal to one is enough, and
    all stop at the next step that writes a line of the log. A signal during the last step raises
    nothing, since the run is complete then.
    """
    config, accelerator = with_products(config), accelerator_for(config, accelerator)
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
    """Take the steps that are left; return "", or what stopped the run before its last step."""
    config, accelerator, step = run.config, run.accelerator, run.resume()
    bar = _bar(config.steps, step, accelerator)
    with bar, stop_requests() as stop:
        missed = step and _due(step, config) and run.alone and not run.evaluated(step)
        if evaluate and missed and not _evaluate(run, wrapped, step, evaluate, stop):
            return _said(stop, step)
        stream = iter(run.batches)
        while step < config.steps:
            _seed(config.seed, step, accelerator.process_index)
            if (losses := _passes(run, wrapped, stream, step, stop)) is None:
                if step:  # before the first step there is nothing to save
                    run.save(step)
                return _said(stop, step)
            lr = {g.name: g.lr(step) for g in groups}
            rms = _update(groups, run.optimizer, lr, accelerator)
            notes = (after_step(step) if after_step else None) or {}
            for group in groups:
                if group.decay == "after_projection":
                    decay_(group, lr[group.name])
            step += 1
            bar.update()
            last = step == config.steps
            halt = bool(stop) and run.alone
            if last or step % config.log_every == 0:
                terms, sizes, asked = run.read(step, losses, rms, bool(stop))
                bar.set_postfix(_short(run.log(step, terms, sizes, lr, notes)))
                halt |= asked
            if evaluate and _due(step, config):
                if not _evaluate(run, wrapped, step, evaluate, stop):  # made when it resumes
                    halt, last = True, False
            if halt or last or step % config.checkpoint_every == 0:
                run.read(step, losses, rms)  # raises if a number is not finite: never save that
                run.save(step)
            if halt and not last:
                return _said(stop, step)
    return ""


def _passes(
    run: RunState, wrapped: nn.Module, stream: Any, step: int, stop: StopRequest
) -> dict[str, Tensor] | None:
    """Run the passes of a step; return its loss terms, or None where they were abandoned.

    One process alone may abandon them; the batches are then set back to where they were.
    """
    place = run.batches.state_dict() if run.alone else {}
    try:
        ids = run.share(next(stream))
        with stop.abandonable() if run.alone else nullcontext():
            return _backward(run.module, wrapped, ids, step, run.config, run.accelerator)
    except Abandoned:
        run.batches.load_state_dict(place)
        return None


def _said(stop: StopRequest, step: int) -> str:
    who = stop.names[0] if stop else "a signal to another process"
    kept = "its state is saved" if step else "nothing was done yet"
    return f"stopped by {who} after step {step}; {kept}"


def _evaluate(
    run: RunState,
    wrapped: nn.Module,
    step: int,
    evaluate: Callable[[], dict[str, float]],
    stop: StopRequest,
) -> bool:
    """Evaluate and log; return whether it came to its end. One process alone may abandon it."""
    try:
        with gathered(wrapped), stop.abandonable() if run.alone else nullcontext():
            found = evaluate()
    except Abandoned:
        return False
    run.write({"step": step} | {f"val/{name}": value for name, value in found.items()})
    return True


def _backward(
    module: nn.Module,
    wrapped: nn.Module,
    ids: Tensor,
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Put the gradient of the batch's total loss into the parameters; return its loss terms.

    The batch is run in `config.accumulate` parts. A term is the mean over the parts.
    """
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
    """Scale the gradients, decay as AdamW does where asked, and take Adam's step.

    Returns the root mean square of each group's gradients before scaling, by the group's name.
    """
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
    """Seed torch for one step of one process, so that dropout depends on these three alone."""
    torch.manual_seed(seed_of(seed, step, rank))


def _due(step: int, config: TrainConfig) -> bool:
    """Return whether an evaluation belongs to a step: every so many, and the last one."""
    every = config.evaluate_every
    return step == config.steps or (every > 0 and step % every == 0)


def _short(shown: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in shown.items()}
