import re

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparse.tasks.batch import REST
from sparse.tasks.fit import LEAST_PAIRS, LEAST_TRAIN_PAIRS, REMEDIES, fit
from sparse.tasks.pair import Pair
from sparse.tasks.task import Task


def pair(a: str, b: str, x: str = "x", y: str | None = "y", **groups: str) -> Pair:
    return Pair(context_1=a, context_2=b, target_1=x, target_2=y, groups=groups)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Single characters, with `ab` and `xy` merged."""
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"ab": 26, "xy": 27}
    bpe = models.BPE(vocab, [("a", "b"), ("x", "y")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))


GOOD = tuple(pair("c" * i, "d" * i) for i in range(1, 21))


def test_pairs_that_do_not_fit_are_dropped_and_counted_by_reason(letters):
    bad = {
        "contexts of unequal length": [pair("cc", "ddd"), pair("hab", "hcd")],
        "target merges with its context": [pair("hc", "hx"), pair("ha", "hc", "b")],
        "target is several tokens": [pair("he", "hf", "xz"), pair("he", "hf", "x", "yz")],
        "equal targets or contexts": [pair("dc", "dc"), pair("hg", "hh", "x", "x")],
        "prompt longer than the model": [pair("e" * 30, "f" * 30)],
    }
    every = (*GOOD, *(p for of in bad.values() for p in of))
    batch = fit("t", every, letters, "test", LEAST_PAIRS, longest=25)
    assert batch.n_pairs == 20 and batch.dropped == {why: len(of) for why, of in bad.items()}
    assert set(bad) == set(REMEDIES)
    assert "prompt longer than the model" not in fit("t", every, letters, "test", 16).dropped


def test_too_few_pairs_are_refused_with_every_reason_an_example_and_its_own_remedy(letters):
    bad = (pair("cc", "ddd"), pair("hc", "hx"), pair("he", "hf", "xz"))
    with pytest.raises(ValueError) as refused:
        fit("t", GOOD[:15] + bad, letters, "test", LEAST_PAIRS)
    text = str(refused.value)
    assert "15 of 18 test pairs remain, at least 16 must" in text
    for why, example in (
        ("contexts of unequal length", "'cc' is 2 tokens, 'ddd' is 3"),
        ("target merges with its context", r"'hx' + 'y' ends in the tokens ['h', 'xy']"),
        ("target is several tokens", "'xz' is 2 tokens (ids [23, 25], pieces ['x', 'z'])"),
    ):
        line = next(line for line in text.splitlines() if why in line)
        assert example in line and REMEDIES[why] in line and "1 dropped" in line
    assert "begins with: ['x']" in text
    assert len(set(REMEDIES.values())) == len(REMEDIES)
    with pytest.raises(ValueError, match="none was dropped: give more pairs"):
        fit("t", GOOD[:15], letters, "test", LEAST_PAIRS)


def test_train_may_be_smaller_where_validation_chooses_the_size(letters):
    few, other = GOOD[:LEAST_TRAIN_PAIRS], tuple(pair("e" * i, "f" * i) for i in range(1, 20))
    assert Task(name="t", train=few, validation=other).batch(letters, "train").n_pairs == 8
    with pytest.raises(ValueError, match="8 of 8 train pairs remain, at least 16 must"):
        Task(name="t", train=few).batch(letters, "train")
    with pytest.raises(ValueError, match="7 of 7 train pairs remain, at least 8 must"):
        Task(name="t", train=few[:7], validation=other).batch(letters, "train")


def test_a_one_sided_pair_needs_one_target_only(letters):
    pairs = tuple(pair("c" * i, "d" * i, "x", None) for i in range(1, 21))
    batch = fit("t", pairs, letters, "test", LEAST_PAIRS)
    assert batch.targets == (("x", None),) and (batch.target[20:] == REST).all()
    assert (batch.foil[20:] == 23).all() and (batch.foil[:20] == REST).all()


def test_a_target_is_the_token_it_becomes_in_its_context():
    """With a bar before every word, as Llama has it, a target alone is another token."""
    from tests.helpers.tokenizers import llama_kind

    tokenizer = llama_kind()
    alone = tokenizer("[", add_special_tokens=False)["input_ids"]
    pairs = tuple(pair(f"values{'[' * i}1", f"rows{'[' * i}1", "[", "(") for i in range(1, 20))
    batch = fit("t", pairs, tokenizer, "test", 16)
    token = int(batch.target[0])
    assert tokenizer.convert_ids_to_tokens(token) == "[" and alone != [token]
    for row in range(0, 2 * batch.n_pairs, 5):
        prompt = batch.ids[row, : batch.last[row] + 1].tolist()
        first = batch.targets[0][row >= batch.n_pairs]
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        plain = tokenizer(text + str(first), add_special_tokens=False)["input_ids"]
        assert plain[-1] == batch.target[row] and prompt[-len(plain) + 1 :] == plain[:-1]


def test_groups_follow_the_pairs_that_are_kept(letters):
    pairs = tuple(
        pair("c" * i, "d" * (i + i % 2), frame=str(i), **({"word": "w"} if i > 9 else {}))
        for i in range(1, 41)
    )
    batch = fit("t", pairs, letters, "test", LEAST_PAIRS)
    assert batch.groups["frame"] == tuple(str(i) for i in range(2, 41, 2))
    assert batch.groups["word"] == ("",) * 4 + ("w",) * 16
    assert torch.equal(batch.last[:20], torch.arange(2, 41, 2) - 1)
    assert re.fullmatch("w*", "".join(batch.groups["word"]))
