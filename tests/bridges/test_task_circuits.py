"""Laws of a run's circuits: pruned where both models do the task, else skipped, and told why."""

import json
from dataclasses import replace

import pytest

from bridges import choose_tasks, find_circuits, load_run
from sparse import PruneConfig, Task, get_task, task_names
from sparse.tasks.own import SPLITS
from sparse.tasks.score import DOES

HASTY = PruneConfig(n_steps=2, clean_up=0.0, window=0)


def few(name: str) -> Task:
    """A built-in task with so many pairs only that it can still be asked."""
    task = get_task(name)
    return replace(task, **{split: task.pairs(split)[:36] for split in SPLITS})


@pytest.fixture
def run(tmp_path):
    return replace(load_run("tiny"), output=tmp_path)


def test_a_task_that_both_models_do_gets_a_circuit_and_one_for_its_twin(run):
    said: list[str] = []
    found = find_circuits(run, [few("var_if")], HASTY, say=said.append)
    assert list(found.circuits) == ["var_if", "var_if:nonsense"] and not found.skipped
    assert len(said) == 2
    pair = found.circuits["var_if:nonsense"].task.train[0]
    assert (pair.target_1, pair.target_2) == (" This", " The")  # what this twin likes better
    again = find_circuits(run, [few("var_if")], HASTY, say=said.append)
    assert len(said) == 2, "circuits made just so are kept"
    assert again.circuits["var_if"].nodes == found.circuits["var_if"].nodes
    other = replace(HASTY, seed=1)
    find_circuits(run, [few("var_if")], other, say=said.append)
    assert len(said) == 4  # control: other settings, other circuits


def test_a_task_that_a_model_does_not_do_is_skipped_with_its_loss_unless_forced(run):
    task = few("with_open")
    found = find_circuits(run, [task, get_task("pronoun")], HASTY, say=lambda text: None)
    assert not found.circuits and list(found.skipped) == ["with_open", "pronoun"]
    assert "the dense model does not do it" in found.skipped["with_open"]
    assert "nats (chance 0.693)" in found.skipped["with_open"]
    assert "target is several tokens" in found.skipped["pronoun"]
    assert found.skipped.items() <= run.skipped().items()
    forced = find_circuits(run, [task], HASTY, force=True, say=lambda text: None)
    assert "with_open" in forced.circuits and "with_open" not in run.skipped()


def test_a_task_without_test_pairs_is_skipped_before_anything_is_pruned(run):
    task = replace(get_task("var_if"), name="mine", test=())
    found = find_circuits(run, [task], HASTY, say=lambda text: None)
    assert "it has no test pairs" in found.skipped["mine"] and not found.circuits


def test_reasons_that_are_broken_are_refused(run, tmp_path):
    for text in ("{", "[]", json.dumps({"a": 3})):
        (tmp_path / "skipped.json").write_text(text)
        with pytest.raises(ValueError, match="skipped.json is broken"):
            run.skipped()


def test_tasks_are_chosen_by_name_and_no_name_twice(tmp_path):
    assert [t.name for t in choose_tasks(["all"])] == list(task_names())
    assert [t.name for t in choose_tasks(["for_while", "for_while"])] == ["for_while"]
    rows = {"context_1": "a", "context_2": "b", "target_1": "x", "target_2": "y"}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.jsonl").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="two tasks are called mine"):
        choose_tasks([str(tmp_path / folder / "mine.jsonl") for folder in ("one", "two")])


def test_no_model_does_a_nonsense_twin():
    """The control of a task is one only where the whole model cannot do it either."""
    run = load_run("tiny")
    for name in task_names():
        for model in (run.dense, run.sparse):
            try:
                score = get_task(f"{name}:nonsense").score(model, run.tokenizer, "test")
            except ValueError:
                continue  # the tokenizer cannot express it
            assert score.nats > 0.45 > DOES, score


def test_a_task_of_ones_own_goes_the_same_way(run):
    words = "red blue big old new hot low far dry wet".split()
    rows = [
        (f'{name}.{at} = "{word}', f"{name}.{at} = '{word}", '"\n', "'\n")
        for name in ("self", "item")
        for at in ("name", "path", "text", "value")
        for word in words
    ]
    task = Task.from_pairs("mine", rows)
    found = find_circuits(run, [task], HASTY, say=lambda text: None)
    assert set(found.circuits) == {"mine", "mine:nonsense"}, found.skipped
