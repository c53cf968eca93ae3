"""The prompts on which claims are judged: a fixed choice of pairs, and their sources.

Site and factor of every arm are chosen on validation, everything is judged on test. Where a split
has more pairs than wanted, a seeded choice is taken; sources are still looked for among all.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparse.tasks.batch import TaskBatch
from sparse.tasks.score import positions_of
from sparse.tasks.task import Task

from .arms import Splits
from .dense_trial import Trial
from .unrelated import unrelated


def picked(batch: TaskBatch, most: int, seed: int = 0) -> Int[Tensor, " pair"]:
    """Return the indices of at most `most` pairs, drawn by a seed, in ascending order.

    Of pairs with the same tokens only the first can be drawn: they are one pair.
    """
    order = torch.randperm(batch.n_pairs, generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([batch.ids[: batch.n_pairs], batch.ids[batch.n_pairs :]], dim=1).tolist()
    first: dict[tuple[int, ...], int] = {}
    for pair, row in enumerate(tokens):
        first.setdefault(tuple(row), pair)
    distinct = set(first.values())
    chosen = [pair for pair in order.tolist() if pair in distinct]
    return torch.tensor(chosen[:most], dtype=torch.long).sort().values


def check_numbers(who: str, draws: Any, max_pairs: Any) -> None:
    """Raise ValueError unless there is at least one draw, and a pair to judge by."""
    for name, value, usual in (("draws", draws, 39), ("max_pairs", max_pairs, 64)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{who}: {name}={value!r} must be a whole number from 1 on; {usual} is the default"
            )


def paired_trial(
    mapped: Any, task: Task, tokenizer: Any, split: str, most: int, seed: int = 0
) -> Trial:
    """Return the trial of a split in which every prompt's source is its own counterfactual."""
    batch = task.batch(tokenizer, split, positions_of(mapped.dense, mapped.sparse))
    return Trial(mapped, batch.take(picked(batch, most, seed)))


def unrelated_trial(
    mapped: Any, task: Task, tokenizer: Any, split: str, most: int, seed: int = 0
) -> tuple[Trial | None, int]:
    """Return the trial of a split with unrelated sources, and how many pairs have none.

    Those are left out. The trial is None where no pair has one.
    """
    batch = task.batch(tokenizer, split, positions_of(mapped.dense, mapped.sparse))
    wanted = picked(batch, most, seed)
    kept, sources = unrelated(batch, wanted, seed)
    if not len(kept):
        return None, len(wanted)
    return Trial(mapped, batch.take(kept), sources), len(wanted) - len(kept)


def splits(mapped: Any, task: Task, tokenizer: Any, most: int, seed: int = 0) -> Splits:
    """Return both splits with the counterfactuals as sources."""
    return Splits(
        validation=paired_trial(mapped, task, tokenizer, "validation", most, seed),
        test=paired_trial(mapped, task, tokenizer, "test", most, seed),
    )


def unrelated_splits(
    mapped: Any, task: Task, tokenizer: Any, most: int, seed: int = 0
) -> tuple[Splits | None, int]:
    """Return both splits with unrelated sources, and the test pairs without one.

    None where a split has no pair with sources.
    """
    validation, _ = unrelated_trial(mapped, task, tokenizer, "validation", most, seed)
    test, missing = unrelated_trial(mapped, task, tokenizer, "test", most, seed)
    if validation is None or test is None:
        return None, missing
    return Splits(validation=validation, test=test), missing
