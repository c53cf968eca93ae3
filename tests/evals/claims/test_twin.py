"""Laws of the claims in the sparse model: the true circuit passes, and no empty one does."""

import math

import pytest

from evals.claims.twin import LEAST, NEAR, SHARES, SLACK, necessary, sufficient
from evals.scores.clusters import resampled
from evals.trials.twin_trial import TwinTrial, measuring
from sparse import get_task
from sparse.circuits.graph import nodes_of

K = 19
BOTH = pytest.mark.parametrize("judge", [sufficient, necessary])


@pytest.fixture(scope="module")
def trial(twin_trial, quotes):
    return twin_trial(quotes, 16)


@pytest.fixture(scope="module")
def claims(trial, quotes, nonsense, found):
    names = {"nonsense": nonsense, "if_equals": found["if_equals"]}
    return {judge: judge(trial, quotes, names, draws=K) for judge in (sufficient, necessary)}


@BOTH
def test_the_shipped_circuit_passes_every_condition(claims, judge):
    claim = claims[judge]
    assert claim.outcome == "positive", claim.reason
    assert len(claim.conditions[-1].draws) == K and claim.p == 1 / (K + 1)
    assert claim.key == f"{judge.__name__}/single_double_quote"


def test_its_numbers_are_those_of_the_trial(claims, trial, quotes):
    with measuring(trial.model):
        losses = {p: trial.stochastic(quotes, p) for p in SHARES}
        losses |= {"alone": trial.alone(quotes), "without": trial.without(quotes)}
    found = {what: float(x.double().mean()) for what, x in losses.items()}
    full = float(trial.full.double().mean())
    claim = claims[sufficient]
    assert claim.value == claim["loss"].value == pytest.approx(found["alone"])
    assert claim["loss"].against == pytest.approx(max(quotes.target_loss, full + SLACK))
    assert claim["not_better"].against == pytest.approx(full - SLACK)
    for p in SHARES:
        condition = claim[f"stochastic.{p:g}"]
        assert condition.value == pytest.approx(abs(found[p] - full))
        assert condition.against == NEAR
    claim, room = claims[necessary], math.log(2) - full
    harm = (found["without"] - full) / room
    assert claim.value == claim["harm"].value == pytest.approx(harm)
    assert claim["harm"].against == LEAST == 0.25


def test_a_namesake_is_compared_pair_by_pair_over_what_the_pairs_share(
    claims, trial, quotes, found
):
    other = found["if_equals"]
    gap = (trial.stochastic(quotes, 0.25) - trial.stochastic(other, 0.25)).detach()
    oracle = resampled(gap[:, None], trial.batch.groups).interval()
    condition = claims[sufficient]["namesake.if_equals"]
    assert condition.interval == pytest.approx((oracle.low, oracle.high), abs=1e-5)
    assert condition.factor == oracle.factor and condition.better == "lower"
    alone = resampled(gap[:, None], {}).interval()  # control: pairs taken for independent
    assert alone.half < oracle.half and condition.interval != pytest.approx((alone.low, alone.high))


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_as_many_random_nodes_are_neither_sufficient_nor_necessary(
    trial, quotes, random_of, judge, seed
):
    claim = judge(trial, random_of(quotes, seed), {}, draws=1, stop_early=True)
    assert claim.outcome == "negative"


def test_the_nonsense_twin_s_circuit_asked_on_the_true_task_does_not_pass(
    trial, quotes, nonsense, asked_on
):
    """It shares nodes with the true one, so it may be necessary; it does not suffice."""
    small = asked_on(nonsense.resized(len(quotes)), quotes)
    claim = sufficient(trial, small, {}, draws=1, stop_early=True)
    assert claim.task == quotes.task.name and claim.outcome == "negative"


@BOTH
def test_a_circuit_against_itself_as_a_namesake_is_not_told(trial, quotes, judge):
    claim = judge(trial, quotes, {"self": quotes}, draws=1)
    if judge is sufficient:
        assert claim["namesake.self"].interval == (0.0, 0.0)
    assert claim["namesake.self"].state == "open" and claim.outcome == "cannot tell"


@BOTH
def test_where_the_model_does_not_do_the_task_one_cannot_tell(tiny, quotes, batch_of, judge):
    senseless = get_task("single_double_quote:nonsense")
    trial = TwinTrial(tiny.sparse, batch_of(senseless, pairs=12))
    claim = judge(trial, quotes, {}, draws=1)
    assert claim["does"].state == "open" and claim["does"].value > 0.3
    assert claim.outcome != "positive"


class Uncanny(TwinTrial):
    """A trial in which the circuit alone is better than its own model."""

    def alone(self, circuit):
        return 0 * super().alone(circuit)


def test_a_circuit_better_than_its_own_model_is_not_faithful(tiny, found, batch_of):
    circuit = found["if_equals"]  # whose model has a loss of 0.2, so that there is room
    batch = batch_of(circuit.task, pairs=24)
    claim = sufficient(Uncanny(tiny.sparse, batch), circuit, {}, draws=1)
    assert claim["not_better"].state == "fails" and claim["loss"].state == "holds"
    assert claim.outcome == "negative" and "not better than its own model" in claim.reason


@BOTH
def test_stop_early_leaves_out_what_follows_but_not_the_verdict(trial, quotes, random_of, judge):
    full, short = (
        judge(trial, random_of(quotes), {}, draws=2, stop_early=e) for e in (False, True)
    )
    assert short.outcome == full.outcome == "negative"
    n = len(short.conditions)
    assert n < len(full.conditions) and short.conditions == full.conditions[:n]


@BOTH
def test_too_few_draws_cannot_tell_and_every_draw_is_ticked(trial, quotes, judge):
    ticks = []
    claim = judge(trial, quotes, {}, draws=3, tick=lambda: ticks.append(1))
    assert len(ticks) == 3 and claim.outcome == "cannot tell"
    assert "too few draws" in claim.reason


def test_a_circuit_of_all_nodes_has_its_model_s_loss(trial, quotes):
    everything = quotes.with_nodes(nodes_of(quotes.ablation), "all")
    claim = sufficient(trial, everything, {}, draws=1)
    assert claim.value == float(trial.full.double().mean())
    assert [claim[f"stochastic.{p:g}"].value for p in SHARES] == [0.0, 0.0, 0.0]
