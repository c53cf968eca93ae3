"""The page: self-contained, escaped, small, and saying what the report says."""

import html
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from evals.report.cells import chance
from evals.report.page import LEGEND, LIMIT, TEMPLATE, page, save_page
from evals.report.report import Report
from evals.scores.pictures import Example, Pictures
from sparse.circuits.view.layout import graph_layout

VOID = {"meta", "line", "path", "circle", "rect", "br"}


@pytest.fixture(scope="module")
def whole(report, log):
    return page(report, log)


def seen(text: str) -> str:
    """The words of a page, without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", text))


def test_the_page_says_what_the_report_says(report, whole):
    text = seen(whole)
    for row in (row for _, row in report):
        assert row.name in text and row.control_name in text
    for word in ("single_double_quote", "Drori 2026", "full activation patch", "3 M tokens"):
        assert word in text
    assert "worse than the mean" in text and "verdict" in text


def test_it_opens_with_every_claim_its_number_its_verdict_and_the_reason(report, whole):
    text = whole
    table = text[text.index('<table class="claims cards">') :]
    table = table[: table.index("</table>")]
    assert text.index("<h1>") < text.index("<table") == text.index('<table class="claims cards">')
    rows = table.split("<tr ")[1:]
    assert len(rows) == len(report.claims) == 12
    for claim, row in zip(report.claims, map(seen, rows), strict=True):
        for said in (claim.statement, claim.outcome, claim.reason, claim.hardest.name):
            assert said in row
    assert chance(report.claims) in seen(text)


def test_its_parts_stand_in_the_order_in_which_they_are_read(report, whole):
    parts = ("Claims", "Effect and collateral damage", "For this task, or for any",
             "Example prompts", "Bridges", "What these numbers do not mean",
             "Where this comes from", "Training", "Circuits")  # fmt: skip
    assert re.findall(r"<h2>(.*?)</h2>", whole) == [
        *parts[:5],
        *(heading for heading in report.sections if heading != "Bridges"),
        *parts[5:],
    ]


def test_the_figures_of_a_task_stand_under_its_name(whole):
    part = whole[whole.index("Effect and collateral") : whole.index("For this task, or for any")]
    for task in ("bracket_counting", "while_return_true"):
        own = part[part.index(f"<h3>{task}</h3>") :].split("<h3>")[1]
        names = re.findall(r'<figure role="img" aria-label="(.*?)"', own)
        assert names == [f"{task}: carried by the dense model", f"{task}: steering the dense model"]


def test_an_example_shows_what_each_model_answers(whole):
    part = whole[whole.index("Example prompts") :]
    (row,) = re.findall(
        r'<tr><td class="task">bracket_counting.{0,500}0\.44</td>.*?</tr>',
        part[: part.index("</table>")],
    )
    shown = re.findall(r"<code>(.*?)</code>", row)
    assert shown == ["items = [(a, b", ")", "]", ")", ")", "]"]  # the circuit alone is wrong
    assert row.count(' wrong"') == 1 and "0.99" not in row


def test_the_legend_explains_the_words_of_the_claims():
    terms = {term for term, _ in LEGEND}
    wanted = {"share", "harm", "collateral A", "collateral B", "namesake", "rival", "empty control"}
    assert wanted | {"unrelated source", "cluster interval", "cannot tell", "verdict"} <= terms


def test_without_matplotlib_the_page_has_its_tables_and_says_once_how_to_get_figures(
    report, log, whole, monkeypatch
):
    assert "sparse-bridges[viz]" not in whole and whole.count("<figure") == 10
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("figures", "drawing"):
        monkeypatch.delitem(sys.modules, f"evals.report.{name}", raising=False)
    text = page(report, log)
    assert text.count("pip install &#34;sparse-bridges[viz]&#34;") == 1
    assert "<figure" not in text and text.count("<table") == whole.count("<table")
    bare = page(Report(title="nothing to draw", sections=report.sections))
    assert "sparse-bridges[viz]" not in bare


def test_the_page_needs_no_network_and_is_small(whole):
    text = whole
    assert not re.search(r"https?:|//\w|@import|url\((?!#)|src=|<link", text)
    assert len(text.encode()) < 400_000


def test_no_id_stands_twice(whole):
    ids = re.findall(r'\bid="([^"]+)"', whole)
    assert len(ids) > 20 and len(set(ids)) == len(ids)


def test_every_tag_is_closed(whole):
    class Checker(HTMLParser):
        stack: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in VOID:
                self.stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in VOID:
                assert self.stack.pop() == tag

    checker = Checker()
    checker.feed(whole)
    assert checker.stack == []


def test_tokens_cannot_break_out_of_the_page(report, graph):
    evil = '</script><script>alert(1)</script>"onload="x'
    g = graph()
    g["nodes"][0]["id"] = evil
    g["edges"], g["links"], g["name"] = [], [], evil
    rows = {evil: (replace(report.sections["Bridges"][0], name=evil, control_name=evil),)}
    (scatter, *_), (curve, *_) = report.pictures.scatters, report.pictures.curves
    points = tuple(replace(point, label=evil) for point in scatter.points)
    example = Example(
        task=evil, prompt=evil, answer=evil, other=evil, dense=0.5, twin=0.5, circuit=0.5
    )
    claim = replace(report.claims[0], task=evil, facts={evil: evil})
    bad = Report(
        title=evil,
        claims=(claim,),
        sections=rows,
        pictures=Pictures(
            scatters=(replace(scatter, name=evil, effect_label=evil, points=points),),
            curves=(replace(curve, name=evil, x_label=evil),),
            matrices=(replace(report.pictures.matrices[0], name=evil, rows=(evil,) * 3),),
            examples=(example,),
        ),
        graphs=(g,),
        notes=(evil,),
        provenance={"command": evil, "run": {"dense": {"name": evil}}},
    )
    text = page(bad, [{"step": i, f"{evil}/x": float(i)} for i in range(3)])
    assert "alert(1)</script>" not in text and not re.search(r'<[^>]*"onload=', text)
    assert text.count("<script>") == text.count("</script>") == 1


def test_a_page_that_would_be_too_large_leaves_out_graphs_then_curves_and_says_so(
    report, graph, whole, monkeypatch
):
    assert "left out to keep" not in whole
    huge = replace(report, graphs=(graph(110),))
    text = page(huge)
    assert len(text.encode()) < LIMIT and "circuit graphs were left out" in text
    assert "curves were left out" not in text
    monkeypatch.setattr(
        "evals.report.page.LIMIT", len(page(replace(report, graphs=())).encode()) - 1
    )
    less = page(report)
    assert "circuit graphs were left out" in less and "curves were left out" in less
    assert "steering the dense model" not in less and "carried by the dense model" in less


def test_a_report_without_circuits_log_or_notes_is_still_a_page(report):
    bare = Report(title="only bridges", sections={"Bridges": report.sections["Bridges"]})
    assert "untrained bridges" in page(bare)


def test_the_graph_is_laid_out_in_forward_order_without_overlap(graph):
    g = graph(12)
    layout = graph_layout(g)
    place = {n["id"]: (n["x"], n["y"]) for n in layout["nodes"]}
    assert len(set(place.values())) == len(g["nodes"])
    assert all(place[e["source"]][0] < place[e["target"]][0] for e in g["edges"])
    assert all(0 < x < layout["width"] and 0 < y < layout["height"] for x, y in place.values())


def test_the_page_is_written_whole(report, log, whole, tmp_path):
    path = save_page(report, tmp_path / "report.html", log)
    assert path.read_text(encoding="utf-8") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# The page is never wider than its window: text wraps, and what is wide scrolls in its own box. A
# browser at 1200 and 400 pixels agreed with these laws when they were written; here they are read
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
    if markup.count("<table") != markup.count('<div class="wide"><table'):
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
        ('<div class="wide"><table class="rows">', "<table>", "a table stands outside .wide"),
    ],
)
def test_what_would_make_it_wider_is_seen(was, becomes, says):
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count(was) == 1
    assert faults(text.replace(was, becomes)) == [says]
