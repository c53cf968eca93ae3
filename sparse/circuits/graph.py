"""Nodes, and the edges between them: nonzero weights between two kept nodes.

docs/method.md#edges says what counts as an edge, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import NamedTuple

from sparse.model.gpt import SparseGPT

EDGES = (  # (input location, output location, weight) of one layer; q, k, v share W_qkv
    ("attn.act_in", "attn.q", "attn.qkv"),
    ("attn.act_in", "attn.k", "attn.qkv"),
    ("attn.act_in", "attn.v", "attn.qkv"),
    ("attn.v", "attn.resid_delta", "attn.out"),
    ("mlp.act_in", "mlp.post_act", "mlp.fc"),
    ("mlp.post_act", "mlp.resid_delta", "mlp.proj"),
)
THIRDS = ("attn.q", "attn.k", "attn.v")
Nodes = dict[str, tuple[int, ...]]


class Node(NamedTuple):
    """One entry of the vector at a node location, such as ("0.mlp.post_act", 17)."""

    location: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Edge(NamedTuple):
    """A nonzero weight from a kept node to a kept node."""

    source: Node
    target: Node
    weight: float


def nodes_of(values: Mapping[str, Sized]) -> list[Node]:
    """Return every node of the locations in `values`, in their order.

    The length of a value is the number of nodes at its location.
    """
    return [Node(at, i) for at, value in values.items() for i in range(len(value))]


def edges_of(model: SparseGPT, nodes: Nodes) -> list[Edge]:
    """Return the nonzero weights between `nodes`, in forward order."""
    edges: list[Edge] = []
    for layer in range(model.config.num_hidden_layers):
        for source, target, weight in EDGES:
            w = model.model.blocks.get_parameter(f"{layer}.{weight}.weight").detach()
            if target in THIRDS:
                w = w.chunk(3)[THIRDS.index(target)]
            a, b = f"{layer}.{source}", f"{layer}.{target}"
            ins, outs = nodes.get(a, ()), nodes.get(b, ())
            block = w[list(outs)][:, list(ins)].cpu()  # read at once, not edge by edge
            for j, i in block.nonzero().tolist():
                edges.append(Edge(Node(a, ins[i]), Node(b, outs[j]), float(block[j, i])))
    return edges
