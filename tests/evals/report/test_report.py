"""Laws of the report: nothing is lost, nothing half-written, and the control is always there."""

import errno
import json
import os

import pytest

from evals.report.cells import number
from evals.report.report import Report, compare, provenance, table, write_all
from evals.scores.curve import Curve
from evals.scores.score import Score


def row(name="steering", value=0.7, **more):
    given = {"unit": "probability", "control_name": "random directions", "n": 64, "stderr": 0.01}
    return Score(**{"name": name, "value": value, "draws": (0.1, 0.2, 0.3), **given, **more})


def report(value=0.7, title="run a"):
    curve = Curve(
        name="steering", x_label="strength", y_label="P", x=(0.0, 1.0), value=(0.1, 0.9),
        controls={"random directions": ((0.1, 0.1), (0.1, 0.2))},
    )  # fmt: skip
    sections = {"quotes | dense": (row(value=value), row("ablation", 0.2)), "bridges": (row(),)}
    return Report(
        title=title,
        sections=sections,
        curves=(curve,),
        graphs=({"name": "quotes", "nodes": [], "edges": []},),
        notes=("short training",),
        provenance=provenance(seed=0),
    )


def test_a_report_survives_json_and_a_folder(tmp_path):
    r = report()
    assert Report.from_json(r.to_json()) == r
    r.save(tmp_path / "run")
    assert Report.load(tmp_path / "run") == r
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.json", "report.md"]


def test_every_row_shows_its_control_its_n_and_its_verdict():
    for text in (table(report()), report().to_markdown()):
        for word in ("0.7", "0.2", "+0.5 ± 0.01", "64", "beats 3 of 3 random directions"):
            assert word in text
    assert "quotes \\| dense" in report().to_markdown()


def test_the_columns_of_the_table_are_aligned():
    head, *rows = [x for x in table(report()).splitlines() if "verdict" in x or "beats 3" in x]
    assert len(rows) == 2
    assert {x.index("beats") for x in rows} == {head.index("verdict")}


def test_numbers_are_short():
    shown = {5632.0: "5632", 0.12345: "0.123", 0.0: "0", 2e-5: "2.00e-05", -0.5: "-0.5"}
    assert {x: number(x) for x in shown} == shown


def test_comparing_says_what_got_better_and_what_is_gone():
    after = report(0.9, "run b")
    after = Report(title=after.title, sections={"quotes | dense": after.sections["quotes | dense"]})
    text = compare(report(), after)
    assert "steering: 0.7 -> 0.9 probability (better)" in text
    assert "ablation: 0.2 -> 0.2 probability (same)" in text
    assert "only before: bridges / steering" in text


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    report().save(tmp_path)
    old = (tmp_path / "report.json").read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not write report.json.*No space.*untouched"):
        report(0.1).save(tmp_path)
    assert (tmp_path / "report.json").read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_broken_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no report.json"):
        Report.load(tmp_path)
    write_all(tmp_path, {"report.json": "[]"})
    with pytest.raises(ValueError, match="schema version"):
        Report.load(tmp_path)
    values = json.loads(report().to_json())
    with pytest.raises(ValueError, match="surprise"):
        Report.from_json(json.dumps(values | {"surprise": 1}))
    with pytest.raises(ValueError, match="twice"):
        Report(title="x", sections={"a": (row(), row())})


def test_provenance_names_the_versions_and_the_command():
    facts = provenance(seed=3)
    assert facts["versions"]["torch"] and facts["seed"] == 3 and facts["command"]
