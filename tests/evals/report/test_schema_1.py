"""Reports of schema 1 and 2 open: with the keys of today, without claims."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evals import Report
from evals.report.schema_1 import with_keys
from evals.scores.pictures import Pictures

KEPT = Path(__file__).resolve().parents[3] / "docs" / "tiny-long"
BEFORE = Path(__file__).resolve().parent / "schema_1"


@pytest.fixture(scope="module")
def report():
    """The kept report as far as an older schema could hold it: no claims, no rows renamed since."""
    kept = Report.load(KEPT)
    sections = {"Bridges": kept.sections["Bridges"]}
    return replace(kept, claims=(), sections=sections, pictures=Pictures(curves=kept.curves))


def as_schema_1(text: str) -> str:
    """A report as it was written before: rows without key and outcome, and no claims."""
    values = as_schema_2(text) | {"schema_version": 1}
    for rows in values["sections"].values():
        for row in rows:
            del row["key"], row["outcome"]
    return json.dumps(values)


def as_schema_2(text: str) -> dict:
    """The values of a report before claims: curves alone, and a verdict in words for each row."""
    values = json.loads(text) | {"schema_version": 2}
    del values["claims"]
    values["curves"] = values.pop("pictures")["curves"]
    for rows in values["sections"].values():
        for row in rows:
            row["verdict"] = "beats 3 of 3 untrained bridges"
    return values


def test_a_report_that_was_written_before_opens():
    """A part of the report that the library shipped with before schema 2, as it was written."""
    report = Report.load(BEFORE)
    assert json.loads((BEFORE / "report.json").read_text())["schema_version"] == 1
    keys = {row.key for _, row in report}
    assert {"bridge.site.4.decoder_fvu", "circuit.necessity", "transfer.ablation.nodes"} <= keys
    assert {"beats", "worse", "indistinguishable"} >= {row.outcome for _, row in report}


def test_a_report_written_anew_is_of_todays_schema_and_holds_the_same(report):
    text = report.to_json()
    assert json.loads(text)["schema_version"] == 3
    assert Report.from_json(text) == report == Report.from_json(as_schema_1(text))
    assert Report.from_json(json.dumps(as_schema_2(text))) == report


def test_a_report_of_schema_2_has_its_rows_and_curves_and_no_claims(report):
    text = json.dumps(as_schema_2(report.to_json()))
    old = Report.from_json(text)
    assert old.claims == () and len(old) == len(report) and len(old.curves) == len(report.curves)
    assert "verdict" not in old.to_json()
    with pytest.raises(ValueError, match="unknown keys .'surprise'"):
        Report.from_json(json.dumps(json.loads(text) | {"surprise": 1}))


def test_control_a_row_of_today_has_no_verdict(report):
    values = json.loads(report.to_json())
    next(iter(values["sections"].values()))[0]["verdict"] = "beats 3 of 3 untrained bridges"
    with pytest.raises(ValueError, match="score: unknown keys .'verdict'"):
        Report.from_json(json.dumps(values))


def test_of_two_nonsense_twins_the_first_is_that_of_equal_size():
    names = ["nodes", "nonsense twin (74 nodes, the circuit 71)"]
    names += ["nonsense twin (256 nodes, the circuit 71)"]
    keys = [row["key"] for row in with_keys([{"name": name} for name in names])]
    assert keys[1:] == ["circuit.nonsense.equal_size", "circuit.nonsense.found_size"]


def test_a_row_that_no_claim_wrote_has_a_key_of_its_name():
    (row,) = with_keys([{"name": "My own, measured"}])
    assert row["key"] == row["name"]


def test_rows_of_ones_own_may_be_named_in_any_language(report):
    (heading, row), *_ = report
    rows = [row.to_dict() | {"name": name} for name in ("loss, a", "loss a", "损失", "概率")]
    values = json.loads(as_schema_1(report.to_json())) | {"sections": {heading: rows}}
    for own in rows:
        del own["key"], own["outcome"]
    assert len(Report.from_json(json.dumps(values))) == 4


def test_a_row_of_schema_1_that_has_a_key_was_edited(report):
    values = as_schema_2(report.to_json()) | {"schema_version": 1}
    with pytest.raises(ValueError, match="unknown keys .'key'. in a report of schema 1"):
        Report.from_json(json.dumps(values))


def test_control_a_report_of_today_without_keys_is_refused(report):
    values = json.loads(as_schema_1(report.to_json())) | {"schema_version": 2}
    with pytest.raises(ValueError, match="score: keys .*'key', 'outcome'.* are missing"):
        Report.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="schema version 4"):
        Report.from_json(json.dumps(values | {"schema_version": 4}))
