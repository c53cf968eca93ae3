"""Numbers and rows as text."""

from __future__ import annotations

from evals.scores.score import Score

COLUMNS = ("measurement", "value", "control", "difference ± s.e.", "n", "verdict")


def number(x: int | float) -> str:
    """Return `x` as text with three significant digits; whole numbers keep all their digits."""
    if x == int(x) and abs(x) < 1e6:
        return f"{x:.0f}"
    return f"{x:.2e}" if not 1e-3 <= abs(x) < 1e5 else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def cells(row: Score) -> tuple[str, ...]:
    """Return the cells of a row, in the order of COLUMNS."""
    error = f"{row.gap:+.3g} ± {row.stderr:.2g}" if row.n > 1 else f"{row.gap:+.3g}"
    name = f"{row.name} ({row.unit}, {row.better} is better)"
    return name, number(row.value), number(row.control), error, str(row.n), row.verdict
