"""Laws of a nonsense twin's direction: the one a model likes is taken, whatever else it likes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparse.tasks.nonsense import easier_nonsense, exchanged, is_nonsense_of, liking
from sparse.tasks.own import SPLITS
from sparse.tasks.suite import get_task

NAME = "while_return_true"


class Likes:
    """Likes one answer by `strength` logits more after a first context, and always by `always`."""

    def __init__(self, tokenizer, batch, strength: float, always: float = 0.0) -> None:
        first, second = batch.ids.chunk(2)
        self.tokens = torch.tensor(
            sorted(set(first.flatten().tolist()) - set(second.flatten().tolist()))
        )
        self.answers = int(batch.target[0]), int(batch.target[-1])
        self.strength, self.always = strength, always
        self.device, self.tokenizer, self.vocab_size = "cpu", tokenizer, len(tokenizer)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def last_logits(self, ids, last):
        sign = torch.isin(ids, self.tokens).any(1).float() * 2 - 1
        logits = torch.zeros(len(ids), self.vocab_size)
        logits[:, self.answers[0]] = self.strength / 2 * sign + self.always
        logits[:, self.answers[1]] = -self.strength / 2 * sign
        return logits


@pytest.fixture(scope="module")
def task():
    return get_task(NAME)


@pytest.fixture(scope="module")
def batch(task, bpe):
    return task.nonsense().batch(bpe, "train")


@pytest.mark.parametrize("always", [0.0, 9.0, -9.0])
def test_the_direction_that_a_model_likes_is_taken_whatever_its_constant_liking(
    task, batch, bpe, always
):
    one, other = task.nonsense(), exchanged(task.nonsense())
    for strength, wanted in ((3.0, one), (-3.0, other), (0.0, one)):  # a tie goes to the first
        model = Likes(bpe, batch, strength, always)
        assert liking(one, model, bpe) == pytest.approx(2 * strength, abs=1e-5)
        assert liking(other, model, bpe) == pytest.approx(-2 * strength, abs=1e-5)
        assert easier_nonsense(task, model) == wanted
    assert one != other


def test_exchanging_targets_twice_gives_the_task_back_and_once_each_answer_to_the_other(task):
    twin = task.nonsense()
    turned = exchanged(twin)
    assert exchanged(turned) == twin
    assert turned.name == twin.name and turned.alternatives[0] == twin.alternatives[0][::-1]
    for split in SPLITS:
        for a, b in zip(twin.pairs(split), turned.pairs(split), strict=True):
            assert (a.context_1, a.context_2) == (b.context_1, b.context_2)
            assert (a.target_1, a.target_2) == (b.target_2, b.target_1)
    one_sided = replace(task, train=(replace(task.train[0], target_2=None),))
    with pytest.raises(ValueError, match="no second target to exchange"):
        exchanged(one_sided)


def test_a_twin_is_of_its_task_in_both_directions_and_of_no_other(task):
    twin = task.nonsense()
    assert is_nonsense_of(task, twin) and is_nonsense_of(task, exchanged(twin))
    assert not is_nonsense_of(task, task)
    assert not is_nonsense_of(get_task("for_while"), twin)
    assert not is_nonsense_of(task, twin.with_targets((" is", " when")))
    assert not is_nonsense_of(twin, twin)  # which has none itself
