"""Laws of the transfer scores: planted effects, planted nulls, exact norms, one engine."""

import pytest
import torch

from bridges.transfer.intervention import Ablation, Steering
from dense import Edit, run_edited
from evals.claims.transfer import evaluate_transfer, measure_transfer
from evals.claims.trial import WIDEST, Trial
from evals.scores.controls import random_like, rotated


class Planted:
    """A mapped circuit whose delta is `share` of the true dense difference, at one site."""

    def __init__(self, dense, sparse, circuit, share, site=2):
        self.dense, self.sparse, self.circuit, self.site = dense, sparse, circuit, site
        self.share, self.tokenizer = share, dense.tokenizer
        self.engine_error = 0.0

    def delta(self, intervention, ids):
        nodes, h = intervention.nodes, self.dense.residuals(ids)[self.site]
        empty = nodes is not None or self.share is None
        if isinstance(intervention, Ablation):
            return random_like(0.3 * h, 999) if empty else 0.8 * (h.mean((0, 1)) - h)
        true = self.dense.residuals(intervention.other_ids)[self.site] - h
        if empty:
            return random_like(true, 12345 + (len(nodes) if nodes else 0))
        return self.share * true

    def steer(self, ids, counterfactual_ids, strength=1.0, positions=None):
        delta = self.delta(Steering(counterfactual_ids), ids)
        edit = Edit(site=self.site, direction=delta, amount=strength + self.engine_error)
        return run_edited(self.dense, ids, [edit], positions=positions)


FEW: dict = {
    "max_pairs": 10,
    "strengths": (0.5, 1, 2),
    "circuit_draws": 3,
    "node_draws": 3,
    "curve_draws": 4,
}


@pytest.fixture
def plant(dense, sparse, make_circuit):
    circuit = make_circuit({"0.mlp.post_act": (0, 1, 2)})
    return lambda share, site=2: Planted(dense, sparse, circuit, share, site)


@pytest.fixture
def trial(plant, task, dense):
    return Trial(plant(1.0), task, dense.tokenizer, "test", 6)


def test_random_directions_have_the_delta_s_norm_at_every_token():
    delta = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    delta[1, 2] = 0
    drawn = random_like(delta, 3)
    torch.testing.assert_close(drawn.norm(dim=-1), delta.norm(dim=-1))
    assert torch.equal(drawn, random_like(delta, 3)) and not torch.equal(
        drawn, random_like(delta, 4)
    )
    cosines = torch.stack(
        [torch.cosine_similarity(random_like(delta, i), delta, dim=-1)[0] for i in range(300)]
    )
    assert cosines.mean().abs() < 0.03 and 0.15 < cosines.std() < 0.35  # 1/sqrt(16)


def test_a_rotation_keeps_every_length_and_every_angle():
    delta = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    flat, turned = delta.flatten(0, 1), rotated(delta, 1).flatten(0, 1)
    torch.testing.assert_close(turned @ turned.T, flat @ flat.T)
    assert torch.cosine_similarity(flat, turned, dim=-1).abs().mean() < 0.5


class Untrained(Planted):
    """A delta with all the structure of the true one, through a decoder that knows nothing."""

    def delta(self, intervention, ids):
        return rotated(super().delta(intervention, ids), 777)


def test_an_untrained_decoder_does_not_beat_rotations(dense, sparse, make_circuit, task):
    planted = Untrained(dense, sparse, make_circuit({"0.attn.q": (0,)}), 1.0)
    rows = {row.name: row for row in evaluate_transfer(planted, task, draws=30, **FEW)}
    assert rows["steering, strength 1, v. rotations"].outcome != "beats"


def test_the_fast_engine_is_the_nnsight_path(trial):
    for seed in range(3):
        delta = random_like(trial.delta, seed)
        edits = [Edit(site=trial.site, direction=delta)]
        slow = trial.batch.scored(run_edited(trial.dense, trial.ids, edits))
        fast = list(trial.many([delta, 0 * delta, delta]))
        assert (fast[0] - slow).abs().max() < 1e-5 and (fast[2] - slow).abs().max() < 1e-5
        control = list(trial.many([0 * delta]))[0]
        assert (control - slow).abs().max() > 1e-2


def test_strength_zero_is_exactly_the_untouched_model(trial):
    plain = trial.dense.last_logits(trial.ids, trial.batch.last)
    assert torch.equal(trial.logits(0 * trial.delta), plain)
    # one position in the place of all: other shapes, other order of summation
    torch.testing.assert_close(plain, trial.batch.scored(trial.dense.logits(trial.ids)))


def test_deltas_that_are_run_together_answer_as_they_do_alone(trial, monkeypatch):
    deltas = [random_like(trial.delta, seed) for seed in range(5)]
    alone = [trial.logits(delta) for delta in deltas]
    rows = []
    resume = trial.dense.resume

    def counted(site, h, ids, **how):
        rows.append(len(h) // len(trial.ids))
        return resume(site, h, ids, **how)

    monkeypatch.setattr(trial.dense, "resume", counted)
    n, pos = trial.ids.shape
    one = n * (trial.dense.vocab_size + WIDEST * pos * trial.dense.d_resid)
    for room, sizes in (
        (1, [1] * 5),
        (2 * one, [2, 2, 1]),
        (3 * one - 1, [2, 2, 1]),
        (9 * one, [5]),
    ):
        monkeypatch.setattr("evals.claims.trial.NUMBERS_AT_ONCE", room)
        rows.clear()
        for got, want in zip(trial.many(deltas), alone, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert rows == sizes
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # control


def test_a_full_patch_planted_as_a_circuit_beats_every_random_direction(plant, task):
    done = measure_transfer(plant(1.0), task, draws=100, **FEW)
    rows = {row.name: row for row in done.scores}
    row = rows["steering, strength 1, v. directions"]
    assert row.outcome == "beats"
    assert rows["steering, strength 1, v. rotations"].outcome == "beats"
    assert row.value == pytest.approx(row.detail["full activation patch"], abs=1e-5)
    assert row.value > row.detail["untouched"] + 0.1
    assert rows["cosine of delta with the true dense difference"].value == pytest.approx(1)
    assert rows["norm of delta over that of the true difference"].value == pytest.approx(1)


def test_control_a_random_delta_planted_as_a_circuit_beats_nothing(plant, task):
    rows = {row.name: row for row in evaluate_transfer(plant(None), task, draws=30, **FEW)}
    assert rows["steering, strength 1, v. directions"].outcome != "beats"
    assert rows["ablation, v. directions"].outcome != "beats"
    assert abs(rows["cosine of delta with the true dense difference"].value) < 0.1


def test_the_curve_starts_untouched_and_holds_every_draw(plant, task):
    (curve,) = measure_transfer(plant(0.5), task, draws=9, **FEW).curves
    assert curve.x == (0.0, 0.5, 1.0, 2.0)
    draws = [draw for lines in curve.controls.values() for draw in lines]
    assert len(draws) == 4 + 4 + 3 and {draw[0] for draw in draws} == {curve.value[0]}
    patch = curve.references["full activation patch"]
    assert curve.value[3] == pytest.approx(patch[3], abs=1e-5)  # 2 x 0.5 of the difference


def test_the_best_strength_comes_from_validation_and_says_so(plant, task):
    rows = [row.name for row in evaluate_transfer(plant(0.5), task, draws=2, **FEW)]
    assert "steering, strength 2, best on validation, v. directions" in rows


def test_an_engine_that_disagrees_with_the_public_path_is_refused(plant, task):
    broken = plant(1.0)
    broken.engine_error = 0.1
    with pytest.raises(ValueError, match="differ by"):
        evaluate_transfer(broken, task, draws=2, **FEW)


def test_strengths_without_one_are_refused(plant, task):
    with pytest.raises(ValueError, match="hold 1"):
        evaluate_transfer(plant(1.0), task, strengths=(0.5, 2))
