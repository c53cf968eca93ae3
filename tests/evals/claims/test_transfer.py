"""What `evaluate_transfer` returns: two claims, pictures whose numbers are theirs, and facts."""

import pytest
import torch

from evals.claims.portrait import POINT_DRAWS, STRENGTHS
from evals.claims.transfer import evaluate_transfer
from sparse.circuits.score import circuit_logits
from sparse.tasks.batch import logit_difference

FEW = {"draws": 3, "max_pairs": 8}


@pytest.fixture(scope="module")
def evaluated(mapped, quotes, nonsense, found):
    others = {"namesakes": {"else_elif": found["else_elif"]}, "others": [found["else_elif"].task]}
    return evaluate_transfer(mapped(quotes), nonsense=nonsense, **others, **FEW)


def test_the_claims_are_judged_against_every_kind_of_rival(evaluated):
    carries, needed = evaluated.claims
    assert (carries.kind, needed.kind) == ("carries", "needed")
    parts = {key.partition(".")[0] for key in (c.key for c in carries.conditions)}
    assert parts == {"sources", "does", "share", "empty", "rival", "namesake"}
    parts = {key.partition(".")[0] for key in (c.key for c in needed.conditions)}
    assert parts == {"does", "harm", "empty", "namesake", "specific"}
    assert carries["empty.nodes"].draws[2:] and not carries["empty.nodes"].draws[3:]


def test_the_scatter_shows_the_claim_and_what_it_was_compared_with(evaluated):
    carries = evaluated["carries"]
    (scatter,) = evaluated.pictures.scatters
    (own,) = [p for p in scatter.points if p.kind == "claim"]
    assert own.effect == pytest.approx(carries.value)
    assert own.collateral == pytest.approx(carries.facts["collateral A"])
    shown = {p.label: p.collateral for p in scatter.points if p.kind in ("rival", "namesake")}
    compared = [c for c in carries.conditions if "share" in c.detail]
    assert sorted(shown.values()) == sorted(c.against for c in compared) and shown
    kinds = [p.kind for p in scatter.points]
    assert kinds.count("control") == 3 * POINT_DRAWS and kinds.count("reference") >= 1


def test_the_curve_begins_untouched_and_passes_through_the_claim(evaluated):
    carries = evaluated["carries"]
    (curve,) = evaluated.pictures.curves
    assert curve.x == (0.0, *STRENGTHS)
    assert curve.value[0] == pytest.approx(carries.facts["P"])
    lines = [draw for draws in curve.controls.values() for draw in draws]
    assert {line[0] for line in lines} == {curve.value[0]} and len(curve.controls) == 3
    at_one = 1 + STRENGTHS.index(1.0)
    assert curve.value[at_one] > max(line[at_one] for line in lines)


def test_examples_are_what_the_three_models_answer(evaluated, tiny, quotes, batch_of):
    batch = batch_of(quotes.task, pairs=8).take(torch.arange(2))
    shown = evaluated.pictures.examples
    assert [e.prompt for e in shown] == [
        tiny.tokenizer.decode(ids[: last + 1])
        for ids, last in zip(batch.ids, batch.last.tolist(), strict=True)
    ]
    alone = circuit_logits(tiny.sparse, batch, quotes.masks(), quotes.ablation)
    p = torch.sigmoid(logit_difference(alone, batch))
    assert [e.circuit for e in shown] == pytest.approx(p.tolist(), abs=1e-5)
    dense = torch.sigmoid(logit_difference(tiny.dense.last_logits(batch.ids, batch.last), batch))
    assert [e.dense for e in shown] == pytest.approx(dense.tolist(), abs=1e-5)


def test_facts_stand_beside_controls_and_can_be_left_out(evaluated, mapped, quotes, nonsense):
    rows = {row.key: row for row in evaluated.rows}
    assert rows["transfer.cosine"].value > 0.3 > abs(rows["transfer.cosine"].control)
    assert rows["transfer.interchange"].value > rows["transfer.interchange"].control
    assert 0 < rows["transfer.norm"].value < 2
    bare = evaluate_transfer(mapped(quotes), nonsense=nonsense, facts=False, draws=1, max_pairs=5)
    assert not bare.rows and not len(bare.pictures)
