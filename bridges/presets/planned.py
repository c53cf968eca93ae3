"""The plan of a run by a preset, and as many steps as fit into the hours there are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from bridges.cost.plan import Plan, plan
from bridges.cost.prune_time import prune_seconds
from bridges.cost.step_time import time_steps
from bridges.task_circuits import choose_tasks
from bridges.training.torch_compile import compiled
from sparse.circuits.pruning.config import PruneConfig
from sparse.tasks.score import positions_of

from .preset import EVALUATED, Preset


def planned(
    preset: Preset,
    dense: Any,
    accelerator: Accelerator | None = None,
    *,
    hours: float | None = None,
    text_tokens: int = 0,
    folder: str = "runs/new",
    compile: bool = False,
    **train: Any,
) -> tuple[Preset, Plan]:
    """Return the preset, with as many steps as fit into `hours` if they are given, and its plan.

    The hours are those of training and validation. With an `accelerator` a few steps are run on its
    device, and the pruning of a circuit is timed; without one nothing is measured, so that `hours`
    change nothing. `text_tokens` are those of the text that the run will keep on disk; `folder` and
    `train` are as in `Preset.build`. No file is written.

    >>> from bridges import Preset, planned
    >>> from dense import tiny
    >>> preset, plan = planned(Preset.for_model(tiny()), tiny())
    >>> plan.line()
    '500 steps, 1.0 M tokens, 0.288 GB of memory predicted'
    """
    design = preset.build(dense, folder, **train)  # the measurement changes it
    times: dict[str, Any] = {}
    if accelerator is not None:
        with compiled(dense, design.sparse) if compile else nullcontext():
            probe = time_steps(dense, *design, preset.batch, preset.length, accelerator)
        times = dict(step_time=probe, pruning=pruning_seconds(preset, dense, design.sparse))
    processes = accelerator.num_processes if accelerator else 1

    def plan_of(preset: Preset) -> Plan:
        config = preset.training(folder, **train)
        shape = dict(processes=processes, text_tokens=text_tokens, evaluated=EVALUATED)
        sizes = preset.batch, preset.length
        return plan(dense, design.sparse, design.bridges, config, *sizes, **shape, **times)

    found = plan_of(preset)
    if hours is None or (steps := found.steps_within(hours)) is None:
        return preset, found
    while True:  # fewer steps have fewer, but longer evaluations beside them
        preset = replace(preset, steps=max(1, steps))
        found = plan_of(preset)
        if steps <= 1 or (found.hours() or 0) <= hours:
            return preset, found
        steps = min(steps - 1, found.steps_within(hours) or 0)


def pruning_seconds(preset: Preset, dense: Any, sparse: Any) -> float | None:
    """Return the seconds that pruning takes at most for a task: its circuit, and its nonsense twin.

    They are measured on the first task that the tokenizer can express, since prompts differ little
    in length. None where there is no such task.
    """
    config = PruneConfig(n_steps=preset.prune_steps, seed=preset.seed)
    for task in choose_tasks(preset.tasks):
        try:
            batches = task.batches(dense.tokenizer, positions_of(sparse))
        except ValueError:  # `find_circuits` will skip it and tell why
            continue
        return 2 * prune_seconds(sparse, batches, config)
    return None
