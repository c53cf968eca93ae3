"""Which pairs are judged: a seeded choice of distinct ones."""

import pytest
import torch

from evals.trials.prompts import check_numbers, picked


def test_pairs_with_the_same_tokens_are_drawn_once(batch_of, quotes):
    batch = batch_of(quotes.task, pairs=6)
    doubled = batch.take(torch.tensor([0, 1, 2, 0, 1, 2, 3]))
    assert picked(doubled, 100).tolist() == [0, 1, 2, 6]
    assert picked(batch, 100).tolist() == list(range(6))  # control: none is another's copy


def test_the_choice_is_the_seed_s(batch_of, quotes):
    batch = batch_of(quotes.task)
    assert torch.equal(picked(batch, 8, 1), picked(batch, 8, 1))
    assert not torch.equal(picked(batch, 8, 1), picked(batch, 8, 2))
    assert picked(batch, 8, 1).tolist() == sorted(picked(batch, 8, 1).tolist())


@pytest.mark.parametrize("bad", [0, -1, 2.5, "19", True])
def test_numbers_that_are_no_numbers_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="draws=.*at least 1|draws=.*from 1 on"):
        check_numbers("judge_circuit", bad, 64)
    with pytest.raises(ValueError, match="max_pairs="):
        check_numbers("judge_circuit", 39, bad)
