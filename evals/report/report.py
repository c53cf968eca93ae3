"""The report of a run: claims and their verdicts, the rows behind them, and where they came from.

A claim has one verdict (`Claim`). A row is one `Score`, a number beside its control, without one.
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
from evals.scores.pictures import Pictures
from evals.scores.score import Score
from evals.scores.verdict import Claim
from sparse.storage.atomic import replace_files
from sparse.storage.records import checked

from . import schema_1
from .cells import (
    CLAIM_COLUMNS,
    CLAIM_SIDES,
    COLUMNS,
    SIDES,
    cells,
    chance,
    claim_cells,
    claim_number,
    number,
)
from .replay import replayed

SCHEMA_VERSION = 3
READS = (1, 2, SCHEMA_VERSION)
"""Versions of report.json that can be read. Those of schema 1 and 2 have no claims, of the pictures
only the curves, and a verdict in words for every row, which is left behind. Scores of schema 1 have
no key and no outcome; both are made when such a file is read (schema_1.py)."""

CAVEAT = (
    "A circuit that passes these tests is sufficient and necessary under the ablations named here; "
    "it need not be how the model computes the answer. Circuits can reach low loss on nonsense "
    "tasks and still look interpretable (Drori 2026, Weight-Sparse Circuits May Be Interpretable "
    "Yet Unfaithful). A claim is only as good as the conditions that could have refuted it: read "
    "the reason of its verdict, and every row beside its control."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything measured on one run: what was claimed, and each number beside its control."""

    title: str
    claims: tuple[Claim, ...] = ()
    """What was said of each circuit, with its verdict."""
    sections: dict[str, tuple[Score, ...]]
    """Heading to rows, in reading order."""
    pictures: Pictures = field(default_factory=Pictures)
    """What the figures are drawn from."""
    graphs: tuple[dict[str, Any], ...] = ()
    """Circuits to draw: name, nodes (id, location, layer), edges (source, target, weight)."""
    notes: tuple[str, ...] = ()
    """What a reader must know before believing the numbers."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, seeds, fingerprints, the command, the run's manifest; plain JSON."""

    def __post_init__(self) -> None:
        keys = [claim.key for claim in self.claims]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"Report: the claims {twice} stand twice; a task has one of each kind")
        for heading, rows in self.sections.items():
            for what in ("name", "key"):
                said = [getattr(row, what) for row in rows]
                if twice := sorted({x for x in said if said.count(x) > 1}):
                    raise ValueError(
                        f"Report: section {heading!r} has the {what} {twice} twice; rename a row"
                    )

    @property
    def curves(self) -> tuple[Curve, ...]:
        """The curves among the pictures."""
        return self.pictures.curves

    def __str__(self) -> str:
        return table(self)

    def __iter__(self) -> Iterator[tuple[str, Score]]:
        return ((heading, row) for heading, rows in self.sections.items() for row in rows)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.sections.values())

    def to_json(self) -> str:
        """Return the whole report as JSON; `from_json` reads it back."""
        values = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "claims": [claim.to_dict() for claim in self.claims],
            "sections": {h: [row.to_dict() for row in rows] for h, rows in self.sections.items()},
            "pictures": self.pictures.to_dict(),
            "graphs": list(self.graphs),
            "notes": list(self.notes),
            "provenance": self.provenance,
        }
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that `to_json` wrote.

        Reports of schema 1 and 2 are read too (READS). Raises ValueError for another schema
        version, for unknown or missing keys, and where a verdict contradicts its numbers.
        """
        values = json.loads(text)
        found = values.pop("schema_version", None) if isinstance(values, dict) else None
        if isinstance(found, bool) or found not in READS:
            raise ValueError(
                f"this report has schema version {found}, this library reads {READS}; "
                "run `python -m evals RUN_DIR` again"
            )
        if found < SCHEMA_VERSION:
            values = _from_older(values, found)
        values = checked(cls, values, "report", complete=True)
        lacking = ("outcome",) if found == 1 else ()
        sections = {
            heading: tuple(Score.from_dict(row, lacking) for row in rows)
            for heading, rows in values["sections"].items()
        }
        made = {"sections": sections, "pictures": Pictures.from_dict(values["pictures"])}
        made["claims"] = tuple(map(Claim.from_dict, values["claims"]))
        plain = {"graphs": tuple(values["graphs"]), "notes": tuple(values["notes"])}
        return cls(**{**values, **plain, **made})

    def to_markdown(self) -> str:
        """Return claims, tables, notes and provenance as GitHub Markdown."""
        lines = [f"# {_cell(self.title)}", ""]
        if self.claims:
            lines += [
                "## Claims",
                "",
                *_rows([CLAIM_COLUMNS, *claim_cells(self.claims)], CLAIM_SIDES),
            ]
            lines += [chance(self.claims), ""]
            told = [c for c in self.claims if c.reason]
            lines += [f"- {_cell(f'{c.task}, {c.kind}: {c.outcome}. {c.reason}')}" for c in told]
            lines += [""] if told else []
        for heading, rows in self.sections.items():
            lines += [f"## {_cell(heading)}", "", *_rows([COLUMNS, *map(cells, rows)], SIDES)]
        lines += ["## What these numbers do not mean", "", CAVEAT, ""]
        if self.notes:
            lines += ["## Notes", "", *(f"- {_cell(note)}" for note in self.notes), ""]
        shown = json.dumps(self.provenance, indent=1)
        return "\n".join([*lines, "## Provenance", "", "```json", shown, "```", ""])

    def verify(self, run: Any, tolerance: float = 1e-4) -> list[str]:
        """Measure the report again on its run, and return what differs in words; [] if nothing.

        The run is measured for the report's tasks, with the settings of its provenance. Claims,
        their conditions and the rows are compared. Numbers may differ by `tolerance`, above 1 by
        that share of themselves. Takes as long as the evaluation did. Raises ValueError where the
        settings are not recorded.

        >>> from bridges import load_run
        >>> from evals import evaluate_run
        >>> run = load_run("tiny")
        >>> evaluate_run(run, tasks=[], quick=True).verify(run)  # the bridges alone
        []
        """
        return replayed(self, run, tolerance)

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


def _from_older(values: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return the values of a report of schema 1 or 2 as those of today; unknown keys stay."""
    values = dict(values)
    sections = {
        heading: [{k: v for k, v in row.items() if k != "verdict"} for row in rows]
        for heading, rows in values.get("sections", {}).items()
    }
    if version == 1:
        sections = {heading: schema_1.with_keys(rows) for heading, rows in sections.items()}
    pictures = Pictures().to_dict() | {"curves": values.pop("curves", [])}
    return values | {"claims": [], "sections": sections, "pictures": pictures}


def _rows(rows: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Return a Markdown table, its first row the head; `sides` as in `_aligned`."""
    head, *body = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    rule = "".join("---|" if side == "l" else "--:|" for side in sides)
    return [head, f"|{rule}", *body, ""]


def table(report: Report) -> str:
    """Return the report as plain text: a line for each claim, then one for each row of numbers.

    Below a claim that is not positive stands why. Rows have the cells of COLUMNS.

    >>> from evals import Report, Score, table
    >>> loss = dict(name="loss", unit="nats", value=0.1, control=0.7, stderr=0.01, n=64)
    >>> row = Score(**loss, better="lower", control_name="others")
    >>> print(table(Report(title="A report", sections={"A task": (row,)})).splitlines()[-1])
    loss (nats, lower is better)    0.1      0.7        -0.6 ± 0.01  -0.62 to -0.58  64  others
    """
    lines = [report.title, ""]
    if report.claims:
        head, *claims = _aligned([CLAIM_COLUMNS, *claim_cells(report.claims)], CLAIM_SIDES)
        lines += [head]
        for line, claim in zip(claims, report.claims, strict=True):
            lines += [line, *([f"    {claim.reason}"] if claim.reason else [])]
        lines += ["", chance(report.claims), ""]
    body = [COLUMNS, *(cells(row) for _, row in report)]
    head, *rows = _aligned(body, SIDES)
    lines.append(head)
    for heading, own in report.sections.items():
        lines += ["", heading, *rows[: len(own)]]
        rows = rows[len(own) :]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Return rows of cells as lines; `sides` says for each column whether it is left or right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    wanted = list(zip(widths, sides, strict=True))

    def line(row: tuple[str, ...]) -> str:
        fits = [
            text.ljust(width) if side == "l" else text.rjust(width)
            for text, (width, side) in zip(row, wanted, strict=True)
        ]
        return "  ".join(fits).rstrip()

    return [line(row) for row in rows]


def compare(before: Report, after: Report) -> str:
    """Return a plain-text comparison of two reports: how the claims and rows they share changed.

    Claims are matched by kind and task, rows by section and key. A claim has both values, and both
    verdicts where these differ. What only one report has is listed last.
    """
    lines = [f"{before.title}  ->  {after.title}"]
    was, now = ({claim.key: claim for claim in report.claims} for report in (before, after))
    for key in [key for key in was if key in now]:
        a, b = was[key], now[key]
        verdict = b.outcome if a.outcome == b.outcome else f"{a.outcome} -> {b.outcome}"
        lines.append(f"{key}: {claim_number(a)} -> {claim_number(b)} ({verdict})")
    old, new = ({(heading, row.key): row for heading, row in report} for report in (before, after))
    for place in [place for place in old if place in new]:
        a, b = old[place], new[place]
        change = b.value - a.value
        good = change == 0 or (change > 0) == (b.better == "higher")
        word = "same" if change == 0 else "better" if good else "worse"
        numbers = f"{number(a.value)} -> {number(b.value)} {a.unit} ({word})"
        lines.append(f"{place[0]} / {b.name}: {numbers}")
    for word, own, other in (("only before", was, now), ("only after", now, was)):
        lines += [f"{word}: {key} ({own[key].outcome})" for key in own if key not in other]
    for word, mine, others in (("only before", old, new), ("only after", new, old)):
        only = sorted(mine.keys() - others.keys())
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
