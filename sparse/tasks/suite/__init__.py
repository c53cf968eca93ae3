"""The built-in tasks, by name."""

from __future__ import annotations

from sparse.tasks.task import Pair, Task

from .python import SUITE


def task_names() -> tuple[str, ...]:
    """Return the names of the built-in tasks; each has a twin called `<name>:nonsense`.

    >>> from sparse import task_names
    >>> "single_double_quote" in task_names()
    True
    """
    return tuple(SUITE)


def get_task(name: str) -> Task:
    """Return a built-in task, or with `<name>:nonsense` its nonsense twin (`Task.nonsense`).

    >>> from sparse import get_task
    >>> task = get_task("single_double_quote")
    >>> task.test[0].context_1, task.test[0].context_2
    ('    self.label = "large', "    self.label = 'large")
    """
    plain, colon, twin = name.partition(":")
    if plain not in SUITE or (colon and twin != "nonsense"):
        raise ValueError(
            f"no task is called {name!r}; there are {list(SUITE)}, each also as <name>:nonsense; "
            "read your own with Task.from_jsonl(path)"
        )
    recipe = SUITE[plain]
    (target_1, target_2), *rest = recipe.targets

    def pairs(split: int) -> tuple[Pair, ...]:
        targets = {"target_1": target_1, "target_2": target_2}
        return tuple(Pair(context_1=a, context_2=b, **targets) for a, b in recipe.contexts(split))

    task = Task(
        name=plain,
        train=pairs(0),
        validation=pairs(1),
        test=pairs(2),
        meaning=recipe.meaning,
        alternatives=tuple(rest),
    )
    return task.nonsense() if twin else task
