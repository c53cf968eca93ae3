"""Planted pairs: what is true of the sparse model is true of the dense one, and of a decoy not."""

import math
from functools import cache

import pytest
import torch

from bridges import PlantedPair, map_circuit, plant_pair
from bridges.transfer.dense_circuit import DenseCircuit
from bridges.transfer.intervention import Steering
from dense import DenseModel
from sparse import task_nats
from sparse.circuits.graph import Node, nodes_of
from sparse.tasks.batch import TaskBatch, logit_difference

SEEDS = (0, 1, 2)
CASES = [(seed, name) for seed in SEEDS for name in ("first", "second")]
CHANCE = math.log(2)
pair_of = cache(plant_pair)
each_truth = pytest.mark.parametrize(("seed", "name"), CASES)


def batch_of(pair: PlantedPair, name: str) -> TaskBatch:
    return pair.tasks[name].batch(pair.tokenizer, "test")


@cache
def mapped_of(seed: int, name: str, decoy: bool) -> DenseCircuit:
    pair = pair_of(seed, decoy=decoy)
    return map_circuit(pair.circuits()[name], pair.dense, pair.bridges, sparse_model=pair.sparse)


def p_other(logits: torch.Tensor, batch: TaskBatch) -> float:
    """The mean probability of the other context's target, of the two targets."""
    return float(torch.sigmoid(-logit_difference(logits, batch)).mean())


def share(mapped: DenseCircuit, batch: TaskBatch, edited: torch.Tensor) -> float:
    """How far an edit brings P(other target) to what the full patch from the other prompt gives."""
    dense = mapped.dense
    before = p_other(dense.last_logits(batch.ids, batch.last), batch)
    full = p_other(dense.last_logits(batch.counterfactual(), batch.last), batch)
    return (p_other(edited.squeeze(1), batch) - before) / (full - before)


def steered(mapped: DenseCircuit, batch: TaskBatch) -> float:
    at = batch.last[:, None]
    return share(mapped, batch, mapped.steer(batch.ids, batch.counterfactual(), positions=at))


def ablated(mapped: DenseCircuit, batch: TaskBatch) -> float:
    logits = mapped.ablate(batch.ids, positions=batch.last[:, None]).squeeze(1)
    return float(task_nats(logits, batch).mean())


def unexplained(got: torch.Tensor, true: torch.Tensor) -> float:
    """The fraction of the variance of `true` that `got` leaves unexplained."""
    spread = (true - true.flatten(0, 1).mean(0)).square().sum()
    return float((got - true).square().sum() / spread)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_noise_the_dense_model_is_the_sparse_one_and_the_bridges_are_exact(seed):
    pair = pair_of(seed, noise=0.0)
    ids = pair.heldout()
    y = pair.sparse(ids).logits
    torch.testing.assert_close(pair.dense.logits(ids), y, atol=1e-4, rtol=0)
    assert (pair_of(seed).dense.logits(ids) - y).abs().max() > 1e-2  # control: with noise
    stream = zip(pair.sparse.residuals(ids), pair.dense.residuals(ids), strict=True)
    for site, (z, h) in enumerate(stream):
        torch.testing.assert_close(pair.bridges.encode(site, h), z, atol=1e-4, rtol=0)
        torch.testing.assert_close(pair.bridges.decode(site, z), h, atol=1e-4, rtol=0)
        wrong = pair.bridges.decode(site, z.roll(1, -1))  # control: channels permuted
        assert unexplained(wrong, h) > 1


@each_truth
def test_steering_with_the_circuit_flips_the_dense_answer_and_in_a_decoy_it_does_not(seed, name):
    truth, decoy = mapped_of(seed, name, False), mapped_of(seed, name, True)
    batch = batch_of(pair_of(seed), name)
    assert steered(truth, batch) > 0.9
    assert abs(steered(decoy, batch)) < 0.05


@each_truth
def test_ablating_the_circuit_costs_the_dense_answer_and_in_a_decoy_it_does_not(seed, name):
    truth, decoy = mapped_of(seed, name, False), mapped_of(seed, name, True)
    batch = batch_of(pair_of(seed), name)
    for mapped in (truth, decoy):
        before = mapped.dense.last_logits(batch.ids, batch.last)
        assert float(task_nats(before, batch).mean()) < 0.1
    assert ablated(truth, batch) > 0.5 * CHANCE
    assert ablated(decoy, batch) < 0.1


def unrelated(batch: TaskBatch) -> torch.Tensor:
    """For every prompt one of the other kind and of its length, with another frame and word."""
    frame, word, n = batch.groups["frame"], batch.groups["word"], batch.n_pairs
    found = []
    for i in range(n):
        fit = [
            j
            for j in range(n)
            if frame[j] != frame[i] and word[j] != word[i] and batch.last[j] == batch.last[i]
        ]
        found.append(fit[7 * i % len(fit)])
    return torch.cat([batch.ids[n:][found], batch.ids[:n][found]])


@each_truth
def test_values_from_an_unrelated_prompt_carry_the_answer_and_little_else(seed, name):
    truth, batch = mapped_of(seed, name, False), batch_of(pair_of(seed), name)
    source, at = unrelated(batch), batch.last[:, None]
    everything = nodes_of(truth.circuit.ablation)
    want = truth.dense.last_logits(batch.counterfactual(), batch.last).log_softmax(-1)

    def carried(nodes: list[Node], site: int) -> tuple[float, float]:
        """The share, and KL(the dense model on the other prompt of the pair || edited)."""
        y = truth.steer(batch.ids, source, nodes, site, positions=at)
        kl = (want.exp() * (want - y.squeeze(1).log_softmax(-1))).sum(-1).mean()
        return share(truth, batch, y), float(kl)

    circuit, whole = (
        max(carried(nodes, site) for site in range(5))
        for nodes in (list(truth.circuit), everything)
    )
    assert circuit[0] > 0.9 and whole[0] > 0.9
    assert circuit[1] < 0.5 * whole[1]


@each_truth
def test_the_nonsense_circuit_and_a_turned_delta_do_not_flip_the_answer(seed, name):
    pair, batch = pair_of(seed), batch_of(pair_of(seed), name)
    nonsense = map_circuit(
        pair.circuits()[f"{name}:nonsense"], pair.dense, pair.bridges, sparse_model=pair.sparse
    )
    assert abs(steered(nonsense, batch)) < 0.1
    truth = mapped_of(seed, name, False)
    delta = truth.delta(Steering(batch.counterfactual()), batch.ids)
    turn = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0]
    assert truth.site is not None
    h, at = pair.dense.residuals(batch.ids)[truth.site], batch.last[:, None]
    turned, own = (
        share(truth, batch, pair.dense.resume(truth.site, h + d, batch.ids, positions=at))
        for d in (delta @ turn, delta)
    )
    assert own == pytest.approx(steered(truth, batch), abs=1e-3)
    assert abs(turned) < 0.1


@each_truth
def test_ablating_the_circuit_spares_the_other_task(seed, name):
    (other,) = {"first", "second"} - {name}
    batch = batch_of(pair_of(seed), other)
    assert ablated(mapped_of(seed, name, False), batch) < 0.1


@pytest.mark.parametrize("decoy", [False, True], ids=["truth", "decoy"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bridges_look_good_whether_the_circuit_is_true_or_not(seed, decoy):
    pair = pair_of(seed, decoy=decoy)
    ids = pair.heldout()
    stream = zip(pair.sparse.residuals(ids), pair.dense.residuals(ids), strict=True)
    for site, (z, h) in enumerate(stream):
        assert unexplained(pair.bridges.encode(site, h), z) < 0.05
        assert unexplained(pair.bridges.decode(site, z), h) < 0.1
    pair.bridges.check(pair.dense, pair.sparse)
    assert pair.bridges.dense_fingerprint == pair.dense.fingerprint


@pytest.mark.parametrize("decoy", [False, True], ids=["truth", "decoy"])
def test_the_dense_model_has_no_zero_weight_and_every_site(decoy):
    pair = pair_of(0, decoy=decoy)
    matrices = [p for p in pair.dense.model.parameters() if p.ndim == 2]
    assert all((p != 0).all() for p in matrices)
    assert (pair.sparse.lm_head.weight == 0).any()  # control: the sparse one has zeros
    assert pair.dense.n_sites == pair.sparse.n_sites == 5 and pair.dense.has_mid
    again = DenseModel(pair.dense.model, pair.tokenizer)  # its sites are proven anew
    assert again.fingerprint == pair.dense.fingerprint


def test_a_truth_and_its_decoy_have_one_sparse_side_and_one_shape():
    truth, decoy = pair_of(0), pair_of(0, decoy=True)
    assert truth.sparse.fingerprint() == decoy.sparse.fingerprint()
    assert truth.dense.fingerprint != decoy.dense.fingerprint
    shapes = [{n: p.shape for n, p in x.dense.model.named_parameters()} for x in (truth, decoy)]
    assert shapes[0] == shapes[1]


def test_noise_grows_what_the_bridges_leave_unexplained():
    left = []
    for noise in (0.0, 0.05, 0.2):
        pair = pair_of(0, noise=noise)
        z, h = pair.sparse.residuals(pair.heldout())[-1], pair.dense.residuals(pair.heldout())[-1]
        left.append(unexplained(pair.bridges.decode(4, z), h))
    assert left[0] < 1e-6 < left[1] < left[2]


def test_seeds_differ_and_a_seed_is_the_same_again():
    marks = {pair_of(seed).dense.fingerprint for seed in SEEDS}
    assert len(marks) == len(SEEDS)
    assert plant_pair(0).dense.fingerprint in marks
    assert len({str(pair_of(seed).circuits()["first"].nodes) for seed in SEEDS}) == len(SEEDS)


def test_a_pair_has_what_a_run_has():
    pair = pair_of(0)
    assert list(pair.circuits()) == ["first", "second", "first:nonsense", "second:nonsense"]
    assert pair.prefix == () and pair.skipped() == {}
    assert pair.manifest["dense"]["name"] == "planted copy 0"
    assert pair.heldout().shape == (64, 16)


def test_a_width_that_does_not_fit_is_refused():
    assert plant_pair(0, width=144).dense.d_resid == 144
    for width in (100, 112):
        with pytest.raises(ValueError, match="take a multiple of 8, at least 120"):
            plant_pair(0, width=width)
    with pytest.raises(ValueError, match="must be 0 or more"):
        plant_pair(0, noise=-0.1)
