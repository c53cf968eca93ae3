"""An intervention is a value: it says the same however often it is asked, and whoever made it."""

import jaxtyping
import pytest
import torch

from bridges import Ablation, Steering, load_run, map_circuit
from sparse.circuits.graph import Node


@pytest.fixture(scope="module")
def mapped():
    run = load_run("tiny")
    return map_circuit(run.circuits()["single_double_quote"], run.dense)


@pytest.fixture(scope="module")
def batch(mapped):
    batch = mapped.circuit.task.batch(mapped.tokenizer, "test")
    return batch.take(torch.arange(2))


def test_nodes_from_a_generator_are_there_the_second_time_too(mapped, batch):
    nodes = list(mapped.circuit)[:9]
    for make in (Ablation, lambda some: Steering(batch.counterfactual(), some)):
        once = make(node for node in nodes)
        first, second = (mapped.delta(once, batch.ids) for _ in range(2))
        assert first.norm() > 0 and torch.equal(first, second)
        assert torch.equal(first, mapped.delta(make(nodes), batch.ids))


def test_ablations_of_the_same_nodes_are_equal_and_can_be_kept_in_a_set():
    nodes = [Node("0.attn.q", 1), Node("0.attn.q", 2)]
    assert Ablation(nodes) == Ablation(tuple(nodes)) == Ablation(iter(nodes))
    assert len({Ablation(nodes), Ablation(tuple(nodes)), Ablation(nodes, "zero")}) == 2


def test_a_kind_in_the_place_of_nodes_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks
    with pytest.raises(ValueError, match="nodes='zero' is a text; give nodes, or None"):
        Ablation("zero")


@pytest.mark.parametrize("what", [Ablation, [Node("0.attn.q", 1)], None])
def test_what_is_no_intervention_is_told_what_is(mapped, batch, what, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks
    for call in (mapped.edits_of, mapped.delta):
        with pytest.raises(
            ValueError, match=r"is no intervention; give Ablation\(nodes, kind\) or"
        ):
            call(what, batch.ids)


def test_no_nodes_at_all_change_nothing(mapped, batch):
    assert mapped.delta(Ablation([]), batch.ids).abs().max() == 0
    assert torch.equal(mapped.ablate(batch.ids, []), mapped.dense.logits(batch.ids))
