"""Collect the conditions of a claim, the cheap ones first, into one verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evals.scores.score import Unit
from evals.scores.verdict import Claim, Condition, Kind


def judged(
    kind: Kind,
    task: str,
    value: float,
    unit: Unit,
    conditions: Iterator[Condition],
    facts: Mapping[str, Any],
    stop_early: bool = False,
) -> Claim:
    """Return the claim with all its conditions.

    `stop_early` leaves out those after the first that does not hold: the claim is not positive
    then, whatever they say.
    """
    found = []
    for condition in conditions:
        found.append(condition)
        if stop_early and condition.state != "holds":
            break
    return Claim(
        kind=kind, task=task, value=value, unit=unit, conditions=tuple(found), facts=dict(facts)
    )
