"""Laws of a circuit's scores: whole and empty circuits, and one that was really found."""

from dataclasses import replace

import pytest
import torch

from bridges import load_run
from evals.claims.circuit import evaluate_circuit, nonsense_at_size
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.learn import learn
from sparse.circuits.pruning.prune import prune
from sparse.tasks.batch import task_nats
from sparse.tasks.nonsense import easier_nonsense, exchanged

QUICK = PruneConfig(ablation="zero", n_steps=80, lr=5e-2, clean_up=0.0, target_loss=0.3)


def named(rows):
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def found(sparse, task, dense):
    return prune(sparse, task, QUICK, tokenizer=dense.tokenizer, force=True)


def test_the_whole_model_is_a_sufficient_circuit_and_so_is_its_control(
    sparse, everything, task, dense
):
    batch = task.batch(dense.tokenizer, "test")
    full = float(task_nats(batch.scored(sparse(batch.ids).logits), batch).mean())
    rows = named(evaluate_circuit(sparse, everything, dense.tokenizer, draws=3))
    row = rows["sufficiency, zero ablation"]
    assert row.value == pytest.approx(full, abs=1e-5)
    assert row.detail["full model"] == pytest.approx(full, abs=1e-5)
    assert row.gap == pytest.approx(0, abs=1e-9)
    assert (row.rank, row.n) == (0, batch.n_pairs)
    assert row.outcome == "indistinguishable"
    assert rows["KL(full || circuit)"].value == pytest.approx(0, abs=1e-6)
    assert rows["necessity"].value == pytest.approx(row.detail["everything ablated"], abs=1e-6)


def test_a_circuit_that_was_found_beats_random_ones_and_is_necessary():
    run = load_run("tiny")
    circuit = run.circuits()["while_return_true"]
    rows = named(evaluate_circuit(run.sparse, circuit, run.tokenizer, draws=20))
    assert rows["sufficiency, mean ablation"].outcome == "beats"
    assert rows["necessity"].outcome == "beats"
    assert rows["edges among its nodes"].value == len(circuit.edges(run.sparse))
    assert rows["nodes"].control == circuit.n_total


def test_without_means_there_is_no_row_of_mean_ablation(sparse, found, dense):
    rows = named(evaluate_circuit(sparse, found, dense.tokenizer, draws=2))
    assert "mean ablation" not in " ".join(rows)


def test_control_a_random_circuit_is_called_nothing(sparse, found, dense):
    rows = named(evaluate_circuit(sparse, found.random(sparse, 99), dense.tokenizer, draws=20))
    assert rows["sufficiency, zero ablation"].outcome != "beats"


def test_the_second_kind_of_ablation_is_a_row_of_its_own(sparse, found, dense):
    means = {at: torch.full((n,), 0.1) for at, n in sparse.node_widths().items()}
    rows = named(evaluate_circuit(sparse, found, dense.tokenizer, draws=2, means=means))
    zero, mean = (rows[f"sufficiency, {kind} ablation"] for kind in ("zero", "mean"))
    assert zero.value != mean.value


def test_the_nonsense_twin_of_equal_size_stands_beside_the_circuit(sparse, found, dense):
    twin = nonsense_at_size(sparse, found, dense.tokenizer)
    assert len(twin) == len(found) and twin.task.name == "single_double_quote:nonsense"
    rows = evaluate_circuit(sparse, found, dense.tokenizer, draws=2, equal_size=twin)
    row = next(r for r in rows if r.name.startswith("nonsense twin"))
    assert f"{len(found)} nodes" in row.name and row.n_draws == 1
    assert row.outcome == "beats"
    # what `prune` found may have that very size: still one row of that name, as a report needs
    again = evaluate_circuit(
        sparse, found, dense.tokenizer, draws=2, equal_size=twin, nonsense=twin.random(sparse, 1)
    )
    assert [r for r in again if r.name.startswith("nonsense twin")] == [row]


def test_the_ranking_of_the_pruned_twin_saves_learning_it_again(sparse, found, dense, monkeypatch):
    learned = nonsense_at_size(sparse, found, dense.tokenizer)
    easier = easier_nonsense(found.task, sparse, dense.tokenizer)
    assert learned.task == easier
    twin = prune(sparse, easier, QUICK, tokenizer=dense.tokenizer, force=True)
    unlike = replace(twin, config=twin.config | {"n_steps": 81})
    calls = []
    monkeypatch.setattr("evals.claims.circuit.learn", lambda *a: calls.append(a) or learn(*a))
    assert nonsense_at_size(sparse, found, dense.tokenizer, twin).nodes == learned.nodes
    turned = replace(twin, task=exchanged(easier))  # found in the other direction: taken as it is
    same = nonsense_at_size(sparse, found, dense.tokenizer, turned)
    assert same.task == turned.task and same.nodes == learned.nodes
    assert not calls
    for other in (None, unlike, replace(twin, ranking={}), replace(twin, task=found.task)):
        assert nonsense_at_size(sparse, found, dense.tokenizer, other).nodes == learned.nodes
    assert len(calls) == 4


def test_a_circuit_of_another_model_is_refused(sparse, found, dense):
    with pytest.raises(ValueError, match="fingerprint"):
        evaluate_circuit(sparse, replace(found, model_fingerprint="0"), dense.tokenizer)
