"""Compute the charts of the page as plain numbers, which the template page.html draws.

Nothing here makes markup; the template escapes every text that it is given.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from evals.scores.curve import Curve
from evals.scores.score import Score

from .cells import number

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 122, 14, 30
MOST_POINTS = 300
STRIP = 132
Number = int | float
Points = Sequence[tuple[Number, Number]]


class Scale:
    """A straight or logarithmic map from numbers to pixels."""

    def __init__(
        self, values: Sequence[Number], start: Number, end: Number, log: bool = False
    ) -> None:
        self.log = log
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (min(0, 2 * low), max(0, 2 * high) or 1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, x: Number) -> float:
        low, high = self.low, self.high
        if self.log:
            x, low, high = math.log(x), math.log(low), math.log(high)
        return round(self.start + (x - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return about four round numbers on the axis, as (pixel, label)."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if last - first > 3 else (1, 2, 5)
            places = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        else:
            rough = (self.high - self.low) / 4
            unit = 10.0 ** math.floor(math.log10(rough))
            step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough)
            first = math.ceil(self.low / step - 1e-9)
            places = [i * step for i in range(first, first + 7)]
        places = [x for x in places if self.low - 1e-12 <= x <= self.high * (1 + 1e-9) + 1e-12]
        return [(self(x), number(round(x, 10))) for x in places]


def _path(points: Points, x: Scale, y: Scale) -> str:
    return "M" + " L".join(f"{x(a)},{y(b)}" for a, b in points)


def _frame(x: Scale, y: Scale, x_label: str) -> dict[str, Any]:
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "x_label": x_label,
    }


def _spread(labels: list[dict[str, Any]], gap: float = 11.0) -> None:
    """Move labels apart vertically, in place, keeping their order."""
    labels.sort(key=lambda label: label["y"])
    for above, below in zip(labels, labels[1:], strict=False):
        below["y"] = max(below["y"], above["y"] + gap)
    if labels and (over := labels[-1]["y"] - (HEIGHT - BOTTOM + 4)) > 0:
        for label in labels:
            label["y"] -= over


def effect_chart(curve: Curve) -> dict[str, Any]:
    """Return the chart of an effect curve.

    Every control has two bands, that of all its draws and that of their middle 90 %, and the line
    of their mean.
    """
    lines = [curve.value, *curve.references.values()]
    lines += [draw for draws in curve.controls.values() for draw in draws]
    x = Scale(range(len(curve.x)), LEFT, WIDTH - RIGHT)  # strengths double: evenly spaced
    y = Scale([v for line in lines for v in line] + [0.0, 1.0], HEIGHT - BOTTOM, TOP)
    places = range(len(curve.x))
    bands, labels = [], []
    for i, (name, draws) in enumerate(curve.controls.items()):
        columns = [sorted(column) for column in zip(*draws, strict=True)]
        cut = [int(0.05 * len(column)) for column in columns]
        middle = [(c[k], c[-1 - k]) for c, k in zip(columns, cut, strict=True)]
        mean = [sum(c) / len(c) for c in columns]
        bands.append(
            {
                "name": f"{name} ({len(draws)} draws)",
                "style": i,
                "all": _band([(c[0], c[-1]) for c in columns], x, y),
                "middle": _band(middle, x, y),
                "mean": _path(list(zip(places, mean, strict=True)), x, y),
            }
        )
    ends = [
        ("the circuit", curve.value, "own"),
        *((n, v, "ref") for n, v in curve.references.items()),
    ]
    for name, line, kind in ends:
        labels.append({"y": y(line[-1]) + 3, "text": name, "kind": kind})
    _spread(labels)
    frame = _frame(x, y, curve.x_label)
    frame["x_ticks"] = [(x(i), number(s)) for i, s in enumerate(curve.x)]
    return frame | {
        "name": curve.name,
        "y_label": curve.y_label,
        "own": _path(list(enumerate(curve.value)), x, y),
        "dots": [
            {"x": x(i), "y": y(v), "text": f"strength {number(s)}: {number(v)}"}
            for i, (s, v) in enumerate(zip(curve.x, curve.value, strict=True))
        ],
        "references": [_path(list(enumerate(v)), x, y) for v in curve.references.values()],
        "bands": bands,
        "labels": labels,
    }


def _band(ends: Points, x: Scale, y: Scale) -> str:
    low = [(i, a) for i, (a, _) in enumerate(ends)]
    high = [(i, b) for i, (_, b) in enumerate(ends)]
    return _path([*low, *reversed(high)], x, y) + " Z"


def training_charts(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the charts of a training log: one for each prefix of its numeric keys ("val/...").

    The axis is logarithmic where all values are above 0 and span more than a factor of 20.
    """
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in log:
        for key, value in line.items():
            number_ = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and "step" in line and number_ and math.isfinite(value):
                series[key].append((float(line["step"]), float(value)))
    groups: dict[str, dict[str, Points]] = defaultdict(dict)
    for key, points in series.items():
        prefix, slash, rest = key.partition("/")
        if len(points) > 1:
            groups[prefix if slash else "run"][rest or prefix] = points
    return [_line_chart(name, lines) for name, lines in groups.items()]


def _line_chart(name: str, lines: Mapping[str, Points]) -> dict[str, Any]:
    values = [v for points in lines.values() for _, v in points]
    steps = [s for points in lines.values() for s, _ in points]
    log = min(values) > 0 and max(values) / min(values) > 20
    x = Scale(steps, LEFT, WIDTH - RIGHT)
    y = Scale(values, HEIGHT - BOTTOM, TOP, log)
    labels, drawn = [], []
    for i, (key, points) in enumerate(lines.items()):
        every = math.ceil(len(points) / MOST_POINTS)
        thin = [*points[:-1:every], points[-1]]
        last = thin[-1][1]
        drawn.append({"path": _path(thin, x, y), "style": i % 5, "text": f"{key}: {number(last)}"})
        labels.append({"y": y(last) + 3, "text": f"{key}  {number(last)}", "kind": "line"})
    _spread(labels)
    return _frame(x, y, "step") | {"name": name, "log": log, "lines": drawn, "labels": labels}


def strip(row: Score) -> dict[str, Any]:
    """Return the chart of one row: its value as a dot among its control's draws as ticks."""
    x = Scale([*row.draws, row.value], 5, STRIP - 5)
    shown = sorted(row.draws)[:: max(1, row.n_draws // 100)]
    return {"width": STRIP, "draws": [x(draw) for draw in shown], "value": x(row.value)}
