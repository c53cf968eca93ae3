"""The report as one HTML file: no network, no server, opens from a disk or a mail.

Everything is inlined and escaped. The figures are those of figures.py, as SVG; a circuit is drawn
by the template; and the script is a little plain JavaScript.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from evals.scores.pictures import Example, Pictures
from evals.scores.score import Score
from evals.scores.verdict import Claim, Verdict
from sparse.circuits.view.layout import graph_layout

from .cells import cells, chance, claim_cells, number
from .replay import tasks_of
from .report import CAVEAT, Report, write_all

TEMPLATE = Path(__file__).with_name("page.html")
LIMIT = 2_000_000
"""Bytes of the page; beyond it the circuit graphs are left out, then the curves, and the page says
so."""
FIGURES = "evals.report.figures"
"""Imported when a page is made, because it needs matplotlib, which may not be there."""
LEGEND = (
    ("verdict", "positive: every condition of the claim holds; negative: one of them fails; cannot "
     "tell: none fails, but one is open, because its interval holds 0, or clusters or draws are "
     "too few. Nothing is corrected within a claim; q is p, corrected across claims"),
    ("share", "how far an edit moves the answer towards that of the other context, as a share of "
     "what the dense model does when it is given the other context: 0 not at all, 1 as far"),
    ("harm", "what ablating nodes does to the task, as a share of the way from the model’s own "
     "loss to that of guessing between the two answers (ln 2 nats): 0 nothing, 1 guessing"),
    ("collateral A", "KL in nats, whole vocabulary, of the edited model from the dense model on "
     "the other context: what an edit changes besides what it should"),
    ("collateral B", "KL in nats of the edited from the untouched model, without the two answers"),
    ("unrelated source", "the context that node values are taken from: of the other kind, of the "
     "same length and with the same two answers, but with other words"),
    ("rival", "a simpler edit, such as the decoded embedding difference or all nodes at once, "
     "scaled until it reaches the circuit’s share: the circuit must do less collateral damage"),
    ("namesake", "a circuit found in the same way for something else: for the nonsense twin of the "
     "task, or for a task of another family. The circuit must do better than it"),
    ("empty control", "the same measurement without the cause, such as random rotations or random "
     "nodes; each draw chooses its own site. p counts the draws that are at least as good"),
    ("reference", "a number to compare with that need not be beaten"),
    ("cluster interval", "95 % interval from resampling what the pairs share, such as their frames "
     "or words; the widest of these is taken. Below 5 clusters there is none"),
    ("cannot tell", "neither shown nor refuted by these pairs; the reason says how many clusters "
     "would tell, where that can be said"),
    ("rows", "numbers beside their control, without a verdict. The difference has its standard "
     "error and 95 % interval over the n independent pairs or blocks, the draws held fixed"),
    ("FVU", "fraction of variance a bridge misses: 0 perfect, 1 no better than the mean"),
)  # fmt: skip
"""What the words of a report mean."""


def page(report: Report, log: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the report, with the curves of the training log, as one self-contained HTML page.

    A page of more than LIMIT bytes is made anew without the circuit graphs, then without curves.
    Without matplotlib it has no figures, and says how to get them.
    """
    drawn = _drawn(report.pictures, log)
    graphs = [graph_layout(graph) for graph in report.graphs]
    text = _render(report, drawn, graphs)
    if len(text.encode()) > LIMIT and graphs:
        text = _render(report, drawn, [])
    if len(text.encode()) > LIMIT:
        text = _render(report, drawn | {"curves": [], "training": []}, [])
    return text


def save_page(report: Report, path: str | Path, log: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page to `path`, whole or not at all, and return the path."""
    path = Path(path)
    return write_all(path.parent, {path.name: page(report, log)})[0]


def _drawn(pictures: Pictures, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures as (name, SVG) by kind; without matplotlib `how` says how to get them."""
    empty: dict[str, Any] = {"scatters": [], "curves": [], "matrices": [], "training": []}
    try:
        made: Any = import_module(FIGURES)
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        some = pictures.scatters or pictures.curves or pictures.matrices or log
        return empty | {"how": str(error) if some else ""}

    def inlined(draw: Callable[[Any], Any], records: Sequence[Any]) -> list[tuple[str, Markup]]:
        return [(record.name, Markup(made.svg(draw(record)))) for record in records]

    return {
        "how": "",
        "scatters": inlined(made.scatter_figure, pictures.scatters),
        "curves": inlined(made.curve_figure, pictures.curves),
        "matrices": inlined(made.matrix_figure, pictures.matrices),
        "training": [
            (f"training: {name}", Markup(made.svg(figure)))
            for name, figure in made.training_figures(log).items()
        ],
    }


def _render(report: Report, drawn: Mapping[str, Any], graphs: Sequence[Mapping[str, Any]]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=report.title,
        facts=_facts(report),
        claims=_claims(report.claims),
        chance=chance(report.claims),
        tasks=_by_task(report, drawn),
        scattered=bool(drawn["scatters"]),
        matrices=drawn["matrices"],
        training=drawn["training"],
        how=drawn["how"],
        curves_left_out=len(report.curves) - len(drawn["curves"]) if not drawn["how"] else 0,
        examples=[_example(example) for example in report.pictures.examples],
        sections=[
            (heading, [_row(row) for row in rows]) for heading, rows in report.sections.items()
        ],
        graphs=graphs,
        graphs_left_out=len(report.graphs) - len(graphs),
        notes=report.notes,
        legend=LEGEND,
        caveat=CAVEAT,
        provenance=json.dumps(report.provenance, indent=2),
    )


STATES: dict[Verdict, str] = {"positive": "good", "negative": "bad", "cannot tell": "open"}
"""How the page marks each verdict."""


def _claims(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Return the claims as the page shows them, `first` where a task begins."""
    lines = []
    for claim, texts in zip(claims, claim_cells(claims), strict=True):
        task, statement, value, decides, outcome, q = texts
        lines.append(
            {
                "task": task,
                "first": not lines or lines[-1]["task"] != task,
                "statement": statement,
                "value": value,
                "decides": decides,
                "outcome": outcome,
                "state": STATES[claim.outcome],
                "q": q,
                "reason": claim.reason,
                "conditions": [(c.name, c.state, _interval(c.interval)) for c in claim.conditions],
                "facts": [(key, _plain(fact)) for key, fact in claim.facts.items()],
            }
        )
    return lines


def _interval(ends: tuple[float, float] | None) -> str:
    return f"difference {ends[0]:+.3g} to {ends[1]:+.3g}" if ends else ""


def _by_task(report: Report, drawn: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """Return the scatters and curves of every task, under its name; the others under ""."""
    tasks = tasks_of(report)
    figures = [*drawn["scatters"], *drawn["curves"]]
    found: dict[str, list[Any]] = {task: [] for task in [*tasks, ""]}
    for name, svg in figures:
        whose = [task for task in tasks if name == task or name.startswith(f"{task}: ")]
        found[max(whose, key=len, default="")].append((name, svg))
    return [(task, own) for task, own in found.items() if own]


def _example(example: Example) -> dict[str, Any]:
    found = {
        "dense model": example.dense,
        "twin": example.twin,
        "circuit alone": example.circuit,
    }
    answers = [
        (model, f"{p:.2f}", example.answer if p > 0.5 else example.other, p > 0.5)
        for model, p in found.items()
    ]
    texts = {"prompt": example.prompt, "answer": example.answer, "other": example.other}
    return {"task": example.task, "models": answers, **texts}


def _row(row: Score) -> dict[str, Any]:
    _, value, control, error, interval, n, facts = cells(row)
    return {
        "name": row.name,
        "unit": f"{row.unit}, {row.better} is better",
        "value": value,
        "control": control,
        "error": error,
        "interval": interval,
        "n": n,
        "facts": facts,
        "strip": _strip(row),
        "detail": [(key, _plain(value)) for key, value in row.detail.items()],
    }


STRIP = 132
"""Pixels of the strip that shows a value among the draws of its control."""


def _strip(row: Score) -> dict[str, Any]:
    """Return the places, in pixels, of the value and of at most about 100 of its draws."""
    low, high = min(row.value, *row.draws), max(row.value, *row.draws)
    wide = high - low or 1.0
    shown = sorted(row.draws)[:: max(1, row.n_draws // 100)]

    def place(x: float) -> float:
        return round(5 + (STRIP - 10) * ((x - low) / wide if high > low else 0.5), 1)

    return {"width": STRIP, "draws": list(map(place, shown)), "value": place(row.value)}


def _plain(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number else json.dumps(value)


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return the few facts of the provenance that a reader wants first."""
    source = report.provenance
    run = source.get("run", {})
    facts = {
        "dense model": run.get("dense", {}).get("name"),
        "text": run.get("data", {}).get("name"),
        "draws of each empty control": source.get("draws"),
        "seed": source.get("seed"),
        "measured": source.get("time"),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]
