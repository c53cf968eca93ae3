import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparse.tasks.own import SPLITS
from sparse.tasks.pair import Pair
from sparse.tasks.suite import get_task, task_names
from sparse.tasks.task import UNRELATED, Task, check_name


def pair(a: str, b: str, x: str = "x", y: str = "y") -> Pair:
    return Pair(context_1=a, context_2=b, target_1=x, target_2=y)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Single characters, with `ab` and `xy` merged."""
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"ab": 26, "xy": 27}
    bpe = models.BPE(vocab, [("a", "b"), ("x", "y")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))


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


def test_where_nothing_fits_every_choice_is_listed_with_its_reason(letters):
    task = Task(
        name="t",
        train=tuple(pair("c" * i, "d" * i, "xz") for i in range(1, 30)),
        alternatives=(("zz", "q"),),
    )
    with pytest.raises(ValueError) as refused:
        task.batch(letters, "train")
    text = str(refused.value)
    assert text.startswith("task t has too few pairs that this tokenizer (28 entries) can express:")
    assert "'xz' is 2 tokens" in text and "'zz' is 2 tokens" in text
    with pytest.raises(ValueError, match="test split is empty"):
        Task(name="t", train=tuple(pair("c" * i, "d" * i) for i in range(1, 30))).batch(
            letters, "test"
        )


def test_a_context_in_two_splits_is_a_leak():
    with pytest.raises(ValueError, match="'a' is in train and in test"):
        Task(name="t", train=(pair("a", "b"),), test=(pair("c", "a"),))
    with pytest.raises(ValueError, match="train split is empty"):
        Task(name="t", train=())


@pytest.mark.parametrize("name", ["bracket_counting", "else_elif", "pronoun:distractors"])
def test_a_task_survives_plain_values_and_unknown_keys_do_not(name):
    task = get_task(name)
    values = task.to_dict()
    assert Task.from_dict(json.loads(json.dumps(values))) == task
    with pytest.raises(ValueError, match="unknown keys .'goal'"):
        Task.from_dict(values | {"goal": 1})


def test_a_task_written_before_there_were_groups_still_opens():
    values = {
        "name": "old",
        "train": [{"context_1": "a", "context_2": "b", "target_1": "x", "target_2": "y"}],
        "validation": [],
        "test": [],
        "meaning": "m",
        "alternatives": [["p", "q"]],
    }
    task = Task.from_dict(values)
    assert task.family == "old" and task.train[0].groups == {} and task.levels("train") == {}


EVERY = [*task_names(), *(f"{name}:nonsense" for name in task_names())]


@pytest.mark.parametrize("name", EVERY)
def test_a_task_is_one_line_that_names_its_sizes_targets_and_meaning(name):
    task = get_task(name)
    line = repr(task)
    assert len(line) <= 220 and "\n" not in line
    for split in SPLITS:
        assert f"{len(task.pairs(split))} {split}" in line
    first = task.train[0]
    assert repr(name) in line and repr(first.target_1) in line
    assert (repr(first.target_2) if first.target_2 else "anything else") in line
    assert task.meaning[:60] in line
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


@pytest.mark.parametrize("kind", ["longer", "distractors"])
@pytest.mark.parametrize("name", ["single_double_quote", "else_elif", "pronoun"])
def test_a_variant_puts_one_text_before_both_contexts_of_a_pair(name, kind, bpe):
    task = get_task(name)
    other = task.variant(kind)
    assert other.name == f"{name}:{kind}" and other.family == task.family
    for split in SPLITS:
        texts = set()
        for old, new in zip(task.pairs(split), other.pairs(split), strict=True):
            before = new.context_1.removesuffix(old.context_1)
            assert before and new.context_2 == before + old.context_2
            assert (new.target_1, new.target_2, new.groups) == (
                old.target_1,
                old.target_2,
                old.groups,
            )
            texts.add(before)
        assert len(texts) > 1
    plain, long = task.batch(bpe, "test"), other.batch(bpe, "test")
    assert long.last.float().mean() > plain.last.float().mean() + 3
    assert torch.equal(plain.target[0], long.target[0])


def befores(name: str, split: str = "test") -> list[str]:
    task = get_task(name)
    changed = task.variant("distractors").pairs(split)
    return [
        new.context_1.removesuffix(old.context_1)
        for old, new in zip(task.pairs(split), changed, strict=True)
    ]


def test_distractors_are_solved_prompts_of_other_pairs_and_of_either_kind():
    task = get_task("while_return_true")
    first = {p.context_1 + p.target_1 for p in task.test}
    second = {p.context_2 + str(p.target_2) for p in task.test}
    texts = befores(task.name)
    kinds = [text in first for text in texts]
    assert all(text in first | second for text in texts)
    assert 0.35 < sum(kinds) / len(kinds) < 0.65
    own = [{p.context_1 + p.target_1, p.context_2 + str(p.target_2)} for p in task.test]
    assert not any(text in mine for text, mine in zip(texts, own, strict=True))
    forms = {p.groups["form"] for p in task.test}
    for form in forms:  # the kind does not follow the form
        of_form = [k for k, p in zip(kinds, task.test, strict=True) if p.groups["form"] == form]
        assert 0.2 < sum(of_form) / len(of_form) < 0.8


@pytest.mark.parametrize("name", ["capital", "var_swap", "class_init", "a_an", "ioi_simple"])
def test_a_distractor_does_not_state_the_answer(name):
    task = get_task(name)
    for split in SPLITS:
        for text, pair in zip(befores(name, split), task.pairs(split), strict=True):
            own = (pair.target_1, str(pair.target_2))
            assert not text.removesuffix(task.ending).endswith(own), (text, own)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/b", "", ".hidden", "x" * 200, "a\0b", "x-nonsense", "x-longer", 3, "a:b:"],
)
def test_a_name_that_cannot_be_a_folder_or_would_share_one_is_refused(name):
    with pytest.raises(ValueError, match="is no name of a task"):
        check_name(name)
    check_name("my task-2.1:distractors:nonsense")


def test_alternatives_must_be_texts():
    with pytest.raises(ValueError, match="are no alternatives; give two texts"):
        Task(name="t", train=(pair("a", "b"),), alternatives=(("x", ""),))


def test_a_nonsense_twin_has_none_itself():
    with pytest.raises(ValueError, match="has no nonsense twin: it is one itself"):
        get_task("for_while:nonsense").nonsense()
    every = tuple((a, b) for a, b in UNRELATED)
    with pytest.raises(ValueError, match="its targets hold words of each of"):
        Task(name="t", train=(pair("a", "b"),), alternatives=every).nonsense()


def test_a_variant_that_cannot_be_made_says_why():
    task = Task(name="t", train=(pair("a", "b"),))
    with pytest.raises(ValueError, match="no variant 'shorter'; there are"):
        task.variant("shorter")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"has 0 texts of filler.*needs 9; give .*filler=..."):
        task.variant("longer")
