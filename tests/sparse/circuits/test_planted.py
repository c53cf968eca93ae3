"""Planted truths: the circuit that was planted does the task, alone, and nothing else does."""

import math
from collections import Counter
from functools import cache
from random import Random

import pytest
import torch

from sparse import last_logits, plant, task_nats
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.circuits.planted import LEAST, Planted
from sparse.circuits.planted_wires import views
from sparse.circuits.score import circuit_logits
from sparse.circuits.taps import recorded
from sparse.tasks.batch import TaskBatch, logit_difference

SEEDS = (0, 1, 2)
CASES = [(seed, name) for seed in SEEDS for name in ("first", "second")]
CHANCE = math.log(2)
planted_of = cache(plant)
each_truth = pytest.mark.parametrize(("seed", "name"), CASES)


@cache
def batch_of(seed: int, name: str) -> TaskBatch:
    planted = planted_of(seed)
    return planted.tasks[name].batch(planted.tokenizer, "test")


def without(planted: Planted, batch: TaskBatch, circuit: Circuit) -> torch.Tensor:
    """The logits with the nodes of `circuit` at their means."""
    keep = {at: ~mask for at, mask in circuit.masks().items()}
    return circuit_logits(planted.model, batch, keep, planted.means)


def alone(planted: Planted, batch: TaskBatch, circuit: Circuit) -> torch.Tensor:
    """The logits with all other nodes at their means."""
    return circuit_logits(planted.model, batch, circuit.masks(), planted.means)


def stochastic(planted: Planted, batch: TaskBatch, circuit: Circuit, p: float) -> float:
    """The task loss with a share p of the nodes outside `circuit` at their means."""
    losses = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        keep = {
            at: mask | (torch.rand(len(mask), generator=g) >= p)
            for at, mask in circuit.masks().items()
        }
        logits = circuit_logits(planted.model, batch, keep, planted.means)
        losses.append(task_nats(logits, batch).mean())
    return float(torch.stack(losses).mean())


def nats(logits: torch.Tensor, batch: TaskBatch) -> float:
    return float(task_nats(logits, batch).mean())


def matched(planted: Planted, batch: TaskBatch, circuit: Circuit, seed: int) -> list[Node]:
    """Distractors at the circuit's locations, each of the ten that are about as active."""
    with recorded(planted.model) as values:
        planted.model.residuals(batch.ids)
    rng, nodes = Random(seed), []
    for at, indices in circuit.nodes.items():
        active = values[at][batch.real].std(0)
        free = list(planted.distractors[at])
        for i in indices:
            near = sorted(free, key=lambda j, i=i, a=active: abs(float(a[j] - a[i])))[:10]
            free.remove(chosen := rng.choice(near))
            nodes.append(Node(at, chosen))
    return nodes


@each_truth
def test_the_model_does_its_task_and_is_at_chance_without_the_wires_to_the_targets(seed, name):
    planted, batch = planted_of(seed), batch_of(seed, name)
    assert nats(last_logits(planted.model, batch), batch) < 0.1
    unembed, kept = views(planted.model)["unembed"], views(planted.model)["unembed"].clone()
    for wire in planted.wires[name]:
        if wire.matrix == "unembed":
            unembed[wire.row, wire.column] = 0.0
    cut = nats(last_logits(planted.model, batch), batch)
    unembed.copy_(kept)
    assert cut > 0.99 * CHANCE


@each_truth
def test_the_circuit_alone_does_the_task_and_control_as_many_distractors_do_not(seed, name):
    planted, batch = planted_of(seed), batch_of(seed, name)
    circuit, nonsense = planted.circuits[name], planted.nonsense(name)
    assert circuit.met and nats(alone(planted, batch, circuit), batch) < 0.05
    assert nats(alone(planted, batch, nonsense), batch) > 0.99 * CHANCE


@each_truth
def test_under_stochastic_ablation_the_circuit_stays_with_its_model_and_nonsense_does_not(
    seed, name
):
    planted, batch = planted_of(seed), batch_of(seed, name)
    full = nats(last_logits(planted.model, batch), batch)
    for p in (0.1, 0.25, 0.5):
        assert abs(stochastic(planted, batch, planted.circuits[name], p) - full) < 0.05
    assert stochastic(planted, batch, planted.nonsense(name), 0.25) > full + 0.1


@each_truth
def test_without_the_circuit_the_task_is_lost_and_without_matched_nodes_it_is_not(seed, name):
    planted, batch = planted_of(seed), batch_of(seed, name)
    circuit = planted.circuits[name]
    assert nats(without(planted, batch, circuit), batch) > 0.99 * CHANCE
    for draw in range(5):
        other = circuit.with_nodes(matched(planted, batch, circuit, draw), "matched")
        assert len(other) == len(circuit) and not len(other & circuit)
        assert nats(without(planted, batch, other), batch) < 0.1


@each_truth
def test_every_node_of_the_circuit_matters_and_no_distractor_does(seed, name):
    planted, batch = planted_of(seed), batch_of(seed, name)
    circuit = planted.circuits[name]
    margin = logit_difference(last_logits(planted.model, batch), batch).mean()

    def lost(node: Node) -> float:
        one = circuit.with_nodes([node], "one node")
        logits = without(planted, batch, one)
        return float(1 - logit_difference(logits, batch).mean() / margin)

    assert min(map(lost, circuit)) > 0.15
    assert max(map(lost, matched(planted, batch, circuit, 0))) < 0.05


@each_truth
def test_a_circuit_is_of_its_own_task_only(seed, name):
    planted = planted_of(seed)
    (other,) = set(planted.tasks) - {name}
    batch = batch_of(seed, other)
    assert planted.tasks[name].family != planted.tasks[other].family
    assert not len(planted.circuits[name] & planted.circuits[other])
    assert nats(without(planted, batch, planted.circuits[name]), batch) < 0.1


@each_truth
def test_distractors_move_the_logits_of_other_words_and_the_circuit_does_not(seed, name):
    planted, batch = planted_of(seed), batch_of(seed, name)
    nodes = [Node(at, i) for at, ix in planted.distractors.items() for i in ix]
    rest = torch.ones(planted.model.vocab_size, dtype=torch.bool)
    rest[[int(batch.target[0]), int(batch.foil[0])]] = False

    def apart(circuit: Circuit) -> float:
        p, q = (
            x[:, rest].log_softmax(-1)
            for x in (last_logits(planted.model, batch), without(planted, batch, circuit))
        )
        return float((p.exp() * (p - q)).sum(-1).mean())

    circuit = planted.circuits[name]
    moved = apart(circuit.with_nodes(nodes, "all distractors"))
    assert moved > 0.05 and apart(circuit) < 0.2 * moved


@each_truth
def test_there_are_ten_distractors_for_every_node_at_its_location(seed, name):
    planted = planted_of(seed)
    for at, indices in planted.circuits[name].nodes.items():
        assert len(planted.distractors[at]) >= 10 * len(indices)
        assert not set(planted.distractors[at]) & set(indices)


@each_truth
def test_the_nonsense_circuit_has_as_many_distractors_at_each_location(seed, name):
    planted = planted_of(seed)
    circuit, nonsense = planted.circuits[name], planted.nonsense(name)
    count = {at: len(indices) for at, indices in circuit.nodes.items()}
    assert count == {at: len(indices) for at, indices in nonsense.nodes.items()}
    assert all(set(ix) <= set(planted.distractors[at]) for at, ix in nonsense.nodes.items())
    assert nonsense.task == planted.tasks[name].nonsense()
    assert nonsense.task.batch(planted.tokenizer, "test").n_pairs == 64
    assert set(nonsense.resized(len(nonsense))) == set(nonsense)
    assert set(circuit.resized(len(circuit))) == set(circuit)
    assert not len(nonsense.resized(3 * len(nonsense)) & circuit)


@each_truth
def test_the_circuits_edges_are_wires_of_its_path(seed, name):
    planted = planted_of(seed)
    wires = Counter(round(wire.value, 5) for wire in planted.wires[name])
    edges = Counter(round(e.weight, 5) for e in planted.circuits[name].edges(planted.model))
    assert edges.total() >= 4 and edges <= wires


@each_truth
def test_only_the_cue_differs_between_contexts_and_it_stands_far_before_the_end(seed, name):
    batch = batch_of(seed, name)
    differs = batch.ids != batch.counterfactual()
    assert (differs.sum(1) == 1).all()
    assert (batch.last - differs.int().argmax(1) >= 6).all()
    assert batch.told_by_last_token() == 0


@each_truth
def test_no_frame_and_no_word_is_in_two_splits_and_few_pairs_have_many_of_both(seed, name):
    task = planted_of(seed).tasks[name]
    for factor in ("frame", "word"):
        levels = [
            {p.groups[factor] for p in task.pairs(s)} for s in ("train", "validation", "test")
        ]
        assert not set.intersection(*levels) and len(set.union(*levels)) == 24
        assert len({p.groups[factor] for p in task.test[:24]}) == 8
    batch = batch_of(seed, name)
    frames = set(zip(batch.groups["frame"], batch.last.tolist(), strict=False))
    assert min(Counter(last for _, last in frames).values()) >= 4  # equally long frames


@pytest.mark.parametrize("seed", SEEDS)
def test_the_model_is_weight_sparse_and_predicts_its_text_better_than_word_frequencies(seed):
    planted = planted_of(seed)
    matrices = list(views(planted.model).values())
    kept = sum(int((w != 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)
    assert 0.01 < kept < 0.05
    y = planted.model(planted.heldout).logits[:, :-1].log_softmax(-1)
    loss = -y.gather(-1, planted.heldout[:, 1:, None]).mean()
    counts = torch.bincount(planted.heldout.flatten()).double()
    frequency = counts[counts > 0] / counts.sum()
    assert loss < -(frequency * frequency.log()).sum() - 0.1


def test_a_seed_draws_everything_and_the_same_seed_draws_the_same():
    again = plant(0)
    assert again.model.fingerprint() == planted_of(0).model.fingerprint()
    assert again.circuits["first"].nodes == planted_of(0).circuits["first"].nodes
    truths = [planted_of(seed) for seed in SEEDS]
    for part in (
        lambda t: t.model.fingerprint(),
        lambda t: str(t.circuits["first"].nodes),
        lambda t: t.tasks["first"].test[0].target_1,
        lambda t: t.tasks["first"].test[0].context_1,
        lambda t: str(t.heldout[0].tolist()),
    ):
        assert len(set(map(part, truths))) == len(SEEDS)


def test_a_model_without_room_is_refused():
    for name, least in LEAST.items():
        with pytest.raises(ValueError, match=f"{name}.*the least are"):
            plant(0, **{name: least - 1})
    with pytest.raises(ValueError, match="take at most"):
        plant(0, n_words=40)
    with pytest.raises(ValueError, match="no task 'third'"):
        planted_of(0).nonsense("third")


def test_settings_do_what_they_say():
    small = plant(0, n_frames=4, n_words=6, margin=3.0)
    assert small.tasks["first"].levels("test") == {"frame": 4, "word": 6}
    batch = small.tasks["first"].batch(small.tokenizer, "train")
    margin = logit_difference(last_logits(small.model, batch), batch).mean()
    assert float(margin) == pytest.approx(3.0, rel=0.02)
    quiet, loud = (plant(0, distraction=x) for x in (0.3, 1.0))
    energy = [float(t.model.residuals(t.heldout)[-1].square().mean()) for t in (quiet, loud)]
    assert energy[0] < energy[1]
