"""Laws of the figures: they hold every number's label, the same bytes, and nothing global."""

import doctest
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from xml.etree import ElementTree

import jaxtyping
import matplotlib as mpl
import pytest

from evals.report.cells import number
from evals.report.drawing import Label, axes, beside, png, spread, svg_file
from evals.report.figures import (
    claims_figure,
    curve_figure,
    figures,
    matrix_figure,
    save_figures,
    scatter_figure,
    svg,
    training_figures,
)
from evals.report.report import Report
from evals.scores.pictures import Matrix, Pictures


def words(text: str) -> str:
    """All texts of an SVG, parsed as XML, with one space between words."""
    if "xmlns" not in text:
        text = text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    root = ElementTree.fromstring(text)
    return " ".join(" ".join(t.split()) for t in root.itertext() if t.strip())


def test_a_scatter_names_every_point_with_its_numbers_and_every_control_once(report):
    for scatter in report.pictures.scatters:
        said = words(svg(scatter_figure(scatter)))
        for point in scatter.points:
            numbers = f"({number(point.effect)}, {number(point.collateral)})"
            assert point.kind == "control" or f"{point.label} {numbers}" in said
        for name in ("rotations", "decoders of the same covariance"):
            assert said.count(f"{name}, 39 draws") == 1
        for label in (scatter.name, scatter.effect_label, scatter.collateral_label):
            assert label in said


def test_a_curve_names_its_controls_with_their_draws_and_its_references(report):
    said = words(svg(curve_figure(report.curves[0])))
    wanted = ("the circuit", "random rotations of the same delta, 25 draws", "strength", "0.25")
    wanted += ("random circuits, 10 draws", "full activation patch", "P(target of the other")
    assert all(word in said for word in wanted)


def test_a_matrix_has_every_number_and_frames_a_circuits_own_task(report):
    (matrix,) = report.pictures.matrices
    figure = matrix_figure(matrix)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == ["0.75", "0.02", "0.11", "0.2", "0.24", "–", "-0.03", "0.05", "0.58"]
    frames = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert [patch.get_xy() for patch in frames] == [(0, 0), (1, 1), (2, 2)]
    assert all(task in words(svg(figure)) for task in (*matrix.rows, "fraction"))


def test_the_grid_of_claims_has_every_verdict(report):
    said = [text.get_text() for text in claims_figure(report.claims).axes[0].texts]
    order = {"sufficient": 0, "necessary": 1, "carries": 2, "needed": 3}
    wanted = {}
    for i, claim in enumerate(report.claims):
        wanted[i // 4, order[claim.kind]] = f"{claim.outcome}\n{number(claim.value)}"
    assert said == [wanted[place] for place in sorted(wanted)]


def test_the_training_log_is_grouped_thinned_and_logarithmic_where_it_spans_much(log):
    lines = [*log, {"step": 5, "loss/ce": float("nan")}, {"event": "resumed"}]
    made = training_figures(lines)
    assert set(made) == {"loss", "lr", "density"}
    drawn = [line for line in made["loss"].axes[0].lines if len(line.get_xdata()) > 5]
    assert len(drawn) == 2 and all(len(line.get_xdata()) <= 310 for line in drawn)
    assert made["loss"].axes[0].get_yscale() == "linear"
    wide = training_figures([{"step": i, "lr/a": 10.0**-i} for i in range(4)])
    assert wide["lr"].axes[0].get_yscale() == "log"
    assert "ce 4.22" in words(svg(made["loss"]))


def test_every_figure_is_xml_of_its_own_ids_and_the_same_bytes_each_time(report, log, tmp_path):
    one, two = (
        save_figures(report, tmp_path / "one", log),
        save_figures(report, tmp_path / "two", log),
    )
    assert len(one) == 2 * len(figures(report, log)) == 22
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    ids: list[str] = []
    for path in one:
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            ElementTree.fromstring(text)
            own = re.findall(r'\bid="([^"]+)"', text)
            used = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
            assert set(used) <= set(own) and "date" not in text
            ids += own
    assert len(set(ids)) == len(ids)


def test_control_another_number_gives_other_bytes(report):
    scatter = report.pictures.scatters[0]
    first, *rest = scatter.points
    moved = replace(scatter, points=(replace(first, collateral=first.collateral + 0.1), *rest))
    assert svg_file(scatter_figure(moved)) != svg_file(scatter_figure(scatter))
    assert png(scatter_figure(moved)) != png(scatter_figure(scatter))


def shown(labels, axis, ends):
    """The labels of ticks that lie within an axis; matplotlib keeps one more on either side."""
    return [t for t in labels if t.get_text() and min(ends) <= t.get_position()[axis] <= max(ends)]


def test_no_label_covers_another_and_none_leaves_the_figure(report, log):
    for name, figure in figures(report, log).items():
        figure.draw_without_rendering()
        (ax,) = figure.axes
        texts = [t for t in (*ax.texts, *figure.texts) if t.get_text()]
        ticks = shown(ax.get_xticklabels(), 0, ax.get_xlim())
        ticks += shown(ax.get_yticklabels(), 1, ax.get_ylim())
        boxes = [t.get_window_extent() for t in texts]
        whole = figure.bbox
        for box in [*boxes, *(t.get_window_extent() for t in [*ticks, ax.yaxis.label])]:
            inside = whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1
            assert inside and whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1, name
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                deep = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                assert min(deep) < 1.0, name


def test_control_labels_that_are_not_spread_cover_each_other(monkeypatch):
    labels = [Label(text="one", x=0.5, y=0.5, colour="#000000") for _ in range(3)]

    def heights():
        _, ax = axes("title", 2.0)
        beside(ax, labels)
        return {round(text.get_position()[1], 6) for text in ax.texts}

    assert len(heights()) == 3
    monkeypatch.setattr("evals.report.drawing.spread", lambda tops, heights: list(tops))
    assert len(heights()) == 1


def test_boxes_are_spread_in_their_order_without_covering_each_other():
    tops, heights = [0.9, 0.5, 0.5, 0.1], [0.2, 0.1, 0.3, 0.2]
    moved = spread(tops, heights)
    assert all(a - h >= b - 1e-9 for a, h, b in zip(moved, heights, moved[1:], strict=False))
    assert moved[0] == 0.9 and moved[-1] - heights[-1] >= -1e-9
    assert spread([0.9, 0.2], [0.1, 0.1]) == [0.9, 0.2]  # nothing to move


def test_a_dollar_an_angle_bracket_and_a_line_break_in_a_name_are_only_text(report):
    evil = 'a$b$ <b id="x"> href="#y" #1d2329: #0b6e75\n'
    scatter = report.pictures.scatters[0]
    points = tuple(replace(point, label=evil) for point in scatter.points)
    text = svg(scatter_figure(replace(scatter, name=evil, points=points)))
    assert '"#y" #1d2329: #0b6e75\\n' in words(text) and "<b id" not in text
    names = (evil, "$", "_hidden")
    matrix = Matrix(name="$x", unit="nats", rows=names, columns=names, values=((0.1,) * 3,) * 3)
    assert "_hidden" in words(svg(matrix_figure(matrix))) and png(matrix_figure(matrix))


def test_in_the_page_colours_follow_its_theme_and_in_a_file_they_do_not(report):
    figure = scatter_figure(report.pictures.scatters[0])
    page, file = svg(figure), svg_file(figure)
    assert "var(--accent, #0b6e75)" in page and "var(--ink, #1d2329)" in page
    assert not re.search(r"(?<!, )#(0b6e75|1d2329)", page)
    assert "#0b6e75" in file and "var(" not in file
    assert page.startswith("<svg") and "<style" not in page and "http" not in page


def test_nothing_global_of_matplotlib_changes_and_nothing_global_changes_a_figure(
    report, monkeypatch
):
    before, scatter = dict(mpl.rcParams), report.pictures.scatters[0]
    plain = svg(scatter_figure(scatter))
    assert dict(mpl.rcParams) == before
    own = {
        **dict.fromkeys(("text.color", "xtick.color", "lines.markeredgecolor"), "red"),
        **dict.fromkeys(("axes.grid", "axes.spines.top", "figure.autolayout"), True),
        **dict.fromkeys(("font.size", "lines.linewidth", "axes.labelpad", "xtick.labelsize"), 20),
        **{"font.family": "serif", "axes.facecolor": "black", "svg.fonttype": "path"},
        **{"lines.marker": "x", "lines.solid_capstyle": "round", "grid.alpha": 0.2},
    }
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import would be an error
    with mpl.rc_context(own):
        assert svg(scatter_figure(scatter)) == plain


def test_figures_are_drawn_in_several_threads_as_in_one(report):
    scatters = list(report.pictures.scatters) * 2
    alone = [svg(scatter_figure(scatter)) for scatter in scatters]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda s: svg(scatter_figure(s)), scatters)) == alone


def test_two_pictures_of_one_name_are_two_files(report):
    (matrix,) = report.pictures.matrices
    both = Report(title="t", sections={}, pictures=Pictures(matrices=(matrix, matrix)))
    assert list(figures(both)) == [
        "matrix-harm-to-the-dense-model",
        "matrix-harm-to-the-dense-model-2",
    ]


def test_without_matplotlib_the_import_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("figures", "drawing"):
        monkeypatch.delitem(sys.modules, f"evals.report.{name}")
    with pytest.raises(ImportError, match=r'pip install "sparse-bridges\[viz\]"') as caught:
        import_module("evals.report.figures")
    assert caught.value.name == "matplotlib"


@pytest.mark.parametrize("name", ["figures", "drawing"])
def test_the_examples_of_the_figures_run(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    found = doctest.testmod(import_module(f"evals.report.{name}"))
    assert found.attempted and not found.failed
