import pytest

from sparse.circuits.graph import Node
from sparse.circuits.pruning.search import clean, smallest


@pytest.mark.parametrize("threshold", [0, 1, 2, 7, 31, 99, 100])
def test_bisection_finds_the_threshold_of_a_monotone_curve(threshold):
    calls = []

    def loss(k):
        calls.append(k)
        return 0.0 if k >= threshold else 1.0

    k, curve = smallest(loss, 100, 0.5, window=0)
    assert k == threshold and len(calls) == len(set(calls)) == len(curve) <= 16


def test_the_window_finds_a_smaller_size_where_the_curve_dips():
    dips = {41: 0.4, 43: 0.4}

    def loss(k):
        return 0.0 if k >= 48 else dips.get(k, 1.0)

    assert smallest(loss, 100, 0.5, window=0)[0] == 48
    assert smallest(loss, 100, 0.5, window=6)[0] == 43
    assert smallest(loss, 100, 0.5, window=12)[0] == 41


def test_when_no_size_will_do_the_least_loss_is_taken():
    assert smallest(lambda k: 1.0 + abs(k - 30), 100, 0.5, window=4)[0] == 32


def test_cleaning_drops_what_does_not_matter_and_silent_nodes_first():
    nodes = [Node("0.attn.v", i) for i in range(6)]
    needed = {nodes[1], nodes[4]}

    def loss(kept):
        return 0.0 if needed <= set(kept) else 1.0

    assert clean(nodes, loss, 0.5) == [nodes[1], nodes[4]]

    def either(kept):  # one of nodes 0 and 5 is enough: the silent one goes
        return 0.0 if {nodes[0], nodes[5]} & set(kept) else 1.0

    assert clean([nodes[0], nodes[5]], either, 0.5) == [nodes[0]]
    assert clean([nodes[0], nodes[5]], either, 0.5, silent=[nodes[0]]) == [nodes[5]]
