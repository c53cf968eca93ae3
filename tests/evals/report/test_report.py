"""Laws of the report: nothing is lost, nothing half-written, and the control is always there."""

import errno
import json
import os
from dataclasses import replace

import pytest

from evals.report.cells import cells, number
from evals.report.report import Report, compare, provenance, table, write_all
from evals.scores.curve import Curve
from evals.scores.pictures import Pictures
from evals.scores.score import Score
from evals.scores.verdict import false_positives, q_values


def row(name="steering", value=0.7, **more):
    given = {"unit": "probability", "control_name": "random directions", "n": 64, "stderr": 0.01}
    return Score(**{"name": name, "value": value, "draws": (0.1, 0.2, 0.3), **given, **more})


def small(value=0.7, title="run a"):
    curve = Curve(
        name="steering", x_label="strength", y_label="P", x=(0.0, 1.0), value=(0.1, 0.9),
        controls={"random directions": ((0.1, 0.1), (0.1, 0.2))},
    )  # fmt: skip
    sections = {"quotes | dense": (row(value=value), row("ablation", 0.2)), "bridges": (row(),)}
    return Report(
        title=title,
        sections=sections,
        pictures=Pictures(curves=(curve,)),
        graphs=({"name": "quotes", "nodes": [], "edges": []},),
        notes=("short training",),
        provenance=provenance(seed=0),
    )


def test_a_report_survives_json_and_a_folder(tmp_path):
    r = small()
    assert Report.from_json(r.to_json()) == r
    r.save(tmp_path / "run")
    assert Report.load(tmp_path / "run") == r
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.json", "report.md"]


def test_every_row_shows_its_control_its_n_and_its_interval_and_no_verdict():
    for text in (table(small()), small().to_markdown()):
        for word in ("0.7", "0.2", "+0.5 ± 0.01", "+0.48 to +0.52", "64", "above 3 of 3 random"):
            assert word in text
        assert "verdict" not in text.partition("## What")[0] and "beats" not in text
    assert "quotes \\| dense" in small().to_markdown()


def test_what_a_control_is_is_said_as_a_fact():
    low = {"better": "lower", "key": "bridge.site.0.decoder_fvu"}
    said = {value: cells(row(value=value, **low))[-1] for value in (0.05, 0.15, 1.3)}
    assert said == {
        0.05: "below 3 of 3 random directions",
        0.15: "below 2 of 3 random directions",
        1.3: "below 0 of 3 random directions; worse than the mean",
    }
    assert "worse" not in cells(row(value=1.3))[-1]  # no fraction of variance
    assert cells(row(draws=(0.1,)))[-1] == "random directions"


def test_the_columns_of_the_table_are_aligned():
    head, *rows = [x for x in table(small()).splitlines() if "s.e." in x or "above" in x]
    assert len(rows) == 3
    assert {x.index("above") for x in rows} == {head.index("what the control is")}


def test_the_tables_open_with_one_line_for_each_claim_and_its_verdict(report):
    for text in (table(report), report.to_markdown()):
        lines = text.splitlines()
        starts = [next(i for i, x in enumerate(lines) if c.statement in x) for c in report.claims]
        first_row = next(i for i, line in enumerate(lines) if "s.e." in line)
        assert max(starts) < first_row
        (said,) = [line for line in lines if "false positives" in line]
        assert f"{false_positives(report.claims):.1f} of 12 claims" in said
        q = q_values(report.claims)
        for claim in report.claims:
            wanted = (claim.task, claim.statement, claim.outcome, claim.hardest.name)
            (own,) = [x for x in lines if all(word in x for word in wanted)]
            assert number(claim.value) in own and number(q[claim.key]) in own
            assert sum(claim.reason in line for line in lines) >= 1


def test_a_claim_that_is_not_positive_has_its_reason_below(report):
    lines = table(report).splitlines()
    claims = iter(report.claims)
    for i, line in enumerate(lines[: lines.index("Bridges")]):
        if any(f" {word} " in line for word in ("positive", "negative", "cannot tell")):
            claim = next(claims)
            below = f"    {claim.reason}" if claim.reason else ""
            assert not claim.reason or lines[i + 1] == below
    assert not list(claims)


def test_a_report_with_claims_and_pictures_survives_json(report):
    assert Report.from_json(report.to_json()) == report
    assert {claim.outcome for claim in report.claims} == {"positive", "negative", "cannot tell"}
    assert report.curves == report.pictures.curves and len(report.pictures) == 13


@pytest.mark.parametrize("change", [{"outcome": "positive"}, {"reason": ""}, {"value": None}])
def test_control_an_edited_verdict_is_refused(report, change):
    values = json.loads(report.to_json())
    (claim,) = [c for c in values["claims"] if (c["task"], c["kind"]) ==
                ("bracket_counting", "carries")]  # fmt: skip
    assert claim["outcome"] == "negative"
    claim.update(change)
    with pytest.raises((ValueError, TypeError), match="edited|value"):
        Report.from_json(json.dumps(values))


def test_a_claim_stands_once(report):
    with pytest.raises(ValueError, match="sufficient/single_double_quote.* twice"):
        replace(report, claims=(report.claims[0],) * 2)


def test_numbers_are_short():
    shown = {5632.0: "5632", 0.12345: "0.123", 0.0: "0", 2e-5: "2.00e-05", -0.5: "-0.5"}
    assert {x: number(x) for x in shown} == shown


def test_comparing_says_what_got_better_and_what_is_gone():
    after = small(0.9, "run b")
    after = Report(title=after.title, sections={"quotes | dense": after.sections["quotes | dense"]})
    text = compare(small(), after)
    assert "steering: 0.7 -> 0.9 probability (better)" in text
    assert "ablation: 0.2 -> 0.2 probability (same)" in text
    assert "only before: bridges / steering" in text


def test_comparing_says_which_claims_changed_their_number_or_their_verdict(report):
    quotes, brackets = report.claims[2], replace(report.claims[6], task="single_double_quote")
    before, after = replace(report, claims=(quotes,)), replace(report, claims=(brackets,))
    line = "carries/single_double_quote: share 0.68 -> share 0.64 (positive -> negative)"
    assert line in compare(before, after).splitlines()
    assert "carries/single_double_quote: share 0.68 -> share 0.68 (positive)" in compare(
        before, before
    )
    gone = compare(report, replace(report, claims=()))
    assert "only before: needed/while_return_true (cannot tell)" in gone


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    small().save(tmp_path)
    old = (tmp_path / "report.json").read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not write report.json.*No space.*untouched"):
        small(0.1).save(tmp_path)
    assert (tmp_path / "report.json").read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_broken_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no report.json"):
        Report.load(tmp_path)
    write_all(tmp_path, {"report.json": "[]"})
    with pytest.raises(ValueError, match="schema version"):
        Report.load(tmp_path)
    values = json.loads(small().to_json())
    with pytest.raises(ValueError, match="surprise"):
        Report.from_json(json.dumps(values | {"surprise": 1}))
    with pytest.raises(ValueError, match="twice"):
        Report(title="x", sections={"a": (row(), row())})


def test_provenance_names_the_versions_and_the_command():
    facts = provenance(seed=3)
    assert facts["versions"]["torch"] and facts["seed"] == 3 and facts["command"]
