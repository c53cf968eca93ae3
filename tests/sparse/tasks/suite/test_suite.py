import re

import pytest
import torch

from sparse.tasks.fit import fit
from sparse.tasks.own import SPLITS
from sparse.tasks.suite import ENGLISH, PYTHON, SUITE, get_task, task_names
from tests.helpers.tokenizers import KINDS

EVERY = [*task_names(), *(f"{name}:nonsense" for name in task_names())]
REFUSED = {("Llama", "indent_for"): "target is several tokens"}
"""What a kind of tokenizer cannot express, and why."""


def test_the_suites_are_the_20_tasks_of_the_paper_and_10_of_english():
    assert (len(PYTHON), len(ENGLISH), len(SUITE)) == (20, 10, 30)


@pytest.mark.parametrize("name", task_names())
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_what_a_kind_of_tokenizer_would_write_or_is_refused_with_a_reason(kind, name):
    tokenizer, task = KINDS[kind](), get_task(name)
    if why := REFUSED.get((kind, name)):
        with pytest.raises(ValueError, match=why):
            task.batch(tokenizer, "test")
        return
    for split in SPLITS:
        batch = task.batch(tokenizer, split)
        n = batch.n_pairs
        assert n + sum(batch.dropped.values()) == len(task.pairs(split))
        assert torch.equal(batch.last[:n], batch.last[n:])
        assert torch.equal(batch.target[:n], batch.foil[n:])
        assert torch.equal(batch.foil[:n], batch.target[n:])
        assert (batch.ids[:n] != batch.ids[n:]).any(1).all()
        if split == "test":
            assert batch.levels()["frame"] >= 8, "independent units of the test split"
        written = {
            tuple(tokenizer(context + (target or ""))["input_ids"])
            for p in task.pairs(split)
            for context, target in ((p.context_1, p.target_1), (p.context_2, p.target_2))
        }
        if batch.targets[0] == (task.train[0].target_1, task.train[0].target_2):
            for row in range(0, 2 * n, 17):
                prompt = batch.ids[row, : batch.last[row] + 1].tolist()
                answer = [int(batch.target[row])] if batch.target[row] >= 0 else []
                assert (*prompt, *answer) in written and batch.real[row].sum() == len(prompt)


@pytest.mark.parametrize("name", EVERY)
def test_no_frame_form_or_word_is_in_two_splits(name):
    task = get_task(name)
    for factor in task.levels("train"):
        seen = [{p.groups[factor] for p in task.pairs(s) if factor in p.groups} for s in SPLITS]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2]), factor
    assert {"frame"} <= set(task.levels("test"))


@pytest.mark.parametrize("name", SUITE)
def test_a_frame_with_words_in_its_slots_is_the_context(name):
    """Groups tell the truth: outside the slots of its frame a context is the frame's text."""
    for pair in get_task(name).test[:40]:
        frames = pair.groups["frame"].split(" | ")
        for context, frame in zip((pair.context_1, pair.context_2), frames * 2, strict=False):
            slots = re.sub(r"\\\$(\\\{)?[a-z]+\d*(\\\})?", "(.*)", re.escape(frame))
            assert re.fullmatch(slots.replace(r"\$\$", r"\$"), context, re.DOTALL), (frame, context)
        words = {f: w for f, w in pair.groups.items() if f not in ("frame", "form")}
        both = pair.context_1 + pair.context_2
        assert all(word in both for word in words.values())


def test_the_nonsense_twin_shares_contexts_and_splits_and_no_target(bpe):
    for name in task_names():
        task, twin = get_task(name), get_task(f"{name}:nonsense")
        assert twin == task.nonsense() and twin.name == f"{name}:nonsense"
        assert twin.family == task.family
        for split in SPLITS:
            same = [(p.context_1, p.context_2) for p in task.pairs(split)]
            assert same == [(p.context_1, p.context_2) for p in twin.pairs(split)]
        one, two = task.batch(bpe, "test"), twin.batch(bpe, "test")
        assert not set(one.target.tolist()) & set(two.target.tolist()) and not two.one_sided


def test_siblings_share_a_family():
    assert get_task("set_or_string_fixedvarname").family == get_task("set_or_string").family
    assert get_task("ioi_simple").family == get_task("ioi_relaxed").family == "ioi"
    assert get_task("set_or_string_fixedvarname:longer").family == "set_or_string"
    assert get_task("for_while").family == "for_while"


@pytest.mark.parametrize("change", ["longer", "distractors"])
def test_every_variant_of_every_task_is_expressed_where_the_task_is(change, bpe):
    for name in task_names():
        task, other = get_task(name), get_task(f"{name}:{change}")
        targets = task.batch(bpe, "test").targets[0]
        plain, changed = (
            fit(name, t.with_targets(targets).test if t.alternatives else t.test, bpe, "test", 16)
            for t in (task, other)
        )
        assert changed.n_pairs >= 0.8 * plain.n_pairs and changed.last.max() > plain.last.max()


def test_an_unknown_task_or_change_lists_the_known_ones():
    with pytest.raises(ValueError, match="single_double_quote.*:nonsense"):
        get_task("quotes")
    with pytest.raises(ValueError, match="no variant is called 'twin'.*:longer, :distractors"):
        get_task("single_double_quote:twin")
    assert get_task("for_while", variant="longer") == get_task("for_while:longer")
