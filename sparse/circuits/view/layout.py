"""The places of nodes and edges in the drawing of a circuit, in pixels.

The template of the page makes the markup; all that is text here is the path of a curve (`_bend`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

Number = int | float
Columns = dict[str, list[str]]
"""Location to the ids of its nodes, top to bottom."""
Neighbours = Mapping[str, list[str]]
LEFT, TOP = 40, 52
"""Pixels before the first column and above the first node."""
SWEEPS = 8
"""How often the columns are sorted by the heights of their neighbours; more sweeps change nothing
that can be seen."""


def graph_layout(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Return the circuit laid out in columns, one per location in forward order.

    `graph` is what `graph.graph` returns. Within a column, nodes are ordered by the mean height of
    the nodes that edges and links join them to.
    """
    columns, joined = _columns(graph), _neighbours(graph)
    height = _heights(columns, joined)
    most = max((len(ids) for ids in columns.values()), default=1)
    tall, wide = max(180, 15 * most), min(110, max(62, 1030 // max(1, len(columns))))
    place = {
        node: (LEFT + wide * c, round(TOP + tall * height[node], 1))
        for c, ids in enumerate(columns.values())
        for node in ids
    }
    names = {node["id"]: _short(node["id"], node["location"]) for node in graph["nodes"]}
    return {
        "name": graph["name"],
        "summary": f"{graph['n_nodes']} nodes, {graph['n_edges']} edges",
        "left_out": graph["n_nodes"] - len(graph["nodes"]),
        "width": LEFT + wide * len(columns) + 20,
        "height": tall + 68,
        "columns": [
            {"x": LEFT + wide * c, "lines": _two_lines(at), "n": len(ids)}
            for c, (at, ids) in enumerate(columns.items())
        ],
        "nodes": [
            {"id": n, "x": x, "y": y, "label": names[n], "degree": len(joined[n])}
            for n, (x, y) in place.items()
        ],
        "edges": _edges(graph, place),
        "links": [
            {**link, "path": _bend(place[link["source"]], place[link["target"]])}
            for link in graph["links"]
        ],
    }


def _columns(graph: Mapping[str, Any]) -> Columns:
    """Return the nodes by location; locations without nodes have no column."""
    columns: Columns = {at: [] for at in graph["locations"]}
    for node in graph["nodes"]:
        columns[node["location"]].append(node["id"])
    return {at: ids for at, ids in columns.items() if ids}


def _neighbours(graph: Mapping[str, Any]) -> Neighbours:
    """Return, for every node, the nodes that edges and links join it to."""
    joined: dict[str, list[str]] = defaultdict(list)
    for join in [*graph["edges"], *graph["links"]]:
        joined[join["source"]].append(join["target"])
        joined[join["target"]].append(join["source"])
    return joined


def _heights(columns: Columns, joined: Neighbours) -> dict[str, float]:
    """Return the height of every node, from 0 at the top to 1; sort the columns by it in place."""
    height: dict[str, float] = {}
    for ids in columns.values():
        height |= {node: i / len(ids) for i, node in enumerate(ids)}
    for _ in range(SWEEPS):
        for ids in columns.values():
            pull = {n: [height[m] for m in joined[n]] or [height[n]] for n in ids}
            ids.sort(key=lambda n: sum(pull[n]) / len(pull[n]))
            height |= {node: (i + 0.5) / len(ids) for i, node in enumerate(ids)}
    return height


def _edges(
    graph: Mapping[str, Any], place: Mapping[str, tuple[Number, Number]]
) -> list[dict[str, Any]]:
    """Return every edge with its path, its sign, and its stroke, which is wider for a larger |w|.

    The stroke is 0.6 pixels plus 2.6 times the weight's share of the largest one.
    """
    heaviest = max((abs(edge["weight"]) for edge in graph["edges"]), default=1.0) or 1.0
    return [
        {
            **edge,
            "path": _bend(place[edge["source"]], place[edge["target"]]),
            "stroke": round(0.6 + 2.6 * abs(edge["weight"]) / heaviest, 2),
            "sign": "plus" if edge["weight"] > 0 else "minus",
        }
        for edge in graph["edges"]
    ]


def _bend(a: tuple[Number, Number], b: tuple[Number, Number]) -> str:
    """Return the SVG path of a curve from `a` to `b` that is level at both ends."""
    (x, y), (u, v) = a, b
    third = (u - x) / 2.2
    return f"M{x},{y} C{x + third:.1f},{y} {u - third:.1f},{v} {u},{v}"


def _two_lines(location: str) -> tuple[str, str]:
    layer, part, name = location.split(".")
    return f"{layer}.{part}", name


def _short(name: str, location: str) -> str:
    return name.removeprefix(f"{location}.").replace("head", "h").replace(".ch", ".")
