import re

import pytest
import torch

from sparse.tasks.suite import get_task, task_names
from sparse.tasks.suite.words import FUNCTIONS, LISTS, NAMES, VARIABLES, WORDS, deal
from sparse.tasks.task import SPLITS

EVERY = [*task_names(), *(f"{name}:nonsense" for name in task_names())]


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


def test_an_unknown_task_lists_the_known_ones():
    for name in ("quotes", "single_double_quote:twin"):
        with pytest.raises(ValueError, match="single_double_quote.*:nonsense"):
            get_task(name)
