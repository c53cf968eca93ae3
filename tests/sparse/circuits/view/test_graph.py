"""A circuit as a graph holds its nodes, its edges and its links, and nothing else."""

import networkx as nx
import pytest

from bridges import load_run
from sparse.circuits.graph import Node
from sparse.circuits.view import graph as view
from sparse.circuits.view.graph import graph, to_networkx


@pytest.fixture(scope="module")
def run():
    return load_run("tiny")


@pytest.fixture(scope="module")
def circuit(run):
    return run.circuits()["single_double_quote"]


def test_nodes_and_weights_are_those_of_the_circuit(run, circuit):
    g = to_networkx(circuit, run.sparse)
    assert list(g) == list(circuit)
    weights = {(a, b): w for a, b, w in g.edges(data="weight") if w is not None}
    assert weights == {(e.source, e.target): e.weight for e in circuit.edges(run.sparse)}
    assert all(g.nodes[n]["name"] == circuit.name(n) for n in g)


def test_a_link_joins_a_write_to_every_later_read_of_its_channel(run, circuit):
    order = list(run.sparse.node_widths())
    circuit = circuit.with_nodes(
        [Node(at, 3) for at in order if at.endswith(("act_in", "resid_delta"))], "channel 3"
    )
    g = to_networkx(circuit, run.sparse)
    want = {
        (a, b)
        for a in circuit
        for b in circuit
        if a.location.endswith("resid_delta") and b.location.endswith("act_in")
        if a.index == b.index and order.index(a.location) < order.index(b.location)
    }
    assert {(a, b) for a, b, kind in g.edges(data="kind") if kind == "link"} == want != set()


def test_the_graph_runs_forward_only(run, circuit):
    assert nx.is_directed_acyclic_graph(to_networkx(circuit, run.sparse))


def test_what_is_drawn_is_the_best_connected_part_of_it(run, circuit, monkeypatch):
    whole = graph(run.sparse, circuit)
    assert len(whole["nodes"]) == len(circuit) and whole["n_edges"] == len(whole["edges"])
    monkeypatch.setattr(view, "MOST_NODES", 10)
    part = graph(run.sparse, circuit)
    degree: dict[str, int] = {}
    for edge in whole["edges"]:
        for end in ("source", "target"):
            degree[edge[end]] = degree.get(edge[end], 0) + 1
    kept = {node["id"] for node in part["nodes"]}
    others = {node["id"] for node in whole["nodes"]} - kept
    assert len(kept) == 10 and part["n_nodes"] == len(circuit)
    assert min(degree.get(n, 0) for n in kept) >= max(degree.get(n, 0) for n in others)
    assert all({e["source"], e["target"]} <= kept for e in [*part["edges"], *part["links"]])
