"""A circuit as plain data to draw: nodes, weighted edges and residual links."""

from __future__ import annotations

from typing import Any

from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.model.gpt import SparseGPT

MOST_NODES = 300
"""Nodes of a circuit that are drawn, the best connected ones."""


def graph(model: SparseGPT, circuit: Circuit) -> dict[str, Any]:
    """Return the circuit as plain data to draw: nodes in forward order, weighted edges, links.

    A link joins a write to a later read of the same residual channel; it is no edge.
    """
    edges = circuit.edges(model)
    degree: dict[Node, int] = {}
    for edge in edges:
        for node in (edge.source, edge.target):
            degree[node] = degree.get(node, 0) + 1
    ranked = sorted(circuit, key=lambda node: -degree.get(node, 0))
    kept = set(ranked[:MOST_NODES])
    order = list(model.node_widths())
    reads = [n for n in circuit if n.location.endswith("act_in") and n in kept]
    links = [
        (w, r)
        for w in circuit
        if w in kept and w.location.endswith("resid_delta")
        for r in reads
        if r.index == w.index and order.index(r.location) > order.index(w.location)
    ]
    return {
        "name": circuit.task.name,
        "n_nodes": len(circuit),
        "n_edges": len(edges),
        "locations": order,
        "nodes": [
            {"id": circuit.name(n), "location": n.location, "index": n.index}
            for n in circuit
            if n in kept
        ],
        "edges": [
            {"source": circuit.name(e.source), "target": circuit.name(e.target), "weight": e.weight}
            for e in edges
            if e.source in kept and e.target in kept
        ],
        "links": [{"source": circuit.name(w), "target": circuit.name(r)} for w, r in links],
    }
