"""The report as one HTML file: no network, no server, opens from a disk or a mail.

Everything is inlined and escaped. The charts are SVG, and the script is a little plain JavaScript.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from evals.scores.score import Outcome, Score
from sparse.circuits.view.layout import graph_layout

from .cells import cells, number
from .charts import effect_chart, strip, training_charts
from .report import CAVEAT, Report, write_all

TEMPLATE = Path(__file__).with_name("page.html")
LIMIT = 2_000_000
"""Bytes of the page; beyond it the circuit graphs are left out, and the page says so."""
LEGEND = (
    ("control", "the same measurement without the cause: random directions of the same length, "
     "random circuits of the same size, bridges that were never trained"),
    ("difference ± s.e.", "value minus the mean of the control's draws, with its standard error "
     "over the n independent pairs or blocks; the draws themselves are held fixed"),
    ("verdict", "“beats” needs both: the 95 % interval of the difference leaves out zero, "
     "and the value outdoes at least 95 % of the draws. It is not corrected for reading many rows"),
    ("sufficiency", "the circuit does the task when everything else is held at its ablation value; "
     "not that the model uses it when nothing is held"),
    ("necessity", "the task fails without these nodes; not that no other part takes part"),
    ("nonsense twin", "the same search on a task without sense; when it does as well, the search "
     "explains anything and this circuit explains nothing"),
    ("v. directions, v. rotations", "a direction drawn anew at every token; or the circuit's own "
     "change turned as a whole, so that its structure stays. The second is the stricter control: "
     "bridges that were never trained can beat the first"),
    ("steering, ablation", "the dense model moves as the circuit says, at one site and for these "
     "prompts; strengths of differently trained bridges cannot be compared"),
    ("FVU", "fraction of variance a bridge misses: 0 perfect, 1 no better than the mean"),
)  # fmt: skip


TELLING = (
    "circuit.sufficiency.mean",
    "circuit.necessity",
    "circuit.nonsense",
    "transfer.ablation.nodes",
    "transfer.steering.one.directions",
    "transfer.steering.one.rotations",
    "bridge.recovered",
    "bridge.kl",
)
"""The rows that the summary shows, by how their keys begin."""


def page(report: Report, log: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the report, with the curves of the training log, as one self-contained HTML page.

    A page of more than LIMIT bytes is made anew without the circuit graphs.
    """
    text = _render(report, log, [graph_layout(graph) for graph in report.graphs])
    if len(text.encode()) > LIMIT:
        text = _render(report, log, [])
    return text


def save_page(report: Report, path: str | Path, log: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page to `path`, whole or not at all, and return the path."""
    path = Path(path)
    return write_all(path.parent, {path.name: page(report, log)})[0]


def _render(report: Report, log: Sequence[Mapping[str, Any]], graphs: list[dict[str, Any]]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=report.title,
        facts=_facts(report),
        summary=_summary(report),
        sections=[
            (heading, [_row(row) for row in rows]) for heading, rows in report.sections.items()
        ],
        effects=[effect_chart(curve) for curve in report.curves],
        training=training_charts(log),
        graphs=graphs,
        graphs_left_out=len(report.graphs) - len(graphs),
        notes=report.notes,
        legend=LEGEND,
        caveat=CAVEAT,
        provenance=json.dumps(report.provenance, indent=2),
    )


STATES: dict[Outcome, str] = {"beats": "good", "worse": "bad", "indistinguishable": "open"}
"""How the page marks each outcome."""


def _row(row: Score) -> dict[str, Any]:
    _, value, control, error, n, verdict = cells(row)
    low, high = (f"{end:+.3g}" for end in row.interval)
    return {
        "name": row.name,
        "unit": f"{row.unit}, {row.better} is better",
        "value": value,
        "control": control,
        "control_name": row.control_name,
        "error": error,
        "interval": f"95 % interval {low} to {high}",
        "n": n,
        "verdict": verdict,
        "state": STATES[row.outcome],
        "strip": strip(row),
        "detail": [(key, _plain(value)) for key, value in row.detail.items()],
    }


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else json.dumps(value)


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return the few facts of the provenance that a reader wants first."""
    source = report.provenance
    run = source.get("run", {})
    facts = {
        "dense model": run.get("dense", {}).get("name"),
        "text": run.get("data", {}).get("name"),
        "random directions per claim": source.get("draws"),
        "seed": source.get("seed"),
        "measured": source.get("time"),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _summary(report: Report) -> list[dict[str, Any]]:
    """Return, for every section, how many rows had each outcome, and the rows that say most."""
    lines = []
    for heading, rows in report.sections.items():
        counts = {word: sum(row.outcome == o for row in rows) for o, word in STATES.items()}
        lines.append({"heading": heading, "n": len(rows), **counts, "rows": _telling(rows)})
    return lines


def _telling(rows: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the rows with which a claim stands or falls (TELLING)."""
    return [_row(row) for row in rows if row.key.startswith(TELLING)]
