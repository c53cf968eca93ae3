"""What all four claims share: premises, facts, and conditions collected into one verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evals.scores.clusters import fixed
from evals.scores.score import Unit
from evals.scores.verdict import Claim, Condition, Kind, premise
from evals.trials.matched import apart
from sparse.circuits.circuit import Circuit
from sparse.tasks.batch import TaskBatch

LEAST = 0.25
"""Least harm, and least share, that a claim asks for."""


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


def about(batch: TaskBatch) -> dict[str, Any]:
    """Return how many pairs and levels the prompts of a claim have."""
    return {
        "pairs": batch.n_pairs,
        "split": batch.split,
        "levels": batch.levels(),
        "fixed": fixed(batch.groups),
    }


def few_others(circuit: Circuit) -> Iterator[Condition]:
    """Yield a premise that is missed where the model has too few other nodes for a control."""
    if (n := len(apart(circuit, 0))) < len(circuit):
        name = "other nodes, as many at each location, for a control"
        yield premise("room", name, float(n), float(len(circuit)), "nodes", "higher")


def no_namesake(namesakes: Mapping[str, Any]) -> Iterator[Condition]:
    """Yield a premise that is missed where no namesake was given: nothing could have refuted it."""
    if not namesakes:
        name = "circuits found for something else (give namesakes=)"
        yield premise("namesakes", name, 0.0, 1.0, "circuits", "higher")
