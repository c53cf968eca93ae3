"""The page: self-contained, escaped, small, and saying what the report says."""

import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from evals.report.charts import Scale, training_charts
from evals.report.page import LIMIT, TEMPLATE, page, save_page
from evals.report.report import Report, provenance
from evals.scores.curve import Curve
from evals.scores.score import Score
from sparse.circuits.view.layout import graph_layout

ATTN = ("act_in", "q", "k", "v", "resid_delta")
MLP = ("act_in", "post_act", "resid_delta")
LOCATIONS = [
    f"{i}.{at}"
    for i in range(2)
    for at in (*(f"attn.{x}" for x in ATTN), *(f"mlp.{x}" for x in MLP))
]
VOID = {"meta", "line", "path", "circle", "rect", "br"}


def graph(per_location=4, seed=0):
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


def score(name, unit, value, draws, control_name, n=64, stderr=0.02, **more):
    return Score(name=name, unit=unit, value=value, draws=tuple(draws), control_name=control_name,
                 n=n, stderr=stderr, **more)  # fmt: skip


@pytest.fixture
def report():
    rng = random.Random(0)
    flat = [0.03 + 0.01 * rng.random() for _ in range(100)]
    directions, circuits = "random directions of equal norm", "random circuits of equal size"
    x = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    curve = Curve(
        name="single_double_quote: steering the dense model",
        x_label="strength",
        y_label="P(target of the other context)",
        x=x,
        value=(0.02, 0.03, 0.06, 0.21, 0.62, 0.87, 0.91),
        controls={
            directions: tuple(
                tuple(0.02 + 0.003 * s * rng.random() for s in x) for _ in range(100)
            ),
            circuits: tuple(tuple(0.02 + 0.001 * s * rng.random() for s in x) for _ in range(10)),
        },
        references={"full activation patch": (0.97,) * 7},
    )
    low = {"better": "lower"}
    patch = {"detail": {"untouched": 0.02, "full activation patch": 0.97, "site": 3}}

    def around(center, n=20):
        return [center + 0.1 * rng.random() for _ in range(n)]

    fvu = {"unit": "fraction", "draws": (2.1, 2.0, 2.2), "control_name": "untrained bridges"}
    others = "random sets of equally many other nodes"
    twin = "the nonsense twin's circuit of 59 nodes"
    first = "steering, strength 1, v. directions"
    steering = "steering, strength 8, best on validation, v. circuits"
    sections = {
        "Bridges": tuple(
            score(f"site {s}: decoder FVU", value=0.7 - 0.02 * s, **fvu, **low) for s in range(5)
        ),
        "single_double_quote: the circuit in the sparse model": (
            score("sufficiency, mean ablation", "nats", 0.11, around(0.9), circuits, **low),
            score("necessity", "nats", 0.71, around(0.06), others),
            score("nonsense twin (59 nodes, the circuit 59)", "nats", 0.11, [0.44], twin, **low),
            score("KL(full || circuit)", "nats", 2.4, around(2.35), circuits, **low),
        ),
        "single_double_quote: the same circuit in the dense model": (
            score(first, "probability", 0.21, flat, directions, **patch),
            score(steering, "probability", 0.02, around(0.5, 10), circuits, **patch),
        ),
    }
    run = {"dense": {"name": "tiny", "fingerprint": "a1"}, "data": {"name": "stdlib"}}
    return Report(
        title="Sparse bridges: tiny",
        sections=sections,
        curves=(curve,),
        graphs=(graph(),),
        notes=("single_double_quote: trained for 3 M tokens only",),
        provenance=provenance(seed=0, draws=100, run=run),
    )


def log(n=600):
    constant = {"lr/sparse": 1e-3, "name": "x", "density/matrices": 0.06}
    return [
        {"step": i, "loss/ce": 8 * (i + 1) ** -0.1, "loss/kl": 5 * (i + 1) ** -0.2} | constant
        for i in range(n)
    ]


def test_the_page_says_what_the_report_says(report):
    text = page(report, log())
    for row in (row for _, row in report):
        assert row.name.replace("'", "&#39;") in text
        assert row.verdict.replace("'", "&#39;") in text
    for word in ("single_double_quote", "Drori 2026", "full activation patch", "3 M tokens"):
        assert word in text


def test_the_page_needs_no_network_and_is_small(report):
    text = page(report, log())
    assert not re.search(r"https?:|//\w|@import|url\(|src=|<link", text)
    assert len(text.encode()) < 400_000


def test_every_tag_is_closed(report):
    class Checker(HTMLParser):
        stack: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in VOID:
                self.stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in VOID:
                assert self.stack.pop() == tag

    checker = Checker()
    checker.feed(page(report, log()))
    assert checker.stack == []


def test_tokens_cannot_break_out_of_the_page(report):
    evil = '</script><script>alert(1)</script>"onload="x'
    g = graph()
    g["nodes"][0]["id"] = evil
    g["edges"], g["links"], g["name"] = [], [], evil
    rows = {evil: (replace(report.sections["Bridges"][0], name=evil, control_name=evil),)}
    bad = Report(
        title=evil,
        sections=rows,
        graphs=(g,),
        notes=(evil,),
        provenance={"command": evil, "run": {"dense": {"name": evil}}},
    )
    text = page(bad, [{"step": i, f"{evil}/x": float(i)} for i in range(3)])
    assert "alert(1)</script>" not in text and '"onload=' not in text
    assert text.count("<script>") == text.count("</script>") == 1


def test_a_page_that_would_be_too_large_leaves_the_graphs_out_and_says_so(report):
    huge = replace(report, graphs=(graph(110),))
    text = page(huge)
    assert len(text.encode()) < LIMIT and "graphs were left out" in text
    assert "graphs were left out" not in page(report)


def test_a_report_without_circuits_log_or_notes_is_still_a_page(report):
    bare = Report(title="only bridges", sections={"Bridges": report.sections["Bridges"]})
    assert "untrained bridges" in page(bare)


def test_the_training_log_is_grouped_thinned_and_logarithmic_where_it_spans_much():
    lines = [*log(), {"step": 5, "loss/ce": float("nan")}, {"event": "resumed"}]
    charts = {chart["name"]: chart for chart in training_charts(lines)}
    assert set(charts) == {"loss", "lr", "density"}
    assert all(line["path"].count("L") <= 310 for line in charts["loss"]["lines"])
    assert not charts["loss"]["log"]
    wide = training_charts([{"step": i, "lr/a": 10.0**-i} for i in range(4)])
    assert wide[0]["log"] and [text for _, text in wide[0]["y_ticks"]][-1] == "1"


def test_a_scale_maps_its_ends_and_its_ticks_lie_inside():
    for values, log_ in (([0.0, 3.7], False), ([2.0, 2.0], False), ([1e-4, 30.0], True)):
        scale = Scale(values, 100, 0, log_)
        assert scale(scale.low) == 100 and scale(scale.high) == 0
        assert scale.ticks() and all(0 <= at <= 100 for at, _ in scale.ticks())


def test_the_graph_is_laid_out_in_forward_order_without_overlap():
    g = graph(12)
    layout = graph_layout(g)
    place = {n["id"]: (n["x"], n["y"]) for n in layout["nodes"]}
    assert len(set(place.values())) == len(g["nodes"])
    assert all(place[e["source"]][0] < place[e["target"]][0] for e in g["edges"])
    assert all(0 < x < layout["width"] and 0 < y < layout["height"] for x, y in place.values())


def test_the_page_is_written_whole(report, tmp_path):
    path = save_page(report, tmp_path / "report.html", log())
    assert path.read_text(encoding="utf-8") == page(report, log())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# The page is never wider than its window: text wraps, and what is wide scrolls in its own box. A
# browser at 1000 and 390 pixels agreed with these laws when they were written; here they are read
# off the style sheet, so that no browser is needed.

BOXES = (".wide", ".circuit", "pre")  # what scrolls by itself
MAY_NOT_WRAP = (".num", "th")  # short, or inside .wide


def faults(text: str) -> list[str]:
    """What could make the page of this template scroll sideways."""
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    rules: dict[str, str] = {}
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        for selector in selectors.split(","):
            rules[selector.strip()] = rules.get(selector.strip(), "") + body
    found = [
        f"{selector} does not wrap"
        for selector, body in rules.items()
        if "nowrap" in re.findall(r"white-space:\s*(\w+)", body) and selector not in MAY_NOT_WRAP
    ]
    found += [f"{box} does not scroll" for box in BOXES if "overflow-x: auto" not in rules[box]]
    if "overflow-wrap: anywhere" not in rules["body"]:
        found.append("a long word does not break")
    if not {"display: flex", "flex-wrap: wrap"} <= {x.strip() for x in rules[".facts"].split(";")}:
        found.append("the facts do not wrap")
    markup = text[text.index("</style>") :]
    if markup.count("<table>") != markup.count('<div class="wide"><table>'):
        found.append("a table stands outside .wide")
    if markup.count('aria-label="circuit for') != markup.count('<div class="circuit"><svg'):
        found.append("a circuit stands outside .circuit")
    return found


def test_nothing_makes_the_page_wider_than_its_window():
    assert faults(TEMPLATE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("was", "becomes", "says"),
    [
        (".facts span { ", ".facts span { white-space: nowrap; ", ".facts span does not wrap"),
        ("flex-wrap: wrap; gap: 2px 20px", "gap: 2px 20px", "the facts do not wrap"),
        (".wide { overflow-x: auto; }", ".wide { }", ".wide does not scroll"),
        ("border-radius: 8px; overflow-x: auto;", "border-radius: 8px;", "pre does not scroll"),
        ("overflow-wrap: anywhere;\n}", "}", "a long word does not break"),
        ('<div class="wide"><table>', "<table>", "a table stands outside .wide"),
    ],
)
def test_what_would_make_it_wider_is_seen(was, becomes, says):
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count(was) == 1
    assert faults(text.replace(was, becomes)) == [says]
