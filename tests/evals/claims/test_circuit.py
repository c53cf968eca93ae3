"""What `evaluate_circuit` returns: two claims, and rows of facts that follow from the losses."""

from dataclasses import replace

import pytest

from evals.claims.circuit import evaluate_circuit
from sparse.circuits.score import circuit_logits
from sparse.tasks.batch import task_nats

FEW = {"draws": 19, "max_pairs": 12, "facts": False}


@pytest.fixture(scope="module")
def evaluated(tiny, quotes, nonsense):
    return evaluate_circuit(tiny.sparse, quotes, tiny.tokenizer, nonsense=nonsense, **FEW)


def test_a_circuit_that_was_found_is_sufficient_and_necessary(evaluated, nonsense):
    assert [claim.kind for claim in evaluated.claims] == ["sufficient", "necessary"]
    assert [claim.outcome for claim in evaluated.claims] == ["positive", "positive"]
    assert "namesake.nonsense" in {c.key for claim in evaluated.claims for c in claim.conditions}


def test_its_rows_are_losses_and_sizes_beside_random_circuits(
    evaluated, tiny, quotes, nonsense, batch_of
):
    rows = {row.key: row for row in evaluated.rows}
    batch = batch_of(quotes.task, pairs=12)
    logits = circuit_logits(tiny.sparse, batch, quotes.masks(), quotes.ablation)
    loss = float(task_nats(logits, batch).mean().detach())
    assert rows["circuit.sufficiency"].value == pytest.approx(loss, abs=1e-5)
    assert rows["circuit.sufficiency"].control > 2 * loss
    assert rows["circuit.necessity"].value > 2 * rows["circuit.necessity"].control
    assert rows["circuit.nodes"].value == len(quotes)
    assert rows["circuit.nodes"].control == len(nonsense)
    assert rows["circuit.edges"].value == len(quotes.edges(tiny.sparse))


def test_asked_on_another_task_it_is_no_circuit(tiny, quotes, nonsense, found):
    other = found["indent_for"].task
    asked = evaluate_circuit(
        tiny.sparse, quotes, tiny.tokenizer, nonsense=nonsense, task=other, **FEW
    )
    assert {claim.task for claim in asked.claims} == {"indent_for"}
    assert [claim.outcome for claim in asked.claims] == ["negative", "negative"]


def test_facts_are_rows_of_their_own(tiny, quotes, nonsense, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "evals.claims.circuit.twin_facts", lambda *a, **k: asked.append((a, k)) or []
    )
    options = {**FEW, "facts": True, "draws": 1}
    evaluate_circuit(tiny.sparse, quotes, tiny.tokenizer, nonsense=nonsense, **options)
    assert len(asked) == 1 and asked[0][0][1] is quotes


def test_a_circuit_of_another_model_is_refused(tiny, quotes, nonsense):
    stranger = replace(quotes, model_fingerprint="0")
    with pytest.raises(ValueError, match="fingerprint"):
        evaluate_circuit(tiny.sparse, stranger, tiny.tokenizer, nonsense=nonsense)
