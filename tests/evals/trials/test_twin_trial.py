"""Laws of a trial in the sparse model: what is held, for which pair, and by which draws."""

import math

import pytest
import torch

from evals.trials import twin_trial as module
from evals.trials.twin_trial import TwinTrial, measuring
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import nodes_of
from sparse.circuits.mask import masked
from sparse.circuits.score import circuit_logits, last_logits
from sparse.tasks.batch import task_nats


@pytest.fixture(scope="module")
def trial(twin_trial, quotes):
    return twin_trial(quotes, 12)


@pytest.fixture(autouse=True)
def without_gradients(trial):
    with measuring(trial.model):
        yield


@pytest.fixture
def everything(quotes) -> Circuit:
    return quotes.with_nodes(nodes_of(quotes.ablation), "all")


@pytest.fixture
def seen(monkeypatch):
    """The masks of every run, in the order of the runs."""
    masks = []

    def spy(model, batch, keep, ablation):
        masks.append({at: m.clone() for at, m in keep.items()})
        return circuit_logits(model, batch, keep, ablation)

    monkeypatch.setattr(module, "circuit_logits", spy)
    return masks


def test_losses_are_means_over_the_two_contexts_of_each_pair(trial, quotes):
    nats = task_nats(last_logits(trial.model, trial.batch), trial.batch)
    n = trial.batch.n_pairs
    for pair in range(n):
        assert float(trial.full[pair]) == pytest.approx(float((nats[pair] + nats[pair + n]) / 2))
    logits = circuit_logits(trial.model, trial.batch, quotes.masks(), quotes.ablation)
    alone = task_nats(logits, trial.batch).view(2, n).mean(0)
    torch.testing.assert_close(trial.alone(quotes), alone)


def test_with_nothing_ablated_it_is_the_full_model_exactly(trial, quotes, everything):
    full = task_nats(last_logits(trial.model, trial.batch), trial.batch)
    assert torch.equal(trial.full, full.view(2, -1).mean(0))
    assert torch.equal(trial.stochastic(quotes, 0.0), trial.full)
    assert torch.equal(trial.alone(everything), trial.full)
    assert torch.equal(trial.stochastic(everything, 0.5), trial.full)
    assert torch.equal(trial.without(quotes.with_nodes([], "none")), trial.full)
    assert not torch.allclose(trial.stochastic(quotes, 0.5), trial.full, atol=1e-3)  # control


def test_with_all_else_ablated_it_is_mean_ablation_exactly(trial, quotes):
    assert torch.equal(trial.stochastic(quotes, 1.0), trial.alone(quotes))
    assert not torch.equal(trial.stochastic(quotes, 0.9), trial.alone(quotes))  # control


def test_without_a_circuit_is_the_complement_alone(trial, quotes, everything):
    assert torch.equal(trial.without(quotes), trial.alone(everything - quotes))
    assert trial.without(quotes).mean() > trial.alone(quotes).mean() + 0.3  # control


def test_a_circuit_s_own_nodes_are_never_ablated(trial, quotes, seen):
    trial.stochastic(quotes, 0.5)
    for keep in seen:
        for at, i in quotes:
            assert keep[at][..., i].all()


def test_the_share_of_ablated_nodes_is_p_in_every_location(trial, quotes, seen):
    for p in (0.1, 0.25, 0.5):
        seen.clear()
        trial.stochastic(quotes, p)
        held = outside = 0
        for keep in seen:
            for at, own in quotes.masks().items():
                there = ~keep[at][..., ~own]
                held, outside = held + int(there.sum()), outside + there.numel()
                error = (p * (1 - p) / there.numel()) ** 0.5
                assert abs(float(there.float().mean()) - p) < 6 * error  # two rows share a draw
        assert abs(held / outside - p) < 0.01


def test_every_pair_has_its_own_draw_and_its_two_contexts_share_it(trial, quotes, seen):
    trial.stochastic(quotes, 0.5)
    n = trial.batch.n_pairs
    assert len(seen) == module.N_MASKS
    for keep in seen:
        for mask in keep.values():
            assert mask.shape[:2] == (2 * n, 1) and torch.equal(mask[:n], mask[n:])
        rows = {tuple(keep["0.mlp.post_act"][i, 0].tolist()) for i in range(n)}
        assert len(rows) == n
    at = "0.mlp.post_act"
    assert not torch.equal(seen[0][at], seen[1][at])  # every forward has other draws


def test_two_circuits_and_all_shares_are_compared_under_the_same_draws(
    trial, quotes, nonsense, seen
):
    """Whether a node outside both is held does not depend on the circuit; more are as p grows."""
    trial.stochastic(quotes, 0.25)
    trial.stochastic(nonsense, 0.25)
    trial.stochastic(quotes, 0.5)
    own, other, more = seen[:2], seen[2:4], seen[4:]
    a, b = quotes.masks(), nonsense.masks()
    for i in range(2):
        for at in a:
            outside = ~a[at] & ~b[at]
            assert torch.equal(own[i][at][..., outside], other[i][at][..., outside])
            assert not (more[i][at] & ~own[i][at]).any()  # held at 0.25, so held at 0.5
    seen.clear()
    TwinTrial(trial.model, trial.batch, seed=1).stochastic(quotes, 0.25)
    at = "0.mlp.post_act"
    assert not torch.equal(seen[0][at], own[0][at])  # control: another seed
    assert not torch.equal(seen[0][at], own[1][at])


def test_a_mask_for_each_row_is_each_row_run_with_its_own_mask(trial, quotes):
    batch = trial.batch.take(torch.arange(3))
    rng = torch.Generator().manual_seed(0)
    n = len(batch.ids)
    rows = {at: torch.rand(n, 1, len(x), generator=rng) < 0.7 for at, x in quotes.ablation.items()}
    together = circuit_logits(trial.model, batch, rows, quotes.ablation)
    for row in range(n):
        keep = {at: mask[row, 0] for at, mask in rows.items()}
        alone = circuit_logits(trial.model, batch, keep, quotes.ablation)[row]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    first = circuit_logits(
        trial.model, batch, {at: m[0, 0] for at, m in rows.items()}, quotes.ablation
    )
    assert (together[1:] - first[1:]).abs().max() > 0.1  # control: one row's mask for all


def test_equal_masks_for_every_row_are_one_mask_bit_for_bit(trial, quotes):
    n, masks = len(trial.batch.ids), quotes.masks()
    rows = {at: mask.repeat(n, 1, 1) for at, mask in masks.items()}
    one = circuit_logits(trial.model, trial.batch, masks, quotes.ablation)
    assert torch.equal(circuit_logits(trial.model, trial.batch, rows, quotes.ablation), one)
    kept = {at: torch.ones_like(mask) for at, mask in rows.items()}
    with masked(trial.model, kept, quotes.ablation):
        assert torch.equal(last_logits(trial.model, trial.batch), last_logits_of(trial))


def last_logits_of(trial):
    return trial.model.last_logits(trial.batch.ids, trial.batch.last)


def test_nonsense_is_farther_from_the_model_than_the_circuit(trial, quotes, random_of):
    """The measure that tells them apart: true circuits stay near the model at p = 0.25."""
    own = float(trial.full.mean())
    near = abs(float(trial.stochastic(quotes, 0.25).mean()) - own)
    far = abs(float(trial.stochastic(random_of(quotes), 0.25).mean()) - own)
    assert near < 0.1 < far and math.isfinite(far)
