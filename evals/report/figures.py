"""The figures of a report by matplotlib: once, for notebook, paper (.svg, .png) and page.

Needs the extra viz: pip install "sparse-bridges[viz]". Importing this file without it says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.scores.curve import Curve
from evals.scores.pictures import Matrix, PointKind, Scatter
from evals.scores.verdict import Claim, Kind, Verdict
from sparse.storage.atomic import replace_files

from .cells import number
from .drawing import (
    BLUE,
    FAINT,
    INK,
    LINE,
    OCHRE,
    ORANGE,
    SERIES,
    SOFT,
    SQUARE,
    TEAL,
    VIOLET,
    Figure,
    Label,
    Rectangle,
    axes,
    beside,
    clean,
    finish,
    png,
    svg,
    svg_file,
    write,
)
from .report import Report

__all__ = ["claims_figure", "curve_figure", "figures", "matrix_figure", "save_figures",
           "scatter_figure", "svg", "training_figures"]  # fmt: skip

KINDS: dict[PointKind, tuple[str, str]] = {
    "claim": (TEAL, "o"),
    "rival": (ORANGE, "^"),
    "namesake": (VIOLET, "s"),
    "control": (FAINT, "."),
    "reference": (BLUE, "D"),
}
"""Colour and marker of every kind of point."""
ORDER: tuple[PointKind, ...] = ("control", "reference", "rival", "namesake", "claim")
"""Kinds of points in the order in which they are drawn: the claim last, over the others."""
DRAWS = (".", "+", "x", "1")
"""Markers of the draws of the first control, the second, and so on."""
CONTROLS = (SOFT, VIOLET, OCHRE, ORANGE, BLUE)
"""Colours of the bands of controls."""
SHORT: dict[Kind, str] = {
    "sufficient": "sufficient\nin the\ntwin",
    "necessary": "necessary\nin the\ntwin",
    "carries": "carries it\nin the dense\nmodel",
    "needed": "needed\nin the dense\nmodel",
}
OUTCOMES: dict[Verdict, tuple[str, float]] = {
    "positive": (TEAL, 0.35),
    "negative": (ORANGE, 0.3),
    "cannot tell": (FAINT, 0.18),
}
"""Colour of every verdict and how strong it is."""
MOST_POINTS = 300
SPANS = 20
"""An axis of numbers above 0 is logarithmic where the largest is this many times the smallest."""


def claims_figure(claims: Sequence[Claim]) -> Figure:
    """Return the verdicts as a grid, task by kind of claim, each with its number.

    >>> from evals.report.figures import claims_figure
    >>> from evals.scores.verdict import Claim, threshold
    >>> met = threshold("harm", "harm", 0.6, 0.25, "fraction", "higher")
    >>> given = dict(kind="necessary", task="quotes", value=0.6, unit="fraction")
    >>> claim = Claim(**given, conditions=(met,))
    >>> [text.get_text() for text in claims_figure([claim]).axes[0].texts]
    ['positive\\n0.6']
    """
    tasks = list(dict.fromkeys(claim.task for claim in claims))
    kinds: list[Kind] = [kind for kind in SHORT if any(claim.kind == kind for claim in claims)]
    found: dict[tuple[str, str], Claim] = {(claim.task, claim.kind): claim for claim in claims}
    grid = []
    for task in tasks:
        row = []
        for kind in kinds:
            claim = found.get((task, kind))
            colour, strength = OUTCOMES[claim.outcome] if claim else (FAINT, 0.0)
            said = f"{claim.outcome}\n{number(claim.value)}" if claim else "–"
            row.append((said, colour, strength))
        grid.append(row)
    return _grid("Verdicts", tasks, [SHORT[kind] for kind in kinds], grid, tall=0.42)


def matrix_figure(matrix: Matrix) -> Figure:
    """Return a matrix as a grid of numbers: the more harm the stronger; "–" was not measured.

    A circuit's own task is framed. Gains have another colour than harm. Six columns and more have
    room for two decimals.

    >>> from evals.report.figures import matrix_figure
    >>> from evals.scores.pictures import Matrix
    >>> names, values = ("quotes", "while"), ((0.75, 0.02), (None, 0.6))
    >>> harm = Matrix(name="harm", unit="fraction", rows=names, columns=names, values=values)
    >>> [text.get_text() for text in matrix_figure(harm).axes[0].texts]
    ['0.75', '0.02', '–', '0.6']
    """
    shown = number if len(matrix.columns) < 6 else "{:.2f}".format
    most = max([abs(x) for row in matrix.values for x in row if x is not None] + [1e-12])
    grid = [
        [
            ("–", FAINT, 0.0)
            if x is None
            else (shown(x), TEAL if x >= 0 else ORANGE, 0.55 * abs(x) / most)
            for x in row
        ]
        for row in matrix.values
    ]
    words = f"row: circuit that is ablated; column: task that is asked ({matrix.unit})"
    figure = _grid(matrix.name, matrix.rows, matrix.columns, grid, tall=0.3, below=words)
    ax = figure.axes[0]
    for i, name in enumerate(matrix.rows):
        for j in [j for j, column in enumerate(matrix.columns) if column == name]:
            frame = Rectangle((j, i), 1, 1, fill=False, edgecolor=INK, linewidth=1.2, zorder=3)
            ax.add_patch(frame)
    return figure


def _grid(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[tuple[str, str, float]]],
    tall: float,
    below: str = "",
) -> Figure:
    """Return a grid of cells (text, colour, strength) with the names of rows and columns."""
    lines = [name.split("\n") for name in columns]
    longest = max(len(line) for name in lines for line in name)
    slanted = longest > 50 // len(columns)
    deep = 0.038 * longest if slanted else LINE * max(map(len, lines))
    bottom = 0.15 + deep + (0.2 if below else 0.0)
    left = min(2.2, 0.35 + 0.072 * max(map(len, rows)))
    figure, ax = axes(title, tall * len(rows), left=left, right=0.15, bottom=bottom)
    for i, row in enumerate(cells):
        for j, (text, colour, strength) in enumerate(row):
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, alpha=strength, linewidth=0))
            size = 1.0 if len(columns) < 8 else 0.8
            write(ax, j + 0.5, i + 0.5, text, INK if strength else SOFT, size)
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(rows), 0)
    slant: dict[str, Any] = {"rotation": 33, "ha": "right", "rotation_mode": "anchor"}
    names = ["\n".join(map(clean, name)) for name in lines]
    how = slant if slanted else {}
    ax.set_xticks([j + 0.5 for j in range(len(columns))], names, parse_math=False, **how)
    ax.set_yticks([i + 0.5 for i in range(len(rows))], list(map(clean, rows)), parse_math=False)
    finish(ax, below, "")
    ax.xaxis.set_label_coords(0.5, 0.2 / figure.get_figheight(), transform=figure.transFigure)
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def scatter_figure(scatter: Scatter) -> Figure:
    """Return effect against collateral damage: a point for each rival, namesake and control.

    Beside the axes stand the names with both numbers, effect first. Draws of one control are named
    once, with their number. Collateral is logarithmic where it spans more than a factor of SPANS.

    >>> from evals.report.figures import scatter_figure
    >>> from evals.scores.pictures import Point, Scatter
    >>> own = Point(label="the circuit", kind="claim", effect=0.68, collateral=0.235)
    >>> given = dict(effect_label="share", collateral_label="nats", points=(own,))
    >>> [text.get_text() for text in scatter_figure(Scatter(name="quotes", **given)).axes[0].texts]
    ['the circuit (0.68, 0.235)']
    """
    draws = Counter(point.label for point in scatter.points if point.kind == "control")
    marks = {label: DRAWS[i % len(DRAWS)] for i, label in enumerate(draws)}
    labels, drawn = [], []
    for point in scatter.points:
        colour, marker = KINDS[point.kind]
        marker, n = marks.get(point.label, marker), draws.get(point.label, 0)
        drawn.append((point, colour, marker))
        text = f"{point.label} ({number(point.effect)}, {number(point.collateral)})"
        if n > 1:
            colour, text = SOFT, f"{point.label}, {n} draws"
        if n <= 1 or not any(label.text == text for label in labels):
            at = {"x": point.effect, "y": point.collateral, "joined": n <= 1}
            labels.append(Label(text=text, colour=colour, marker=marker, **at))
    figure, ax = axes(scatter.name, _room(labels))
    log = _logarithmic([point.collateral for point in scatter.points])
    ax.set_yscale("log" if log else "linear")
    alike: dict[tuple[PointKind, str, str], list[tuple[float, float]]] = defaultdict(list)
    for point, colour, marker in drawn:
        alike[point.kind, colour, marker].append((point.effect, point.collateral))
    for (kind, colour, marker), places in sorted(
        alike.items(), key=lambda of: ORDER.index(of[0][0])
    ):
        size = {"claim": 8.0, "control": 4.0}.get(kind, 5.5)
        edge = {"markeredgewidth": 0.7 if marker in "+x1" else 0.0, "markeredgecolor": colour}
        ax.plot(*zip(*places, strict=True), marker=marker, color=colour, linestyle="", zorder=3,
                markersize=size, clip_on=False, **edge)  # fmt: skip
    xs, ys = ([getattr(p, name) for p in scatter.points] for name in ("effect", "collateral"))
    ax.set_xlim(*_wider(xs, [0.0]))
    if not log:
        ax.set_ylim(*_wider(ys, [0.0]))
    finish(ax, scatter.effect_label, f"{scatter.collateral_label} (less is better)", (False, log))
    beside(ax, labels)
    return figure


def curve_figure(curve: Curve) -> Figure:
    """Return a curve over its controls: the band of all draws, of their middle 90 %, and the mean.

    Places along the axis are evenly spaced, because strengths double.

    >>> from evals.report.figures import curve_figure
    >>> from evals.scores.curve import Curve
    >>> curve = Curve(name="steering", x_label="strength", y_label="P", x=(0.0, 1.0),
    ...               value=(0.1, 0.9), controls={"rotations": ((0.1, 0.2), (0.1, 0.1))})
    >>> [text.get_text() for text in curve_figure(curve).axes[0].texts]
    ['the circuit', 'rotations, 2 draws']
    """
    places, end = range(len(curve.x)), len(curve.x) - 1
    labels = [Label(text="the circuit", x=end, y=curve.value[-1], colour=TEAL)]
    labels += [Label(text=n, x=end, y=v[-1], colour=INK) for n, v in curve.references.items()]
    bands = []
    for i, (name, draws) in enumerate(curve.controls.items()):
        columns = [sorted(column) for column in zip(*draws, strict=True)]
        cut = int(0.05 * len(draws))
        mean = [math.fsum(c) / len(c) for c in columns]
        colour = CONTROLS[i % len(CONTROLS)]
        bands.append((columns, cut, mean, *_dashed(i, colour)))
        text = f"{name}, {len(draws)} draws"
        labels.append(Label(text=text, x=end, y=mean[-1], colour=colour))
    figure, ax = axes(curve.name, _room(labels))
    for columns, cut, mean, colour, dashes in bands:
        for k, strength in ((0, 0.12), (cut, 0.18)):
            low, high = [c[k] for c in columns], [c[-1 - k] for c in columns]
            ax.fill_between(places, low, high, color=colour, alpha=strength, linewidth=0)
        ax.plot(places, mean, color=colour, linestyle=dashes, linewidth=1.0, marker="", **SQUARE)
    for line in curve.references.values():
        ax.plot(places, line, color=INK, linestyle=(0, (5, 3)), linewidth=1.0, marker="", **SQUARE)
    dots = {"marker": "o", "markersize": 4.5, "markeredgecolor": TEAL, "clip_on": False}
    ax.plot(
        places, curve.value, color=TEAL, linewidth=2.0, linestyle="-", zorder=4, **dots, **SQUARE
    )
    lines = [curve.value, *curve.references.values()]
    lines += [draw for draws in curve.controls.values() for draw in draws]
    seen = [y for line in lines for y in line]
    ax.set_xlim(-0.15, end + 0.15)
    ax.set_ylim(*(-0.02, 1.02) if 0 <= min(seen) and max(seen) <= 1 else _wider(seen, [0.0]))
    ax.set_xticks(list(places), [number(x) for x in curve.x])
    finish(ax, curve.x_label, curve.y_label)
    beside(ax, labels)
    return figure


def training_figures(log: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Return the figures of a training log: one for each prefix of its numeric keys ("loss/...").

    >>> from evals.report.figures import training_figures
    >>> list(training_figures([{"step": i, "loss/ce": 3 - i, "lr/a": 0.1} for i in range(3)]))
    ['loss', 'lr']
    """
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in log:
        for key, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and "step" in line and is_number and math.isfinite(value):
                series[key].append((float(line["step"]), float(value)))
    groups: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for key, points in series.items():
        prefix, slash, rest = key.partition("/")
        if len(points) > 1:
            groups[prefix if slash else "run"][rest or prefix] = points
    return {name: _training(name, lines) for name, lines in groups.items()}


def _training(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    labels = []
    for i, (key, points) in enumerate(lines.items()):
        (x, y), colour = points[-1], SERIES[i % len(SERIES)][0]
        labels.append(Label(text=f"{key}  {number(y)}", x=x, y=y, colour=colour))
    values = [y for points in lines.values() for _, y in points]
    log = _logarithmic(values)
    figure, ax = axes(f"training: {name}{', logarithmic' if log else ''}", _room(labels))
    ax.set_yscale("log" if log else "linear")
    for i, points in enumerate(lines.values()):
        every = math.ceil(len(points) / MOST_POINTS)
        thin = [*points[:-1:every], points[-1]]
        colour, dashes = _dashed(i)
        ax.plot(
            *zip(*thin, strict=True),
            color=colour,
            linestyle=dashes,
            linewidth=1.3,
            marker="",
            **SQUARE,
        )
    if not log:
        ax.set_ylim(*_wider(values, []))
    finish(ax, "step", "", (False, log))
    beside(ax, labels)
    return figure


def figures(report: Report, log: Sequence[Mapping[str, Any]] = ()) -> dict[str, Figure]:
    """Return all figures of a report and its training log, by the names of their files."""
    pictures = report.pictures
    named = [("claims", claims_figure(report.claims))] if report.claims else []
    named += [(f"scatter-{s.name}", scatter_figure(s)) for s in pictures.scatters]
    named += [(f"curve-{c.name}", curve_figure(c)) for c in pictures.curves]
    named += [(f"matrix-{m.name}", matrix_figure(m)) for m in pictures.matrices]
    named += [(f"training-{name}", figure) for name, figure in training_figures(log).items()]
    found: dict[str, Figure] = {}
    for name, figure in named:
        slug = re.sub(r"\W+", "-", name.lower()).strip("-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found[f"{slug}-{same + 1}" if same else slug] = figure
    return found


def save_figures(
    report: Report, folder: str | Path, log: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Write every figure as .svg and .png into `folder`, all or none; return their paths.

    The same report gives the same bytes, so a figure that did not change is no change in git.

    >>> import tempfile
    >>> from evals import Report
    >>> from evals.report.figures import save_figures
    >>> log = [{"step": 0, "loss/ce": 3.0}, {"step": 9, "loss/ce": 2.5}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_figures(Report(title="t", sections={}), folder, log)]
    ['training-loss.svg', 'training-loss.png']
    """
    files: dict[str, bytes | str] = {}
    for name, figure in figures(report, log).items():
        files |= {f"{name}.svg": svg_file(figure), f"{name}.png": png(figure)}
    replace_files(folder, files)
    return [Path(folder) / name for name in files]


def _dashed(i: int, colour: str | None = None) -> tuple[str, Any]:
    """Return colour and dashes of the i-th line."""
    own, dashes = SERIES[i % len(SERIES)]
    return colour or own, dashes


def _logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > SPANS


def _wider(values: Sequence[float], also: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that holds all values, with a little room."""
    low, high = min([*values, *also]), max([*values, *also])
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - (room if low not in also or low < 0 else 0.3 * room), high + room


def _room(labels: Sequence[Label]) -> float:
    """Return the height of axes, in inches, beside which the labels have room."""
    return max(2.1, sum((len(label.lines) + 0.25) * LINE for label in labels))
