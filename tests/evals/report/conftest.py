"""A report that looks like one: three tasks with positive, negative and untold claims."""

import random

import pytest

from evals.report.report import Report, provenance
from evals.scores.clusters import Resampled
from evals.scores.curve import Curve
from evals.scores.pictures import Example, Matrix, Pictures, Point, Scatter
from evals.scores.score import Score
from evals.scores.verdict import Claim, favours, outranks, threshold

TASKS = ("single_double_quote", "bracket_counting", "while_return_true")
ATTN = ("act_in", "q", "k", "v", "resid_delta")
MLP = ("act_in", "post_act", "resid_delta")
LOCATIONS = [
    f"{i}.{at}"
    for i in range(2)
    for at in (*(f"attn.{x}" for x in ATTN), *(f"mlp.{x}" for x in MLP))
]
CARRIED = {  # task: share, collateral A of the circuit, that of its rivals and namesakes
    "single_double_quote": (0.68, 0.235, {"all nodes": 0.262, "complement": 0.531,
        "decoded embedding difference": 1.76, "the unrelated source's full patch": 1.20,
        "the nonsense twin's circuit": 0.421, "while_return_true's circuit": 1.09,
        "mean dense difference": 0.137}),
    "bracket_counting": (0.64, 0.215, {"all nodes": 0.176, "complement": 0.9,
        "decoded embedding difference": 0.8, "the unrelated source's full patch": 0.243,
        "the nonsense twin's circuit": 0.180, "single_double_quote's circuit": 2.02,
        "mean dense difference": 0.146}),
    "while_return_true": (0.82, 0.239, {"all nodes": 0.268, "complement": 0.419,
        "decoded embedding difference": 0.238, "the unrelated source's full patch": 0.205,
        "the nonsense twin's circuit": 0.207, "single_double_quote's circuit": 0.250,
        "mean dense difference": 0.198}),
}  # fmt: skip
NOTES = tuple(f"task_{i} was left out: the twin does not do it" for i in range(6))


def a_graph(per_location=4, seed=0):
    rng = random.Random(seed)
    nodes = [
        {"id": f"{at}.{i}", "location": at, "index": i}
        for at in LOCATIONS
        for i in range(rng.randint(1, per_location))
    ]
    pairs = [("attn.act_in", "attn.q"), ("attn.act_in", "attn.k"), ("attn.act_in", "attn.v")]
    pairs += [("attn.v", "attn.resid_delta"), ("mlp.act_in", "mlp.post_act")]
    pairs += [("mlp.post_act", "mlp.resid_delta")]
    edges = [
        {"source": a["id"], "target": b["id"], "weight": rng.gauss(0, 1)}
        for a in nodes
        for b in nodes
        if a["location"][0] == b["location"][0]
        and (a["location"][2:], b["location"][2:]) in pairs
        and rng.random() < 0.4
    ]
    links = [
        {"source": a["id"], "target": b["id"]}
        for a in nodes
        for b in nodes
        if a["location"].endswith("resid_delta") and b["location"] == "1.mlp.act_in"
    ][:6]
    names = {"name": "single_double_quote", "locations": LOCATIONS, "links": links}
    return names | {"n_nodes": len(nodes), "n_edges": len(edges), "nodes": nodes, "edges": edges}


def _spread(value, half, n_clusters=12):
    """A difference whose 95 % interval is about value - half to value + half."""
    import torch

    draws = torch.linspace(value - half / 0.95, value + half / 0.95, 101).double()
    few = n_clusters < 5
    return Resampled(
        value=value, draws=None if few else draws, factor="frame", n_clusters=n_clusters
    )


def _carries(task, rng):
    share, own, others = CARRIED[task]
    empty = [0.05 + 0.1 * rng.random() for _ in range(39)]
    conditions = [
        threshold("share", "share of what a full patch gives", share, 0.25, "fraction", "higher"),
        outranks("empty.rotations", "rotations, by share", share, empty, "fraction", "higher"),
    ]
    for name, damage in others.items():
        if name.startswith("mean"):
            continue
        half = 0.6 * abs(own - damage) if task != "while_return_true" else 0.09
        words = f"less collateral damage than {name}"
        gap = _spread(own - damage, half)
        conditions.append(favours(f"rival.{name}", words, gap, damage, "nats", "lower"))
    return Claim(kind="carries", task=task, value=share, unit="fraction",
                 conditions=tuple(conditions), facts={"site": 3, "P_cf": 0.98})  # fmt: skip


def _others(task, rng):
    faithful = {"single_double_quote": 0.03, "bracket_counting": 0.28, "while_return_true": 0.05}
    few = 3 if task == "while_return_true" else 12
    loss = [0.6 + 0.3 * rng.random() for _ in range(39)]
    harm = [0.05 + 0.1 * rng.random() for _ in range(39)]
    near = threshold("stochastic", "nats from the full twin at p = 0.25", faithful[task], 0.1,
                     "nats", "lower")  # fmt: skip
    kept = outranks("empty.circuits", "random circuits", 0.12, loss, "nats", "lower")
    needs = outranks("empty.nodes", "matched nodes", 0.75, harm, "fraction", "higher")
    rival = favours("namesake.nonsense", "more harm than nonsense nodes outside the circuit",
                    _spread(0.4, 0.2, few), 0.35, "fraction", "higher")  # fmt: skip
    own = {"task": task}
    return [
        Claim(**own, kind="sufficient", value=0.12, unit="nats", conditions=(near, kept)),
        Claim(**own, kind="necessary", value=0.75, unit="fraction", conditions=(needs, rival)),
        Claim(**own, kind="needed", value=0.75, unit="fraction", conditions=(needs, rival)),
    ]


def _scatter(task, rng):
    share, own, others = CARRIED[task]
    points = [Point(label="the circuit", kind="claim", effect=share, collateral=own)]
    for name, damage in others.items():
        kind = "namesake" if "circuit" in name else "rival"
        kind = "reference" if name.startswith("mean") else kind
        moved = 0.3 if name == "complement" else share + 0.01 * rng.random()
        points.append(Point(label=name, kind=kind, effect=moved, collateral=damage))
    points += [
        Point(
            label=name,
            kind="control",
            effect=0.2 * rng.random(),
            collateral=0.1 + 0.9 * rng.random(),
        )
        for name in ("rotations", "decoders of the same covariance")
        for _ in range(39)
    ]
    return Scatter(name=f"{task}: carried by the dense model", effect_label="share of the effect",
                   collateral_label="collateral A, nats", points=tuple(points))  # fmt: skip


def _curve(task, rng):
    x = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    bands = {"random rotations of the same delta": (25, 0.02), "random circuits": (10, 0.04)}
    return Curve(
        name=f"{task}: steering the dense model",
        x_label="strength",
        y_label="P(target of the other context)",
        x=x,
        value=(0.02, 0.03, 0.06, 0.21, 0.62, 0.87, 0.91),
        controls={
            name: tuple(tuple(0.02 + high * s * rng.random() for s in x) for _ in range(n))
            for name, (n, high) in bands.items()
        },
        references={"full activation patch": (0.97,) * 7},
    )


def score(name, unit, value, draws, control_name, n=64, stderr=0.02, **more):
    return Score(name=name, unit=unit, value=value, draws=tuple(draws), control_name=control_name,
                 n=n, stderr=stderr, **more)  # fmt: skip


def _sections(rng):
    def around(center, n=20):
        return [center + 0.1 * rng.random() for _ in range(n)]

    low = {"better": "lower"}
    bridges = []
    for site, value in enumerate((0.7, 0.6, 0.55, 0.5, 1.3)):
        name, key = f"site {site}: decoder FVU", f"bridge.site.{site}.decoder_fvu"
        draws = (2.1, 2.0, 2.2)
        bridges.append(score(name, "fraction", value, draws, "untrained bridges", key=key, **low))
    sections = {"Bridges": tuple(bridges)}
    for task in TASKS:
        sections[f"{task}: the circuit in the sparse model"] = (
            score("sufficiency, mean ablation", "nats", 0.11, around(0.9), "random circuits",
                  key="circuit.sufficiency.mean", **low),
            score("necessity", "nats", 0.71, around(0.06), "random sets of equally many nodes",
                  key="circuit.necessity"),
            score("nonsense twin (59 nodes, the circuit 59)", "nats", 0.11, [0.44],
                  "the nonsense twin's circuit of 59 nodes", key="circuit.nonsense", **low),
            score("nodes", "nodes", 59.0, [5632.0], "the whole model", n=1, stderr=0.0, **low),
        )  # fmt: skip
        patch = {"detail": {"untouched": 0.02, "full activation patch": 0.97, "site": 3}}
        sections[f"{task}: the same circuit in the dense model"] = (
            score("steering, strength 1", "probability", 0.21, around(0.03, 100),
                  "random directions of equal norm", **patch),
        )  # fmt: skip
    return sections


def a_report(graphs=None):
    rng = random.Random(0)
    claims = []
    for task in TASKS:
        first, second, last = _others(task, rng)
        claims += [first, second, _carries(task, rng), last]
    harm = ((0.75, 0.02, 0.11), (0.2, 0.24, None), (-0.03, 0.05, 0.58))
    pictures = Pictures(
        scatters=tuple(_scatter(task, rng) for task in TASKS),
        curves=tuple(_curve(task, rng) for task in TASKS),
        matrices=(Matrix(name="harm to the dense model", unit="fraction", rows=TASKS,
                         columns=TASKS, values=harm),),
        examples=tuple(
            Example(task=task, prompt=prompt, answer=answer, other=other, dense=0.99 - 0.03 * i,
                    twin=0.93, circuit=0.84 - 0.4 * i)
            for task, prompt, answer, other in (
                (TASKS[0], 'name = get("value', '"', "'"),
                (TASKS[1], "items = [(a, b", ")", "]"),
                (TASKS[2], "    while True:\n        x = f(y)\n", " return", " while"),
            )
            for i in range(2)
        ),
    )  # fmt: skip
    run = {"dense": {"name": "tiny", "fingerprint": "a1"}, "data": {"name": "stdlib"}}
    return Report(
        title="Sparse bridges: tiny",
        claims=tuple(claims),
        sections=_sections(rng),
        pictures=pictures,
        graphs=(a_graph(),) if graphs is None else graphs,
        notes=("single_double_quote: trained for 3 M tokens only", *NOTES),
        provenance=provenance(seed=0, draws=39, max_pairs=64, facts=True, quick=False, run=run),
    )


def a_log(n=600):
    constant = {"lr/sparse": 1e-3, "name": "x", "density/matrices": 0.06}
    return [
        {"step": i, "loss/ce": 8 * (i + 1) ** -0.1, "loss/kl": 5 * (i + 1) ** -0.2} | constant
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def report():
    return a_report()


@pytest.fixture(scope="session")
def graph():
    return a_graph


@pytest.fixture(scope="session")
def log():
    return a_log()
