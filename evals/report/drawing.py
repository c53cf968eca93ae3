"""How all figures look, and how one becomes SVG or PNG. Nothing global of matplotlib is changed.

Every colour, size and font is set on the artist itself, so a user's style sheet changes none of
them. Colours are far apart for the colour-blind, and lines and markers differ in shape as well.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

HOW = 'the figures need matplotlib: pip install "sparse-bridges[viz]"'
"""What a user without matplotlib is told."""
try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import RendererSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle as Rectangle
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError(HOW, name="matplotlib") from error

PAPER, INK, SOFT, FAINT, GRID = "#ffffff", "#1d2329", "#5d6770", "#8f989f", "#e3e5e4"
TEAL, ORANGE, VIOLET, BLUE, OCHRE = "#0b6e75", "#c4500c", "#8a4f9e", "#2f6db5", "#a87b00"
SERIES: tuple[tuple[str, Any], ...] = (
    (TEAL, "-"),
    (ORANGE, (0, (5, 2))),
    (BLUE, (0, (1.5, 1.5))),
    (VIOLET, (0, (7, 2, 1.5, 2))),
    (SOFT, "-"),
    (OCHRE, (0, (5, 2))),
)
"""Colour and dashes of lines, in the order of their use."""
THEME = {
    INK: "ink", SOFT: "soft", FAINT: "faint", GRID: "line", TEAL: "accent", ORANGE: "orange",
    VIOLET: "violet", BLUE: "blue", OCHRE: "ochre", PAPER: "paper",
}  # fmt: skip
"""Colour to the variable of the page's style sheet that takes its place, light or dark."""
FONT = ["DejaVu Sans"]
SIZE = 8.0
"""Points of a text."""
SQUARE: dict[str, Any] = {"solid_capstyle": "butt", "dash_capstyle": "butt"}
"""How lines end."""
WIDTH = 5.0
"""Inches of a figure: one column of the page, or of a paper."""
LINE = SIZE * 1.35 / 72
"""Inches between the lines of a text."""
ASIDE = 27
"""Characters of a line of text beside the axes."""
DPI = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A text beside the axes that names the point (x, y)."""

    text: str
    x: int | float
    y: int | float
    colour: str
    marker: str = ""
    joined: bool = True
    """Whether a thin line joins the text to the point."""

    @property
    def lines(self) -> list[str]:
        """The text in lines that fit beside the axes."""
        return textwrap.wrap(clean(self.text), ASIDE) or [""]


def clean(text: str) -> str:
    """Return a text with what cannot be drawn, such as a line break, written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def axes(
    title: str, height: float, left: float = 0.62, right: float = 2.05, bottom: float = 0.5
) -> tuple[Figure, Axes]:
    """Return a figure of WIDTH with one pair of axes; all margins and sizes are in inches.

    `height` is that of the axes; the title stands above them in as many lines as it needs.
    """
    words = textwrap.wrap(clean(title), 66) or [""]
    top = 0.16 + LINE * 1.1 * len(words)
    whole = height + top + bottom
    figure = Figure(figsize=(WIDTH, whole), dpi=DPI, facecolor=PAPER)
    figure.set_layout_engine("none")
    FigureCanvasAgg(figure)
    wide = (WIDTH - left - right) / WIDTH
    ax = figure.add_axes((left / WIDTH, bottom / whole, wide, height / whole))
    ax.set_facecolor("none")
    said = figure.text(0.06 / WIDTH, 1 - 0.06 / whole, "\n".join(words), va="top", ha="left")
    _style(said, INK, 1.06, weight="bold")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=FAINT, linewidth=0.8)
    return figure, ax


def _style(text: Any, colour: str = SOFT, size: float = 1.0, weight: str = "normal") -> None:
    """Set all that a style sheet could change in a text; "$" begins no formula."""
    text.set(
        color=colour, fontsize=SIZE * size, fontfamily=FONT, fontweight=weight,
        fontstyle="normal", parse_math=False, usetex=False,
    )  # fmt: skip


def write(ax: Axes, x: float, y: float, text: str, colour: str, size: float) -> None:
    """Write a text of `size` (1: as all others) in the middle of a place in data."""
    said = ax.text(x, y, text, ha="center", va="center", linespacing=1.2)
    _style(said, colour, size)


def finish(ax: Axes, x_label: str, y_label: str, log: tuple[bool, bool] = (False, False)) -> None:
    """Label the axes and set their ticks; `log` says which are logarithmic."""
    low, high = ax.get_ylim()
    subs = (1, 2, 5) if log[1] and high / low < 1000 else (1,)
    for axis, label, logarithmic in zip((ax.xaxis, ax.yaxis), (x_label, y_label), log, strict=True):
        axis.set_label_text(clean(label))
        axis.labelpad = 4.0
        _style(axis.label)
        if axis.get_major_locator().__class__.__name__ != "FixedLocator":
            axis.set_major_locator(LogLocator(subs=subs) if logarithmic else MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(float(v), 10):g}"))
        axis.set_minor_locator(NullLocator())
    whole = ax.get_figure(root=True)
    if isinstance(whole, Figure):
        box = ax.get_position()
        at = 0.12 / whole.get_figwidth(), (box.y0 + box.y1) / 2
        ax.yaxis.set_label_coords(*at, transform=whole.transFigure)
    ax.tick_params(
        which="both", color=FAINT, labelcolor=SOFT, labelsize=SIZE, length=3, width=0.8, pad=3,
        direction="out", labelfontfamily=FONT[0], bottom=True, left=True, top=False, right=False,
        labelbottom=True, labelleft=True,
    )  # fmt: skip
    ax.grid(False, axis="x")
    ax.grid(True, axis="y", color=GRID, linewidth=0.7, linestyle="-", alpha=1.0, **SQUARE)
    ax.set_axisbelow(True)
    for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        text.set(parse_math=False, usetex=False)


def beside(ax: Axes, labels: Sequence[Label]) -> None:
    """Write labels to the right of the axes, none over another, each joined to its point."""
    whole, place = ax.get_figure(root=True), ax.get_position()
    if not isinstance(whole, Figure):
        raise ValueError("these axes belong to no figure; make them with drawing.axes")
    height, width = whole.get_figheight() * place.height, whole.get_figwidth() * place.width
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [tuple(map(float, to_axes.transform((label.x, label.y)))) for label in labels]
    order = sorted(range(len(labels)), key=lambda i: -ends[i][1])
    tall = [(len(labels[i].lines) + 0.25) * LINE / height for i in order]
    tops = spread([ends[i][1] + t / 2 for i, t in zip(order, tall, strict=True)], tall)
    free: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False}
    for i, top, t in zip(order, tops, tall, strict=True):
        label, (x, y), middle = labels[i], ends[i], top - t / 2
        at = [1 + inches / width for inches in (0.05, 0.15, 0.23, 0.32 if label.marker else 0.2)]
        thin = SQUARE | {
            "color": FAINT,
            "linewidth": 0.5,
            "linestyle": "-",
            "marker": "",
            "zorder": 1.5,
        }
        if label.joined:
            ax.plot([x, at[0], at[1]], [y, middle, middle], **thin, **free)
        if label.marker:
            edge = 0.7 if label.marker in "+x1" else 0.0
            dot = {
                "color": label.colour,
                "markeredgecolor": label.colour,
                "marker": label.marker,
                "markeredgewidth": edge,
            }
            ax.plot([at[2]], [middle], markersize=5, linestyle="", **dot, **free)
        said = ax.text(at[3], middle, "\n".join(label.lines), va="center", ha="left", **free)
        said.set_linespacing(1.15)
        _style(said, label.colour)


def spread(tops: Iterable[float], heights: Sequence[float]) -> list[float]:
    """Return tops of boxes, from high to low, moved so that none covers another, within 0 to 1.

    Boxes that are too many for that hang over the lower end.

    >>> from evals.report.drawing import spread
    >>> spread([0.5, 0.5], [0.25, 0.25])
    [0.5, 0.25]
    """
    moved: list[float] = []
    limit = 1.0
    for top, height in zip(tops, heights, strict=True):
        moved.append(min(top, limit))
        limit = moved[-1] - height
    floor = min(0.0, 1 - sum(heights))
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = max(moved[i], floor + heights[i])
        floor = moved[i]
    return moved


class _Words(RendererSVG):
    """An SVG whose texts are texts: found by a search, and in the font of the page."""

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, ismath: Any = False,
        mtext: Any = None,
    ) -> None:  # fmt: skip
        as_text: Any = getattr(self, "_draw_text_as_text")  # noqa: B009, not in matplotlib's types
        as_text(gc, x, y, s, prop, angle, ismath, mtext)


def svg_file(figure: Figure) -> str:
    """Return a figure as the text of an SVG file, the same for the same figure."""
    out, dpi, width = io.StringIO(), figure.dpi, figure.get_figwidth()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    try:
        figure.dpi = 72
        figure.patch.set_visible(False)
        renderer = _Words(width * 72, figure.get_figheight() * 72, out, metadata=nothing)
        figure.draw(renderer)
        renderer.finalize()
    finally:
        figure.dpi = dpi
        figure.patch.set_visible(True)
    fallback = "'DejaVu Sans', Helvetica, Arial, sans-serif"
    return _renamed(out.getvalue().replace("'DejaVu Sans'", fallback))


def _in_tags(text: str, change: Callable[[str], str]) -> str:
    """Return an SVG whose tags were changed, and whose texts were not."""
    return re.sub(r"<[^>]*>", lambda tag: change(tag[0]), text)


def _renamed(text: str) -> str:
    """Return an SVG whose ids are numbers after a hash of it, so that no two figures share one."""
    ids: dict[str, int] = {}

    def collect(tag: str) -> str:
        for name in re.findall(r'\bid="([^"]+)"', tag):
            ids.setdefault(name, len(ids))
        return tag

    def named(prefix: str) -> str:
        def rename(tag: str) -> str:
            places = r'(\bid="|url\(#|href="#)([^")]+)'
            return re.sub(places, lambda m: f"{m[1]}{prefix}{ids[m[2]]}", tag)

        return _in_tags(text, rename)

    _in_tags(text, collect)
    return named(f"f{hashlib.sha256(named('').encode()).hexdigest()[:10]}-")


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element for a page: no prologue, no size, and the page's colours.

    Its colours are variables of the page's style sheet (THEME), each with its own colour to fall
    back on; lines are joined as that style sheet says.
    """

    def themed(tag: str) -> str:
        for colour, name in THEME.items():
            tag = tag.replace(f": {colour}", f": var(--{name}, {colour})")
        return tag.replace("xlink:href", "href")

    text = svg_file(figure)
    start = text.index("<svg")
    end = text.index(">", start)
    head = re.sub(r' (?:xmlns:xlink|xmlns|width|height|version)="[^"]*"', "", text[start:end])
    style = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>\s*", re.DOTALL)
    return head + _in_tags(style.sub("", text[end:], count=1), themed).rstrip()


def png(figure: Figure) -> bytes:
    """Return a figure as PNG on white paper, the same bytes for the same figure."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()
