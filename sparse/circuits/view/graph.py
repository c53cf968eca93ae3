"""A circuit as a graph: its nodes, the weights between them, and links along the residual stream.

`to_networkx` is for analysis with networkx, `graph` is the same as plain data to draw and to save.
"""

from __future__ import annotations

from typing import Any

import networkx as nx

from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.model.gpt import SparseGPT

MOST_NODES = 300
"""At most this many nodes of a circuit are drawn: those with the most edges."""


def to_networkx(circuit: Circuit, model: SparseGPT) -> nx.DiGraph:
    """Return the circuit as a directed graph whose nodes are `Node`s in forward order.

    A node has a `name`, a `location` and an `index`. An edge of kind "weight" is an edge of the
    circuit and has its `weight`. An edge of kind "link" joins a node that writes a residual channel
    to one that reads the same channel later. A link is not an edge of the circuit
    (docs/method.md#edges), but the residual stream carries what was written along it, so paths
    through the whole circuit need both kinds.

    >>> from bridges import load_run
    >>> from sparse import to_networkx
    >>> run = load_run("tiny")
    >>> circuit = run.circuits()["single_double_quote"]
    >>> g = to_networkx(circuit, run.sparse)
    >>> len(g) == len(circuit) == 71
    True
    """
    g = nx.DiGraph(name=circuit.task.name)
    for node in circuit:
        g.add_node(node, name=circuit.name(node), location=node.location, index=node.index)
    for edge in circuit.edges(model):
        g.add_edge(edge.source, edge.target, kind="weight", weight=edge.weight)
    order = {at: i for i, at in enumerate(model.node_widths())}
    writes = [n for n in circuit if n.location.endswith("resid_delta")]
    reads = [n for n in circuit if n.location.endswith("act_in")]
    for write in writes:
        for read in reads:
            if read.index == write.index and order[read.location] > order[write.location]:
                g.add_edge(write, read, kind="link")
    return g


def graph(model: SparseGPT, circuit: Circuit) -> dict[str, Any]:
    """Return the circuit as plain data to draw: nodes in forward order, weighted edges, links.

    At most MOST_NODES nodes are in it, those with the most edges. `n_nodes` and `n_edges` count all
    nodes and edges of the circuit. layout.py places them.
    """
    g = to_networkx(circuit, model)
    kinds = nx.get_edge_attributes(g, "kind")
    edges = [pair for pair, kind in kinds.items() if kind == "weight"]
    degree = dict(g.edge_subgraph(edges).degree())
    kept = set(sorted(g, key=lambda node: -degree.get(node, 0))[:MOST_NODES])

    def ends(pair: tuple[Node, Node]) -> dict[str, str]:
        return {"source": circuit.name(pair[0]), "target": circuit.name(pair[1])}

    shown = [pair for pair in kinds if kept.issuperset(pair)]
    return {
        "name": circuit.task.name,
        "n_nodes": len(circuit),
        "n_edges": len(edges),
        "locations": list(model.node_widths()),
        "nodes": [
            {"id": circuit.name(n), "location": n.location, "index": n.index}
            for n in circuit
            if n in kept
        ],
        "edges": [
            {**ends(pair), "weight": g.edges[pair]["weight"]}
            for pair in shown
            if kinds[pair] == "weight"
        ],
        "links": [ends(pair) for pair in shown if kinds[pair] == "link"],
    }
