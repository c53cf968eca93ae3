"""A report that is measured again on its run says where they differ, and nothing where not.

The example of `Report.verify` does so for a real run.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from evals.report.replay import differences, tasks_of
from evals.scores.score import Score


@pytest.fixture
def run():
    """A run whose evaluation is known: it returns what stands in `finds`."""
    manifest = {"dense": {"fingerprint": "a1"}, "sparse": {}}
    return SimpleNamespace(manifest=manifest)


@pytest.fixture
def asked(monkeypatch, report):
    """What evaluate_run was asked, and the report that it returns."""
    seen = SimpleNamespace(finds=report, run=None, how={})

    def evaluate(run, **how):
        seen.run, seen.how = run, how
        return seen.finds

    monkeypatch.setattr("evals.evaluate.evaluate_run", evaluate)
    return seen


def test_the_same_tasks_are_measured_with_the_settings_of_the_report(report, run, asked):
    assert report.verify(run) == []
    tasks = ["single_double_quote", "bracket_counting", "while_return_true"]
    settings = {"draws": 39, "max_pairs": 64, "facts": True, "seed": 0, "quick": False}
    assert asked.how == {"tasks": tasks, **settings}
    assert asked.run is run and tasks_of(replace(report, claims=())) == tasks


def changed(row: Score, **change) -> Score:
    values = {name: getattr(row, name) for name in ("key", "unit", "n", "better", "draws")}
    given = {"name": row.name, "value": row.value, "stderr": row.stderr, "interval": row.interval}
    return Score(**{**values, **given, "control_name": row.control_name, **change})


def test_another_number_another_verdict_and_another_model_are_said_in_words(report, run, asked):
    claims = list(report.claims)
    claims[2] = replace(report.claims[6], task="single_double_quote")
    sections = dict(report.sections)
    first, *rest = sections["Bridges"]
    sections["Bridges"] = (changed(first, value=first.value + 0.1), *rest)
    asked.finds = replace(report, claims=tuple(claims[:-1]), sections=sections)
    run.manifest["dense"]["fingerprint"] = "b2"
    said = report.verify(run)
    for words in (
        "the dense model of the run is another one: fingerprint a1 -> b2",
        "claim needed/while_return_true: only in the report",
        "claim carries/single_double_quote: outcome positive -> negative",
        "claim carries/single_double_quote: value 0.68 -> 0.64",
        "claim carries/single_double_quote, condition rival.all nodes: holds -> fails",
        "claim carries/single_double_quote, condition rival.all nodes: value 0.235 -> 0.215",
        "row Bridges / bridge.site.0.decoder_fvu: value 0.7 -> 0.8",
    ):
        assert words in said


def test_a_difference_within_the_tolerance_is_none(report):
    first, *rest = report.sections["Bridges"]
    near = {**report.sections, "Bridges": (changed(first, value=first.value + 5e-5), *rest)}
    again = replace(report, sections=near)
    assert differences(report, again, 1e-4) == []
    assert differences(report, again, 1e-5) == [
        "row Bridges / bridge.site.0.decoder_fvu: value 0.7 -> 0.70005"
    ]
    draw, *others = first.draws
    far = changed(first, draws=(draw + 0.5, *others))
    (said,) = differences(report, replace(report, sections={**near, "Bridges": (far, *rest)}), 1e-4)
    assert said == "row Bridges / bridge.site.0.decoder_fvu: draws 0 2.1 -> 2.6"


def test_a_report_that_does_not_say_how_it_was_made_is_not_measured_again(report, run):
    with pytest.raises(
        ValueError, match="does not record .'draws', 'max_pairs', 'facts', 'seed', 'quick'"
    ):
        replace(report, provenance={}).verify(run)
