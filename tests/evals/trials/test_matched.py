"""Laws of control circuits: other nodes, as many at every place, and about as active."""

from dataclasses import replace

import pytest
import torch

from evals.trials.matched import activity_of, apart, at_size, called, outside, ranked_nodes
from sparse.circuits.graph import Node, nodes_of
from sparse.circuits.taps import recorded


@pytest.fixture(scope="module")
def batch(batch_of, quotes):
    return batch_of(quotes.task, pairs=12)


@pytest.fixture(scope="module")
def activity(tiny, quotes, batch):
    return activity_of(tiny.sparse, quotes, batch)


def per_location(circuit):
    return {at: len(indices) for at, indices in circuit.nodes.items() if indices}


@pytest.mark.parametrize("alike", [False, True])
def test_other_nodes_are_disjoint_and_as_many_at_every_location(quotes, activity, alike):
    given = activity if alike else None
    for seed in range(5):
        other = apart(quotes, seed, given)
        assert not set(other) & set(quotes)
        assert per_location(other) == per_location(quotes) and len(other) == len(quotes)
    assert set(apart(quotes, 0, given)) == set(apart(quotes, 0, given))
    assert set(apart(quotes, 0, given)) != set(apart(quotes, 1, given))
    assert set(apart(quotes, 0)) != set(apart(quotes, 0, activity))


def test_control_plain_random_nodes_of_the_library_may_be_the_circuit_s_own(tiny, quotes):
    shared = [set(quotes.random(tiny.sparse, seed)) & set(quotes) for seed in range(10)]
    assert any(shared)


@pytest.mark.parametrize("alike", [False, True])
def test_where_too_few_other_nodes_are_left_all_of_them_are_taken(quotes, activity, alike):
    at = "0.mlp.post_act"
    width = len(quotes.ablation[at])
    full = quotes.with_nodes([Node(at, i) for i in range(width - 3)], "nearly all")
    other = apart(full, 0, activity if alike else None)
    assert set(other) == {(at, width - 3), (at, width - 2), (at, width - 1)}


def test_every_other_node_may_be_drawn(quotes):
    at = "0.mlp.post_act"
    one = quotes.with_nodes([Node(at, 5)], "one")
    drawn = {next(iter(apart(one, seed)))[1] for seed in range(400)}
    assert len(drawn) > 0.25 * len(quotes.ablation[at]) and 5 not in drawn


def test_activity_is_the_mean_distance_from_the_ablation_value_over_real_tokens(
    tiny, quotes, batch, activity
):
    sums = {at: torch.zeros(len(x)) for at, x in quotes.ablation.items()}
    tokens = 0
    assert not batch.real.all()  # some rows are padded, so that padding could count
    for ids, last in zip(batch.ids, batch.last.tolist(), strict=True):
        with recorded(tiny.sparse) as values, torch.no_grad():
            tiny.sparse(ids[None, : last + 1])
        for at, x in values.items():
            sums[at] += (x[0] - quotes.ablation[at]).abs().sum(0)
        tokens += last + 1
    assert set(activity) == set(sums)
    for at, total in sums.items():
        torch.testing.assert_close(activity[at], total / tokens, atol=1e-4, rtol=1e-4)


def total(circuit, activity):
    return sum(float(activity[at][i]) for at, i in circuit)


def test_nodes_alike_move_about_as_much_as_the_circuit_when_they_are_held(quotes, activity):
    own = total(quotes, activity)
    alike = [total(apart(quotes, seed, activity), activity) / own for seed in range(10)]
    plain = [total(apart(quotes, seed), activity) / own for seed in range(10)]
    assert all(0.7 < x < 1.3 for x in alike) and 0.8 < sum(alike) / 10 < 1.2
    assert sum(plain) / 10 < 0.5  # control: nodes at random are mostly silent


def test_outside_gives_the_first_ranked_nodes_that_are_not_the_circuit_s(quotes, nonsense):
    other = outside(nonsense, quotes)
    nodes = nodes_of(nonsense.ablation)
    place = {node: i for i, node in enumerate(nodes)}
    best = sorted(nodes, key=lambda n: (-float(nonsense.ranking[n[0]][n[1]]), place[n]))
    assert ranked_nodes(nonsense) == best
    free = [node for node in best if node not in quotes]
    assert set(other) == set(free[: len(quotes)]) and len(other) == len(quotes)
    assert set(other) != set(best[: len(quotes)])  # control: the two share nodes at the top


def test_outside_of_a_circuit_without_ranking_is_what_of_it_is_not_the_circuit_s(quotes, nonsense):
    bare = replace(nonsense, ranking={})
    other = outside(bare, quotes)
    assert set(other) <= set(nonsense) - set(quotes) and len(other) == len(quotes)
    small = quotes.with_nodes([*list(quotes)[:3], *list(nonsense - quotes)[:2]], "small")
    assert set(outside(small, quotes)) == set(small) - set(quotes)


def test_a_namesake_is_cut_to_the_circuit_s_size_and_never_grows(quotes, nonsense):
    first = ranked_nodes(nonsense)
    assert len(nonsense) > len(quotes)
    cut = at_size(nonsense, quotes)
    assert set(cut) == set(first[: len(quotes)])
    assert at_size(quotes, nonsense) is quotes
    bare = replace(nonsense, ranking={})
    assert at_size(bare, quotes) is bare and at_size(bare, quotes, exactly=True) is bare


def test_exactly_at_size_has_as_many_as_the_circuit_before_its_clean_up(quotes, nonsense):
    first = ranked_nodes(nonsense)
    n = max(len(quotes), quotes.config["k_before_clean_up"])
    assert set(at_size(nonsense, quotes, exactly=True)) == set(first[:n])
    larger = nonsense.with_nodes(first[:400], "larger")  # a circuit that was not cleaned up
    assert len(at_size(nonsense, larger, exactly=True)) == 400 > len(nonsense)


def test_a_namesake_is_called_by_its_task():
    assert called("nonsense") == "the nonsense twin's circuit"
    assert called("if_equals") == "the circuit for if_equals"
