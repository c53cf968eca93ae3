"""Numbers, rows and claims as text."""

from __future__ import annotations

from collections.abc import Sequence

from evals.scores.score import Score
from evals.scores.verdict import Claim, Condition, Kind, false_positives, q_values

COLUMNS = (
    "measurement",
    "value",
    "control",
    "difference ± s.e.",
    "95 % interval",
    "n",
    "what the control is",
)
SIDES = "lrrrrrl"
"""For each of COLUMNS, whether its texts stand to the left or to the right."""
CLAIM_COLUMNS = ("task", "claim", "number", "what decides", "verdict", "q")
CLAIM_SIDES = "lllllr"
MEASURES: dict[Kind, str] = {
    "sufficient": "loss",
    "necessary": "harm",
    "carries": "share",
    "needed": "harm",
}
"""What the number of a claim is."""


def number(x: int | float) -> str:
    """Return `x` as text with three significant digits; whole numbers keep all their digits."""
    if x == int(x) and abs(x) < 1e6:
        return f"{x:.0f}"
    return f"{x:.2e}" if not 1e-3 <= abs(x) < 1e5 else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def signed(x: int | float) -> str:
    """Return `x` as `number` does, with its sign."""
    return f"{'-' if x < 0 else '+'}{number(abs(x))}"


def with_unit(x: int | float, unit: str) -> str:
    """Return a number and its unit; a fraction has none."""
    return number(x) if unit == "fraction" else f"{number(x)} {unit}"


def cells(row: Score) -> tuple[str, ...]:
    """Return the cells of a row, in the order of COLUMNS: facts alone, no verdict."""
    several = row.n > 1
    error = f"{row.gap:+.3g} ± {row.stderr:.2g}" if several else signed(row.gap)
    interval = f"{row.interval[0]:+.3g} to {row.interval[1]:+.3g}" if several else "–"
    name = f"{row.name} ({row.unit}, {row.better} is better)"
    numbers = number(row.value), number(row.control), error, interval, str(row.n)
    return name, *numbers, control_facts(row)


def control_facts(row: Score) -> str:
    """Return what the control of a row is, and how many of its draws the value is beyond."""
    side = "above" if row.better == "higher" else "below"
    count = f"{side} {row.rank} of {row.n_draws} " if row.n_draws > 1 else ""
    worse = "; worse than the mean" if "_fvu" in row.key and row.value > 1 else ""
    return f"{count}{row.control_name}{worse}"


def claim_number(claim: Claim) -> str:
    """Return what a claim measured, such as "share 0.68"."""
    return f"{MEASURES[claim.kind]} {with_unit(claim.value, claim.unit)}"


def decides(condition: Condition) -> str:
    """Return a condition with its numbers: the claim's, and what it is beside."""
    if condition.p is not None:
        return f"{condition.name}: p = {number(condition.p)}, {len(condition.draws)} draws"
    beside = {"threshold": "the limit ", "premise": "the limit "}.get(condition.test, "")
    numbers = f"{number(condition.value)} beside {beside}"
    return f"{condition.name}: {numbers}{with_unit(condition.against, condition.unit)}"


def claim_cells(claims: Sequence[Claim]) -> list[tuple[str, ...]]:
    """Return the cells of every claim, in the order of CLAIM_COLUMNS."""
    q = q_values(claims)
    return [
        (
            claim.task,
            claim.statement,
            claim_number(claim),
            decides(claim.hardest),
            claim.outcome,
            number(q[claim.key]) if claim.key in q else "–",
        )
        for claim in claims
    ]


def chance(claims: Sequence[Claim]) -> str:
    """Return how many positive claims chance alone would give."""
    return (
        f"Expected number of false positives: at most {number(false_positives(claims))} of "
        f"{len(claims)} claims, were all of them empty. q is p adjusted for the number of claims "
        "(Benjamini and Hochberg)."
    )
