"""A task says what it is in one line, and never lists its pairs."""

from dataclasses import replace

import pytest

from sparse.tasks.suite import get_task, task_names
from sparse.tasks.task import SPLITS, Pair, Task

EVERY = [*task_names(), *(f"{name}:nonsense" for name in task_names())]


@pytest.mark.parametrize("name", EVERY)
def test_a_task_is_one_line_that_names_its_sizes_targets_and_meaning(name):
    task = get_task(name)
    line = repr(task)
    assert len(line) <= 200 and "\n" not in line
    for split in SPLITS:
        assert f"{len(task.pairs(split))} {split}" in line
    first = task.train[0]
    said = (name, first.target_1, first.target_2, task.meaning)
    assert all(repr(text) in line for text in said), line
    assert sum(map(len, (p.context_1 for p in task.train))) > 200  # control: what is left out


@pytest.mark.parametrize("name", EVERY)
def test_printing_a_task_shows_its_first_pair(name):
    task = get_task(name)
    text, first = str(task), task.train[0]
    assert len(text.splitlines()) == 4 and task.name in text and task.meaning in text
    assert repr(first.context_1) in text and repr(first.context_2) in text


def test_a_task_of_ones_own_may_have_many_targets_a_long_meaning_and_one_split():
    pairs = tuple(
        Pair(context_1=f"a{i}", context_2=f"b{i}", target_1=str(i), target_2="z") for i in range(5)
    )
    task = Task(name="mine", train=pairs)
    assert repr(task).startswith("Task('mine', 5 train + 0 validation + 0 test pairs, targets '0'")
    assert "and 4 more" in repr(task) and str(task).startswith("task mine\n")
    assert len(repr(replace(task, meaning="word " * 99))) < 250
