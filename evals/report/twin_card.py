"""The model card of a run's twin: what the report measured of it, each number with its control."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from evals.scores.score import Score
from sparse.storage.card import Card, Metric

from .cells import claim_number
from .replay import IN_THE_TWIN
from .report import CAVEAT, Report

TOLD = ("circuit.sufficiency", "circuit.necessity", "circuit.nodes", "circuit.nonsense")
"""The rows of such a section that the card repeats, by how their keys begin."""
WHERE = (
    "The run's report.md has every number with its standard error and its control, and every claim "
    "with the reason of its verdict."
)
QUICK = "The report was a quick one, on fewer blocks than the run holds out."


def twin_card(report: Report, license: str = "unknown") -> Card:
    """Return the model card of the twin that `report` measured.

    How the twin was trained is taken from the run's manifest; where the manifest lacks something
    the card says that it was not recorded. The fingerprint is that of the measured weights.
    """
    run = report.provenance.get("run", {})
    asked, command = run.get("arguments"), run.get("command")
    sizes = {name: _count(asked, name) for name in ("steps", "batch", "length", "seed")}
    read = [sizes[name] for name in ("steps", "batch", "length")]
    hints = [QUICK] if report.provenance.get("quick") else []
    hints += [f"- {note}" for note in report.notes]
    return Card(
        command=command if isinstance(command, str) and command.strip() else "# not recorded",
        data=_text(run.get("data")),
        tokens=None if None in read else prod(n for n in read if n is not None),
        steps=sizes["steps"],
        seed=sizes["seed"],
        metrics=(*_twin(report), *_circuits(report)),
        fingerprint=run.get("sparse", {}).get("fingerprint", ""),
        license=license,
        twin_of=run.get("dense", {}).get("name", ""),
        notes="\n".join([WHERE, "", *_claims(report), CAVEAT, "", *hints]),
    )


def _count(asked: Any, name: str) -> int | None:
    """Return a whole number from the arguments of a run, which may be written in any form."""
    value = asked.get(name) if isinstance(asked, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(data: Any) -> str:
    """Return the name of the training text and the beginning of its hash, as far as recorded."""
    if isinstance(data, str) and data.strip():
        return data
    facts = data if isinstance(data, dict) else {}
    name, mark = facts.get("name") or "not recorded", facts.get("fingerprint")
    return f"{name}, sha256 {str(mark)[:16]}" if mark else str(name)


def _claims(report: Report) -> list[str]:
    """Return what was claimed of the circuits as a list: the claim, its outcome, its number."""
    said = [
        f"- {claim.task}: {claim.statement}: **{claim.outcome}**, {claim_number(claim)}"
        for claim in report.claims
    ]
    return ["What was claimed of its circuits, and the verdict:", "", *said, ""] if said else []


def _twin(report: Report) -> Iterator[Metric]:
    """Yield how well the twin predicts held-out text and how near it is to the dense model."""
    rows = {row.key: row for row in report.sections.get("Bridges", ())}
    if own := rows.get("bridge.ce.sparse"):
        name = f"held-out cross entropy, mean over {own.n} blocks"
        yield _metric(name, own)
        if dense := rows.get("bridge.ce.dense"):
            yield Metric(
                name=name,
                value=own.value,
                unit=own.unit,
                control="the dense model",
                control_value=dense.value,
            )
    if kl := rows.get("bridge.kl"):
        yield _metric(f"held-out KL(dense || sparse), mean over {kl.n} blocks", kl)


def _circuits(report: Report) -> Iterator[Metric]:
    """Yield size and losses of every circuit, each beside its control (TOLD)."""
    for heading, row in report:
        if heading.endswith(IN_THE_TWIN) and row.key.startswith(TOLD):
            mean = f", mean over {row.n} pairs" if row.n > 1 else ""
            task = heading.removesuffix(IN_THE_TWIN)
            yield _metric(f"{task}: {row.name}, {row.better} is better{mean}", row)


def _metric(name: str, row: Score) -> Metric:
    several = f"mean of {row.n_draws} " if row.n_draws > 1 else ""
    return Metric(
        name=name,
        value=row.value,
        unit=row.unit,
        control=f"{several}{row.control_name or 'its control'}",
        control_value=row.control,
    )
