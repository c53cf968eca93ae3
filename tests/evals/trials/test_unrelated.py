"""Laws of unrelated sources: another pair, the other kind, its length and targets, other words."""

from collections import defaultdict

import pytest
import torch

from evals.trials.prompts import paired_trial, picked, unrelated_splits, unrelated_trial
from evals.trials.unrelated import FRAMES, unrelated
from sparse import get_task, task_names
from sparse.tasks.batch import TaskBatch


def planted(lasts, frames=None, words=None):
    """Pairs of given lengths: row i of kind c is (10 c + 1, 100 + i, ..., 10 c + 1)."""
    n = len(lasts)
    ids = torch.zeros(2 * n, max(lasts) + 1, dtype=torch.long)
    for kind in (0, 1):
        for i, last in enumerate(lasts):
            ids[i + kind * n, : last + 1] = 100 + i
            ids[i + kind * n, 0] = ids[i + kind * n, last] = 10 * kind + 1
    both = torch.tensor(lasts).repeat(2)
    kinds = torch.arange(2 * n) // n
    groups = {
        "frame": tuple(frames or map(str, range(n))),
        "word": tuple(words or map(str, range(n))),
    }
    return TaskBatch(
        task="planted", split="test", ids=ids, real=torch.arange(ids.shape[1]) <= both[:, None],
        last=both, target=5 + kinds, foil=6 - kinds, targets=(("a", "b"),), dropped={},
        groups=groups,
    )  # fmt: skip


def of_rows(batch):
    rows = defaultdict(list)
    for row, (ids, last) in enumerate(zip(batch.ids.tolist(), batch.last.tolist(), strict=True)):
        rows[tuple(ids[: last + 1])].append(row)
    return rows


def fits(batch, row, other):
    """Whether a row is a source of another, by the definition in the words of the issue."""
    n = batch.n_pairs
    a, b = row % n, other % n
    if a == b or row // n == other // n:
        return False
    same_length = bool(batch.last[row] == batch.last[other])
    swapped = batch.target[row] == batch.foil[other] and batch.foil[row] == batch.target[other]
    words = [of for f, of in batch.groups.items() if f not in ("frame", "form")]
    same_words = any(of[a] and of[a] == of[b] for of in words)
    return same_length and bool(swapped) and not same_words


def frames_shared(batch, row, other):
    n = batch.n_pairs
    return sum(
        bool(batch.groups[f][row % n]) and batch.groups[f][row % n] == batch.groups[f][other % n]
        for f in FRAMES
        if f in batch.groups
    )


def expressible(tokenizer):
    for name in task_names():
        try:
            yield get_task(name).batch(tokenizer, "test", 128)
        except ValueError:  # this tokenizer has too few of its words
            continue


def test_every_source_of_every_built_in_task_fits_its_prompt_and_no_frame_is_kept_in_vain(tiny):
    n_tasks = n_sources = same_frame = 0
    for batch in expressible(tiny.tokenizer):
        n, rows = batch.n_pairs, of_rows(batch)
        wanted = picked(batch, 8)
        kept, sources = unrelated(batch, wanted)
        here = batch.take(kept) if len(kept) else batch
        n_tasks += 1
        for r, ids in enumerate(sources):
            row = int(kept[r % len(kept)]) + n * (r // len(kept))
            assert torch.equal(here.ids[r], batch.ids[row, : here.ids.shape[1]])
            last = int(here.last[r])
            where = [o for o in rows[tuple(ids[: last + 1].tolist())] if fits(batch, row, o)]
            assert where, (batch.task, row)
            candidates = [o for o in range(2 * n) if o // n != row // n and fits(batch, row, o)]
            fewest = min(frames_shared(batch, row, o) for o in candidates)
            assert min(frames_shared(batch, row, o) for o in where) == fewest
            same_frame += fewest > 0
            n_sources += 1
        for pair in set(wanted.tolist()) - set(kept.tolist()):
            none = [not any(fits(batch, row, o) for o in range(2 * n)) for row in (pair, pair + n)]
            assert any(none), (batch.task, pair)  # it is left out only where a prompt has none
        if len(kept):
            assert sources.shape == here.ids.shape
    assert n_tasks >= 20 and n_sources > 250 and same_frame < 0.25 * n_sources


def test_the_counterfactual_of_a_pair_is_no_source_of_it(tiny):
    batch = get_task("single_double_quote").batch(tiny.tokenizer, "test")
    kept, sources = unrelated(batch)
    here = batch.take(kept)
    assert not (sources == here.counterfactual()).all(1).any()
    assert (fits(batch, 0, batch.n_pairs), fits(batch, 0, 0)) == (False, False)


def test_a_pair_alone_of_its_length_is_left_out_and_counted(tiny, mapped, quotes):
    kept, sources = unrelated(planted([3, 3, 5, 3]))
    assert kept.tolist() == [0, 1, 3] and sources.shape == (6, 4)
    circuit, wanted = mapped(quotes), 12
    trial, missing = unrelated_trial(circuit, quotes.task, tiny.tokenizer, "test", wanted)
    assert trial.batch.n_pairs + missing == wanted
    everything = quotes.task.batch(tiny.tokenizer, "test")
    assert len(unrelated(everything)[0]) == everything.n_pairs - 1  # quotes: one has none


def test_pairs_that_share_a_word_are_no_sources_of_each_other():
    kept, _ = unrelated(planted([3, 3], words=("red", "red")))
    assert not len(kept)
    kept, sources = unrelated(planted([3, 3], words=("red", "blue")))  # control
    assert kept.tolist() == [0, 1]
    assert sources[:, 1].tolist() == [101, 100, 101, 100]  # of the other pair
    assert sources[:, 0].tolist() == [11, 11, 1, 1]  # of the other kind


def test_a_shared_frame_is_taken_only_where_there_is_no_other():
    kept, sources = unrelated(planted([3, 3, 3], frames=("a", "a", "b")))
    assert sources[:2, 1].tolist() == [102, 102]  # not each other
    kept, sources = unrelated(planted([3, 3], frames=("a", "a")))
    assert kept.tolist() == [0, 1]
    for seed in range(4):  # a pair that names nothing shares nothing, and is not its own source
        _, sources = unrelated(planted([3, 3, 3], ("", "", ""), ("", "", "")), seed=seed)
        assert (sources[:3, 1] != torch.tensor([100, 101, 102])).all()


def test_where_no_pair_has_a_source_there_are_no_rows():
    kept, sources = unrelated(planted([3, 4, 5]))
    assert kept.shape == (0,) and len(sources) == 0


def test_pairs_that_are_wanted_have_the_sources_they_have_among_all():
    batch = planted([3, 3, 3, 4, 4, 4])
    kept, sources = unrelated(batch, torch.tensor([4, 1]))
    every, all_sources = unrelated(batch)
    assert kept.tolist() == [4, 1] and every.tolist() == list(range(6))
    want = torch.cat([all_sources[[4, 1]], all_sources[[10, 7]]])
    assert torch.equal(sources, want)
    drawn = {tuple(unrelated(batch, seed=seed)[1][:, 1].tolist()) for seed in range(8)}
    assert len(drawn) > 1  # another seed draws others
    assert torch.equal(unrelated(batch, seed=3)[1], unrelated(batch, seed=3)[1])


def test_a_choice_of_pairs_is_seeded_ascending_and_without_repeats():
    batch = planted([3] * 9)
    chosen = picked(batch, 5)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 5
    assert torch.equal(chosen, picked(batch, 5)) and picked(batch, 50).tolist() == list(range(9))
    assert len({tuple(picked(batch, 5, seed).tolist()) for seed in range(6)}) > 1


@pytest.mark.parametrize("name, ok", [("single_double_quote", True), ("var_swap", False)])
def test_splits_are_none_where_no_pair_has_a_source(tiny, mapped, quotes, name, ok):
    made, missing = unrelated_splits(mapped(quotes), get_task(name), tiny.tokenizer, 5)
    assert (made is not None) == ok and (missing == 5) != ok
    if made is not None:
        assert made.validation.batch.split == "validation" and made.test.batch.split == "test"


def test_without_sources_every_prompt_s_source_is_its_own_counterfactual(tiny, mapped, quotes):
    trial = paired_trial(mapped(quotes), quotes.task, tiny.tokenizer, "test", 3)
    assert torch.equal(trial.sources, trial.batch.counterfactual())
