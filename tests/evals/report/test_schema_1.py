"""Reports of before scores had a key and an outcome open, with the keys of today."""

import json
from pathlib import Path

import pytest

from bridges import load_run
from evals import Report
from evals.evaluate import evaluate_run
from evals.report.schema_1 import with_key

KEPT = Path(__file__).resolve().parents[3] / "docs" / "tiny-long"


@pytest.fixture(scope="module")
def report():
    return evaluate_run(load_run("tiny"), draws=4, quick=True)


def as_schema_1(text: str) -> str:
    """A report as it was written before: rows without key and outcome."""
    values = json.loads(text) | {"schema_version": 1}
    for rows in values["sections"].values():
        for row in rows:
            del row["key"], row["outcome"]
    return json.dumps(values)


def test_the_report_that_ships_was_written_before_and_opens():
    report = Report.load(KEPT)
    assert json.loads((KEPT / "report.json").read_text())["schema_version"] == 1
    keys = {row.key for _, row in report}
    assert {"bridge.site.4.decoder_fvu", "circuit.necessity", "transfer.ablation.nodes"} <= keys
    assert {"beats", "worse", "indistinguishable"} >= {row.outcome for _, row in report}


def test_an_old_report_opens_as_the_new_one_rows_keys_outcomes_and_all(report):
    again = Report.from_json(as_schema_1(report.to_json()))
    assert len(again) == len(report) > 30
    for (_, old), (_, new) in zip(again, report, strict=True):
        if "nonsense" in new.key:  # which of the two twins it was, only the sizes told
            assert old.key.startswith("circuit.nonsense.")
        else:
            assert old == new
    assert Report.from_json(report.to_json()) == report


def test_a_row_that_no_claim_wrote_has_a_key_of_its_name():
    assert with_key({"name": "My own, measured"})["key"] == "my_own_measured"


def test_control_a_report_of_today_without_keys_is_refused(report):
    values = json.loads(as_schema_1(report.to_json())) | {"schema_version": 2}
    with pytest.raises(ValueError, match="score: keys .*'key', 'outcome'.* are missing"):
        Report.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="schema version 3"):
        Report.from_json(json.dumps(values | {"schema_version": 3}))
