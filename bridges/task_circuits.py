"""The circuits of a run: one for every task that both models do, and one for its nonsense twin.

A task that the dense model does not do has nothing there to be explained, and one that the twin
does not do has no circuit. Such tasks are skipped, and the run keeps the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import NamedTuple

from bridges.run_folder import SKIPPED, Run
from sparse.circuits.circuit import Circuit
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.prune import prune
from sparse.storage.atomic import replace_files
from sparse.tasks.nonsense import easier_nonsense
from sparse.tasks.own import SPLITS
from sparse.tasks.suite import get_task, task_names
from sparse.tasks.task import Task


class Found(NamedTuple):
    """The circuits that were found or already there, and why other tasks have none."""

    circuits: dict[str, Circuit]
    """By task name; nonsense twins too."""
    skipped: dict[str, str]
    """{task name: reason}"""


def choose_tasks(names: Iterable[str]) -> list[Task]:
    """Return the tasks of these names (`sparse.get_task`); "all" is every built-in one.

    Raises ValueError for an unknown name, and where two tasks have one name.

    >>> from bridges import choose_tasks
    >>> [task.name for task in choose_tasks(["while_return_true", "for_while:nonsense"])]
    ['while_return_true', 'for_while:nonsense']
    """
    wanted = [one for name in names for one in (task_names() if name == "all" else (name,))]
    tasks = [get_task(name) for name in dict.fromkeys(wanted)]
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ValueError(
                f"two tasks are called {task.name}, and a run keeps one circuit per name; rename "
                "the file"
            )
        seen.add(task.name)
    return tasks


def find_circuits(
    run: Run,
    tasks: Iterable[Task],
    config: PruneConfig = PruneConfig(),
    *,
    force: bool = False,
    say: Callable[[str], object] = print,
) -> Found:
    """Prune a circuit for every task that both models do and for its nonsense twin; save them.

    The nonsense twin is in the direction that the sparse model likes better (`easier_nonsense`).
    Circuits that the run has already, of this twin and with these settings, are kept. Whether a
    model does a task is asked on its validation split (`sparse.tasks.score.DOES`); `force` prunes
    tasks that the models do not do, too. The reasons of skipped tasks are kept in the run.

    >>> import tempfile
    >>> from dataclasses import replace
    >>> from pathlib import Path
    >>> from bridges import find_circuits, load_run
    >>> from sparse import get_task
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = replace(load_run("tiny"), output=Path(folder))
    ...     found = find_circuits(run, [get_task("pronoun")], say=lambda text: None)
    >>> list(found.skipped), found.circuits
    (['pronoun'], {})
    """
    there, mark, settings = run.circuits(), run.sparse.fingerprint(), asdict(config)
    found = Found({}, {})
    for task in tasks:
        if why := _why_not(run, task, force):
            found.skipped[task.name] = why
            reasons = json.dumps(run.skipped() | found.skipped, indent=1)
            replace_files(run.output, {SKIPPED: reasons})
            say(f"skipped {task.name}: {' '.join(why.split())}")
            continue
        for wanted in (task, easier_nonsense(task, run.sparse, run.tokenizer)):
            circuit = there.get(wanted.name)
            if circuit is None or not circuit.made_as(wanted, mark, settings):
                circuit = prune(run.sparse, wanted, config, tokenizer=run.tokenizer, force=True)
                circuit.save(run.circuit_folder(wanted.name))
                say(str(circuit))
            found.circuits[wanted.name] = circuit
    return found


def _why_not(run: Run, task: Task, force: bool) -> str:
    """Return why a task gets no circuit, or ""."""
    if empty := [split for split in SPLITS if not task.pairs(split)]:
        return f"it has no {' and no '.join(empty)} pairs, and a run's report needs all splits"
    for name, model in (("dense model", run.dense), ("twin", run.sparse)):
        try:
            score = task.score(model, run.tokenizer)
            task.nonsense().batch(run.tokenizer, "train")
        except ValueError as error:
            return str(error)
        if not score.does and not force:
            return f"the {name} does not do it; {score}"
    return ""
