import json
import math
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparse.tasks.batch import TaskBatch, check_vocabulary, task_nats
from sparse.tasks.suite import get_task, task_names
from sparse.tasks.suite.words import FUNCTIONS, LISTS, NAMES, VARIABLES, WORDS, deal
from sparse.tasks.task import SPLITS, Pair, Task

EVERY = [*task_names(), *(f"{name}:nonsense" for name in task_names())]


def pair(a: str, b: str, x: str = "x", y: str = "y") -> Pair:
    return Pair(context_1=a, context_2=b, target_1=x, target_2=y)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Single characters, with `ab` and `xy` merged."""
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"ab": 26, "xy": 27}
    bpe = models.BPE(vocab, [("a", "b"), ("x", "y")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("split", SPLITS)
def test_every_built_in_task_is_what_the_tokenizer_would_write(name, split, bpe):
    task = get_task(name)
    batch = task.batch(bpe, split)
    n = batch.n_pairs
    assert n >= 16 and n + sum(batch.dropped.values()) == len(task.pairs(split))
    assert torch.equal(batch.last[:n], batch.last[n:])
    assert torch.equal(batch.target[:n], batch.foil[n:])
    assert torch.equal(batch.foil[:n], batch.target[n:])
    for row in range(0, 2 * n, 7):
        prompt = batch.ids[row, : batch.last[row] + 1].tolist()
        text = bpe.decode([*prompt, int(batch.target[row])])
        assert bpe(text)["input_ids"] == [*prompt, int(batch.target[row])]
        assert batch.real[row].sum() == len(prompt)
    assert (batch.ids[:n] != batch.ids[n:]).any(1).all()


def test_no_name_word_or_number_is_in_two_splits():
    lists = (NAMES, WORDS, FUNCTIONS, VARIABLES, LISTS)
    assert len(set().union(*lists)) == sum(map(len, lists))
    for entries in lists:
        dealt = [deal(entries, split) for split in range(3)]
        assert sorted(sum(dealt, [])) == sorted(entries) and min(map(len, dealt)) >= 5
    framing = {"self", "def", "if", "not", "return", "None", "while", "True", "1"}
    for name in task_names():
        task = get_task(name)
        seen = [
            set(
                re.findall(r"\w+", " ".join(p.context_1 + " " + p.context_2 for p in task.pairs(s)))
            )
            - framing
            for s in SPLITS
        ]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2]), name


def test_the_nonsense_twin_shares_contexts_and_splits_and_no_target(bpe):
    for name in task_names():
        task, twin = get_task(name), get_task(f"{name}:nonsense")
        assert twin == task.nonsense() and twin.name == f"{name}:nonsense"
        for split in SPLITS:
            same = [(p.context_1, p.context_2) for p in task.pairs(split)]
            assert same == [(p.context_1, p.context_2) for p in twin.pairs(split)]
            one, two = task.batch(bpe, split), twin.batch(bpe, split)
            assert not set(one.target.tolist()) & set(two.target.tolist())


def test_the_loss_is_cross_entropy_between_the_two_tokens_and_ln_2_by_chance(bpe):
    batch = get_task("single_double_quote").batch(bpe, "test")
    logits = torch.randn(2 * batch.n_pairs, len(bpe))
    both = torch.stack([batch.target, batch.foil], dim=1)
    oracle = -logits.gather(1, both).log_softmax(-1)[:, 0]
    torch.testing.assert_close(task_nats(logits, batch), oracle)
    chance = task_nats(torch.zeros_like(logits), batch)
    torch.testing.assert_close(chance, torch.full_like(chance, math.log(2)))
    swapped = replace(batch, target=batch.foil, foil=batch.target)
    assert not torch.allclose(task_nats(logits, swapped), oracle)


def test_scored_counterfactual_and_take_pick_the_right_rows(bpe):
    batch = get_task("while_return_true").batch(bpe, "test")
    n = batch.n_pairs
    logits = torch.randn(*batch.ids.shape, 3)
    rows = [logits[i, batch.last[i]] for i in range(2 * n)]
    assert torch.equal(batch.scored(logits), torch.stack(rows))
    other = batch.counterfactual()
    assert torch.equal(other[:n], batch.ids[n:]) and torch.equal(other[n:], batch.ids[:n])
    part = batch.take(torch.tensor([5, 2]))
    assert part.n_pairs == 2 and part.ids.shape[1] == part.last.max() + 1
    width = part.ids.shape[1]
    assert torch.equal(part.ids, batch.ids[[5, 2, 5 + n, 2 + n], :width])
    assert torch.equal(part.foil, batch.foil[[5, 2, 5 + n, 2 + n]])


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


def test_an_unknown_task_lists_the_known_ones():
    for name in ("quotes", "single_double_quote:twin"):
        with pytest.raises(ValueError, match="single_double_quote.*:nonsense"):
            get_task(name)


def test_a_tokenizer_must_match_the_models_vocabulary(letters):
    check_vocabulary(letters, 28)
    for size in (27, 31):
        with pytest.raises(ValueError, match=f"28 entries but the model has {size}"):
            check_vocabulary(letters, size)


def test_a_batch_is_not_compared_by_value_and_moves_whole(bpe):
    batch = get_task("single_double_quote").batch(bpe, "test")
    assert isinstance(batch, TaskBatch) and batch.to("meta").ids.device.type == "meta"
