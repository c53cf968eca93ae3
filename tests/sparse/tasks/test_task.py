import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparse.tasks.batch import check_vocabulary
from sparse.tasks.suite import get_task, task_names
from sparse.tasks.task import SPLITS, Pair, Task


def pair(a: str, b: str, x: str = "x", y: str = "y") -> Pair:
    return Pair(context_1=a, context_2=b, target_1=x, target_2=y)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Single characters, with `ab` and `xy` merged."""
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"ab": 26, "xy": 27}
    bpe = models.BPE(vocab, [("a", "b"), ("x", "y")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))


def test_a_target_of_two_tokens_is_refused_with_its_pieces_and_a_way_out(letters):
    task = Task(name="t", train=tuple(pair("c" * i, "d" * i, "xz") for i in range(1, 30)))
    with pytest.raises(ValueError) as refused:
        task.batch(letters, "train")
    message = str(refused.value)
    assert "'xz' is 2 tokens" in message and "['x', 'z']" in message
    assert "[23, 25]" in message and "begins with: ['x']" in message


def test_the_first_alternative_that_fits_every_split_is_taken_and_recorded(letters):
    task = Task(
        name="t",
        train=tuple(pair("c" * i, "d" * i, "xz") for i in range(1, 30)),
        test=tuple(pair("c" * i + "x", "d" * i + "x", "xz") for i in range(1, 30)),
        alternatives=(("y", "z"), ("p", "q"), ("r", "s")),  # y merges with the x of test
    )
    assert task.batch(letters, "train").targets == (("p", "q"),)
    assert task.batch(letters, "test").targets == (("p", "q"),)
    alone = replace(task, test=())
    assert alone.batch(letters, "train").targets == (("y", "z"),)


def test_pairs_that_do_not_fit_are_dropped_and_counted_by_reason(letters):
    good = tuple(pair("c" * i, "d" * i) for i in range(1, 21))
    bad = (pair("cc", "ddd"), pair("hab", "hcd"), pair("hc", "hx"))
    same = (pair("dc", "dc"),)  # one context cannot be followed by two targets
    batch = Task(name="t", train=good + bad + same).batch(letters, "train")
    assert batch.n_pairs == 20
    assert batch.dropped == {
        "contexts of unequal length": 2,
        "target merges with its context": 1,
        "equal targets or contexts": 1,
    }
    with pytest.raises(ValueError, match=r"18 pairs remain|15 of 18 train pairs remain"):
        Task(name="t", train=good[:15] + bad).batch(letters, "train")
    with pytest.raises(ValueError, match="test split is empty"):
        Task(name="t", train=good).batch(letters, "test")


def test_a_context_in_two_splits_is_a_leak():
    with pytest.raises(ValueError, match="'a' is in train and in test"):
        Task(name="t", train=(pair("a", "b"),), test=(pair("c", "a"),))
    with pytest.raises(ValueError, match="train split is empty"):
        Task(name="t", train=())


def test_a_task_survives_plain_values_and_unknown_keys_do_not():
    task = get_task("bracket_counting")
    values = task.to_dict()
    assert Task.from_dict(json.loads(json.dumps(values))) == task
    with pytest.raises(ValueError, match="unknown keys .'goal'"):
        Task.from_dict(values | {"goal": 1})


def test_a_file_of_pairs_is_read_and_split_by_its_own_word_or_in_turn(tmp_path):
    rows = [
        {"context_1": f"a{i}", "context_2": f"b{i}", "target_1": "x", "target_2": "y"}
        for i in range(10)
    ]
    rows += [rows[0] | {"context_1": "p", "context_2": "q", "split": "test"}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    task = Task.from_jsonl(path)
    assert task.name == "mine"
    assert [len(task.pairs(s)) for s in SPLITS] == [6, 2, 3]
    assert [p.context_1 for p in task.validation] == ["a3", "a8"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ('{"context_1": "a"}', "line 2: context_2 is None"),
        ('{"context_1": "a", "context_2": "b", "target_1": 3, "target_2": "y"}', "target_1 is 3"),
        ('{"context": "a"}', "line 2: unknown keys .'context'"),
        ('{"split": "dev"}', "line 2: split 'dev' must be one of"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    good = {"context_1": "a", "context_2": "b", "target_1": "x", "target_2": "y"}
    path.write_text(json.dumps(good) + "\n" + line)
    with pytest.raises(ValueError, match=says):
        Task.from_jsonl(path)


def test_a_tokenizer_must_match_the_models_vocabulary(letters):
    check_vocabulary(letters, 28)
    for size in (27, 31):
        with pytest.raises(ValueError, match=f"28 entries but the model has {size}"):
            check_vocabulary(letters, size)


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
