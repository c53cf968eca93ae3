"""The nonsense twin's circuit: of the circuit's size, and not learned again where it is known."""

from dataclasses import replace

import pytest

from evals.trials.matched import at_size
from evals.trials.nonsense import nonsense_of
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.learn import learn
from sparse.circuits.pruning.prune import prune
from sparse.tasks.nonsense import easier_nonsense, exchanged

QUICK = PruneConfig(ablation="zero", n_steps=80, lr=5e-2, clean_up=0.0, target_loss=0.3)


@pytest.fixture(scope="module")
def pruned(sparse, task, dense):
    return prune(sparse, task, QUICK, tokenizer=dense.tokenizer, force=True)


@pytest.fixture(scope="module")
def easier(sparse, pruned, dense):
    return easier_nonsense(pruned.task, sparse, dense.tokenizer)


def test_it_has_the_circuit_s_size_and_is_of_the_direction_that_the_model_likes(
    sparse, pruned, dense, easier
):
    learned = at_size(nonsense_of(sparse, pruned, dense.tokenizer), pruned, exactly=True)
    assert learned.task == easier
    assert len(learned) == max(len(pruned), pruned.config["k_before_clean_up"])
    assert learned.ranking.keys() == pruned.ablation.keys()


def test_the_ranking_of_the_pruned_twin_saves_learning_it_again(
    sparse, pruned, dense, easier, monkeypatch
):
    learned = at_size(nonsense_of(sparse, pruned, dense.tokenizer), pruned, exactly=True)
    twin = prune(sparse, easier, QUICK, tokenizer=dense.tokenizer, force=True)
    unlike = replace(twin, config=twin.config | {"n_steps": 81})
    calls = []
    monkeypatch.setattr("evals.trials.nonsense.learn", lambda *a: calls.append(a) or learn(*a))
    assert (
        at_size(nonsense_of(sparse, pruned, dense.tokenizer, twin), pruned, exactly=True).nodes
        == learned.nodes
    )
    turned = replace(twin, task=exchanged(easier))  # found in the other direction: taken as it is
    assert nonsense_of(sparse, pruned, dense.tokenizer, turned) is turned
    assert not calls
    for other in (None, unlike, replace(twin, ranking={})):
        assert (
            at_size(nonsense_of(sparse, pruned, dense.tokenizer, other), pruned, exactly=True).nodes
            == learned.nodes
        )
    assert len(calls) == 3


def test_a_circuit_that_is_not_of_the_nonsense_twin_is_refused(sparse, pruned, dense):
    with pytest.raises(ValueError, match="not of the nonsense twin"):
        nonsense_of(sparse, pruned, dense.tokenizer, pruned)
