"""The report of a run: scores in sections, where they came from, and a way to compare two reports.

A row of a report is one `Score`: a number beside its control.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evals.scores.curve import Curve
from evals.scores.score import Score
from sparse.storage.atomic import replace_files
from sparse.storage.records import checked

from . import schema_1
from .cells import COLUMNS, cells, number

SCHEMA_VERSION = 2
READS = (1, SCHEMA_VERSION)
"""Versions of report.json that can be read. Scores of schema 1 have no key and no outcome; both are
made when such a file is read (schema_1.py)."""

CAVEAT = (
    "A circuit that passes these tests is sufficient and necessary under the ablations named here; "
    "it need not be how the model computes the answer. Circuits can reach low loss on nonsense "
    "tasks and still look interpretable (Drori 2026, Weight-Sparse Circuits May Be Interpretable "
    "Yet Unfaithful): read every row beside its control, and the nonsense twin first."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything measured on one run, each number beside its control."""

    title: str
    sections: dict[str, tuple[Score, ...]]
    """Heading to rows, in reading order."""
    curves: tuple[Curve, ...] = ()
    graphs: tuple[dict[str, Any], ...] = ()
    """Circuits to draw: name, nodes (id, location, layer), edges (source, target, weight)."""
    notes: tuple[str, ...] = ()
    """What a reader must know before believing the numbers."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, seeds, fingerprints, the command, the run's manifest; plain JSON."""

    def __post_init__(self) -> None:
        for heading, rows in self.sections.items():
            for what in ("name", "key"):
                said = [getattr(row, what) for row in rows]
                if twice := sorted({x for x in said if said.count(x) > 1}):
                    raise ValueError(
                        f"Report: section {heading!r} has the {what} {twice} twice; rename a row"
                    )

    def __iter__(self) -> Iterator[tuple[str, Score]]:
        return ((heading, row) for heading, rows in self.sections.items() for row in rows)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.sections.values())

    def to_json(self) -> str:
        """Return the whole report as JSON; `from_json` reads it back."""
        values = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "sections": {h: [row.to_dict() for row in rows] for h, rows in self.sections.items()},
            "curves": [curve.to_dict() for curve in self.curves],
            "graphs": list(self.graphs),
            "notes": list(self.notes),
            "provenance": self.provenance,
        }
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that `to_json` wrote.

        Reports of schema 1 are read too. Raises ValueError for another schema version and for
        unknown or missing keys.
        """
        values = json.loads(text)
        found = values.pop("schema_version", None) if isinstance(values, dict) else None
        if isinstance(found, bool) or found not in READS:
            raise ValueError(
                f"this report has schema version {found}, this library reads {READS}; "
                "run `python -m evals RUN_DIR` again"
            )
        values = checked(cls, values, "report", complete=True)
        read = _scores if found == SCHEMA_VERSION else _scores_of_schema_1
        sections = {heading: read(rows) for heading, rows in values["sections"].items()}
        curves = tuple(Curve.from_dict(curve) for curve in values["curves"])
        plain = {"graphs": tuple(values["graphs"]), "notes": tuple(values["notes"])}
        return cls(**{**values, **plain, "sections": sections, "curves": curves})

    def to_markdown(self) -> str:
        """Return the tables, the notes and the provenance as GitHub Markdown."""
        lines = [f"# {_cell(self.title)}", ""]
        for heading, rows in self.sections.items():
            lines += [f"## {_cell(heading)}", "", "| " + " | ".join(COLUMNS) + " |"]
            lines += ["|---|--:|--:|--:|--:|---|"]
            lines += ["| " + " | ".join(map(_cell, cells(row))) + " |" for row in rows] + [""]
        lines += ["## What these numbers do not mean", "", CAVEAT, ""]
        if self.notes:
            lines += ["## Notes", "", *(f"- {_cell(note)}" for note in self.notes), ""]
        shown = json.dumps(self.provenance, indent=1)
        return "\n".join([*lines, "## Provenance", "", "```json", shown, "```", ""])

    def save(self, folder: str | Path, extra: Mapping[str, str] | None = None) -> list[Path]:
        """Write report.json, report.md and the `extra` files (name to text); return their paths.

        Either all of them are written, or what was there before stays.
        """
        texts = {"report.json": self.to_json(), "report.md": self.to_markdown()}
        return write_all(Path(folder), texts | dict(extra or {}))

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read report.json from a run folder."""
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise ValueError(f"no report.json in {folder}; write one: python -m evals {folder}")
        return cls.from_json(path.read_text(encoding="utf-8"))


def _scores(rows: Sequence[Mapping[str, Any]]) -> tuple[Score, ...]:
    return tuple(Score.from_dict(row) for row in rows)


def _scores_of_schema_1(rows: Sequence[Mapping[str, Any]]) -> tuple[Score, ...]:
    return tuple(Score.from_dict(row, lacking=("outcome",)) for row in schema_1.with_keys(rows))


def table(report: Report) -> str:
    """Return the report as a plain-text table, a line for each row with the cells of COLUMNS.

    >>> from evals import Report, Score, table
    >>> loss = dict(name="loss", unit="nats", value=0.1, control=0.7, stderr=0.01, n=64)
    >>> row = Score(**loss, better="lower")
    >>> print(table(Report(title="A report", sections={"A claim": (row,)})).splitlines()[-1])
    loss (nats, lower is better)    0.1      0.7        -0.6 ± 0.01  64  better than its control
    """
    body = {heading: [cells(row) for row in rows] for heading, rows in report.sections.items()}
    every = [COLUMNS, *(row for rows in body.values() for row in rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(COLUMNS) - 1)]

    def line(row: tuple[str, ...]) -> str:
        right = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *right, row[-1]]).rstrip()

    lines = [report.title, "", line(COLUMNS)]
    for heading, rows in body.items():
        lines += ["", heading, *map(line, rows)]
    return "\n".join(lines)


def compare(before: Report, after: Report) -> str:
    """Return a plain-text comparison of two reports: how the rows they share have changed.

    Rows are matched by section and key. A row has both values, and both verdicts where these
    differ. Rows that only one report has are listed last.
    """
    old = {(heading, row.key): row for heading, row in before}
    new = {(heading, row.key): row for heading, row in after}
    lines = [f"{before.title}  ->  {after.title}"]
    for key in [key for key in old if key in new]:
        a, b = old[key], new[key]
        change = b.value - a.value
        good = change == 0 or (change > 0) == (b.better == "higher")
        word = "same" if change == 0 else "better" if good else "worse"
        lines.append(
            f"{key[0]} / {b.name}: {number(a.value)} -> {number(b.value)} {a.unit} ({word})"
        )
        if a.verdict != b.verdict:
            lines.append(f"    {a.verdict} -> {b.verdict}")
    for word, mine, other in (("only before", old, new), ("only after", new, old)):
        only = sorted(mine.keys() - other.keys())
        lines += [f"{word}: {heading} / {mine[heading, key].name}" for heading, key in only]
    return "\n".join(lines)


def provenance(**facts: Any) -> dict[str, Any]:
    """Return where a report comes from: versions, machine, command and time, and `facts`."""
    versions = {"python": platform.python_version()}
    for package in ("sparse-bridges", "torch", "transformers", "accelerate", "nnsight"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"versions": versions, "platform": platform.platform(), "time": when} | {
        "command": command,
        **facts,
    }


def write_all(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write every text (by file name) into `folder`, all or none; return their paths."""
    replace_files(folder, texts)
    return [folder / name for name in texts]


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
