"""Measure a report again on its run, and say where the two differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from evals.scores.score import Score
from evals.scores.verdict import Claim

SETTINGS = ("draws", "max_pairs", "facts", "seed", "quick")
"""The settings of `evaluate_run` that a report records in its provenance."""
EVALUATE = "evals.evaluate"
"""What measures a run. It stands a floor above reports and makes them, so it is named here and only
imported when a report is verified."""
IN_THE_TWIN = ": the circuit in the sparse model"
"""How the heading of a circuit's section ends; the task's name stands before it."""


def tasks_of(report: Any) -> list[str]:
    """Return the tasks that a report is about, in its order."""
    asked = [claim.task for claim in report.claims]
    asked += [h.removesuffix(IN_THE_TWIN) for h in report.sections if h.endswith(IN_THE_TWIN)]
    return list(dict.fromkeys(asked))


def replayed(report: Any, run: Any, tolerance: float) -> list[str]:
    """Measure the report's tasks on `run` again, with its settings; return what differs in words.

    Raises ValueError where the report does not say how it was made.
    """
    facts = report.provenance
    if missing := [name for name in SETTINGS if name not in facts]:
        raise ValueError(
            f"the report {report.title!r} does not record {missing} in its provenance, so it "
            "cannot be measured again the same way; run the evaluation anew"
        )
    settings = {name: facts[name] for name in SETTINGS}
    other = list(_other_models(facts.get("run", {}), run.manifest))
    again = import_module(EVALUATE).evaluate_run(run, tasks=tasks_of(report), **settings)
    return other + differences(report, again, tolerance)


def differences(report: Any, again: Any, tolerance: float) -> list[str]:
    """Return where two reports differ by more than `tolerance`, relative above 1, in words."""
    old, new = ({claim.key: claim for claim in r.claims} for r in (report, again))
    said = list(_only("claim", old, new))
    for key in [key for key in old if key in new]:
        said += _claims_differ(old[key], new[key], tolerance)
    rows, anew = ({(h, row.key): row for h, row in r} for r in (report, again))
    said += _only("row", *({f"{h} / {k}": 0 for h, k in both} for both in (rows, anew)))
    for place in [place for place in rows if place in anew]:
        said += _rows_differ(" / ".join(place), rows[place], anew[place], tolerance)
    return said


def _other_models(recorded: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    for model in ("dense", "sparse"):
        was = recorded.get(model, {}).get("fingerprint")
        now = manifest.get(model, {}).get("fingerprint")
        if was != now:
            yield f"the {model} model of the run is another one: fingerprint {was} -> {now}"


def _only(what: str, old: Iterable[str], new: Iterable[str]) -> Iterator[str]:
    old, new = set(old), set(new)
    yield from (f"{what} {key}: only in the report" for key in sorted(old - new))
    yield from (f"{what} {key}: not in the report" for key in sorted(new - old))


def _claims_differ(a: Claim, b: Claim, tolerance: float) -> Iterator[str]:
    where = f"claim {a.key}"
    if a.outcome != b.outcome:
        yield f"{where}: outcome {a.outcome} -> {b.outcome}"
    yield from _numbers(where, {"value": (a.value, b.value)}, tolerance)
    old, new = ({c.key: c for c in claim.conditions} for claim in (a, b))
    yield from _only(f"{where}, condition", old, new)
    for key in [key for key in old if key in new]:
        c, d = old[key], new[key]
        if c.state != d.state:
            yield f"{where}, condition {key}: {c.state} -> {d.state}"
        pairs = {"value": (c.value, d.value), "against": (c.against, d.against)}
        yield from _numbers(f"{where}, condition {key}", pairs, tolerance)
        yield from _many(f"{where}, condition {key}", "draws", c.draws, d.draws, tolerance)
        ends = c.interval or (), d.interval or ()
        yield from _many(f"{where}, condition {key}", "interval", *ends, tolerance)


def _rows_differ(where: str, a: Score, b: Score, tolerance: float) -> Iterator[str]:
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ("value", "stderr", "n")}
    yield from _numbers(f"row {where}", pairs, tolerance)
    yield from _many(f"row {where}", "draws", a.draws, b.draws, tolerance)
    yield from _many(f"row {where}", "interval", a.interval, b.interval, tolerance)


def _numbers(
    where: str, pairs: Mapping[str, tuple[float, float]], tolerance: float
) -> Iterator[str]:
    for name, (a, b) in pairs.items():
        if abs(a - b) > tolerance * max(1, abs(a), abs(b)):
            yield f"{where}: {name} {a:.6g} -> {b:.6g}"


def _many(
    where: str, name: str, a: tuple[float, ...], b: tuple[float, ...], tolerance: float
) -> Iterator[str]:
    if len(a) != len(b):
        yield f"{where}: {len(a)} {name} -> {len(b)}"
        return
    far = {f"{name} {i}": (x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))}
    yield from list(_numbers(where, far, tolerance))[:1]  # the first is enough to find the others
