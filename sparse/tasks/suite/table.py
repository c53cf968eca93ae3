"""Can my model do it? One row per task: its loss beside chance, or why it cannot be asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sparse.tasks.batch import CHANCE, check_vocabulary
from sparse.tasks.score import (
    DOES,
    TaskScore,
    positions_of,
    score_batch,
    tokenizer_of,
    vocabulary_of,
)
from sparse.tasks.task import Task

from . import get_task, task_names

COLUMNS = ("task", "nats", "s.e.", "accuracy", "paired", "pairs", "frames", "worst frame")
COLUMNS += ("last token", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A task that a tokenizer cannot express, and why."""

    task: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTable:
    """What one model does of several tasks, on one split."""

    split: str
    scores: tuple[TaskScore, ...]
    """The tasks that its tokenizer can express."""
    refused: tuple[Refused, ...]
    """The others."""

    def does(self) -> tuple[str, ...]:
        """Return the names of the tasks that the model does: at most DOES nats."""
        return tuple(score.task for score in self.scores if score.does)

    def brief(self) -> str:
        """Return one line per task, and one for every task that cannot be asked."""
        lines = [f"  {score}" for score in self.scores]
        lines += [f"  {r.task} cannot be asked: {' '.join(r.why.split())}" for r in self.refused]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([self.rows(), *self.reasons()])

    def rows(self) -> str:
        """Return the table of the tasks that were scored, best first, above the row of chance."""
        width = max([len("task"), *(len(s.task) for s in self.scores)])
        rows: list[tuple[str, ...]] = [COLUMNS]
        for s in sorted(self.scores, key=lambda s: s.nats):
            numbers = (f"{s.nats:.3f}", f"{s.stderr:.3f}", f"{s.accuracy:.2f}", f"{s.paired:.2f}")
            frames = str(s.levels.get("frame", "-"))
            word = "does it" if s.does else ""
            last = f"{s.told_by_last_token:.2f}"
            pairs = f"{s.n_pairs}/{s.n_pairs + sum(s.dropped.values())}"
            rows.append((s.task, *numbers, pairs, frames, f"{s.worst[1]:.3f}", last, word))
        rows.append(("chance", f"{CHANCE:.3f}", "", "0.50", "0.50", "", "", "", "", ""))
        lines = [
            f"{name:{width}}{''.join(f'{cell:>12}' for cell in cells)}" for name, *cells in rows
        ]
        lines += [
            f"{self.split} split; to do a task is at most {DOES} nats per prompt",
            "paired: pairs in which the right answer gains from one context to the other",
            "pairs: scored/given; worst frame: the largest mean loss of a frame",
            "last token: share of pairs that the last token alone tells apart",
        ]
        return "\n".join(lines)

    def reasons(self) -> list[str]:
        """Return why tasks cannot be asked, one text for each."""
        return [f"cannot be asked: {refused.why}" for refused in self.refused]


def task_table(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: Iterable[Task | str] | Task | str | None = None,
    *,
    split: str = "validation",
    progress: bool = False,
) -> TaskTable:
    """Return what a model does of some tasks, by default of all built-in ones.

    `model` and `tokenizer` are as in `Task.score`. A task that the tokenizer cannot express is
    listed with the reason, beside those that were scored.

    >>> from dense import tiny
    >>> from sparse import task_table
    >>> table = task_table(tiny(), tasks=["while_return_true", "pronoun"])
    >>> table.does(), [refused.task for refused in table.refused]
    (('while_return_true',), ['pronoun'])
    """
    tokenizer = tokenizer or tokenizer_of(model, "task_table")
    check_vocabulary(tokenizer, vocabulary_of(model))
    wanted = task_names() if tasks is None else tasks
    wanted = [wanted] if isinstance(wanted, str | Task) else wanted
    asked = [get_task(t) if isinstance(t, str) else t for t in wanted]
    scores, refused = [], []
    for task in tqdm(asked, desc="tasks", disable=not progress, leave=False):
        try:
            batch = task.batch(tokenizer, split, positions_of(model))
        except ValueError as error:
            refused.append(Refused(task=task.name, why=str(error)))
        else:
            scores.append(score_batch(model, batch))
    return TaskTable(split=split, scores=tuple(scores), refused=tuple(refused))
