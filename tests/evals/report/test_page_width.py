"""The page is never wider than its window: text wraps, and what is wide scrolls in its own box.

A browser at 1000 and 390 pixels agreed with these laws when they were written; here they are read
off the style sheet, so that no browser is needed.
"""

import re

import pytest

from evals.report.page import TEMPLATE

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
