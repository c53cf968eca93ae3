"""Laws of the claim that the dense model needs a circuit, for its task more than for others."""

import math
from copy import copy

import pytest
import torch

from bridges import Ablation
from evals.claims.needed import harm, harm_to, needed, text_harm
from evals.scores.clusters import ratio, resampled
from evals.scores.controls import of_length
from evals.trials.arms import ablating
from evals.trials.prompts import paired_trial
from evals.trials.prompts import splits as paired_splits
from sparse import get_task

from .test_carries import permuted, turned

K, PAIRS = 19, 8


@pytest.fixture(scope="module")
def splits_of(tiny, mapped):
    def splits(circuit, bridges=None, task=None, pairs=PAIRS):
        return paired_splits(mapped(circuit, bridges), task or circuit.task, tiny.tokenizer, pairs)

    return splits


@pytest.fixture(scope="module")
def splits(splits_of, quotes):
    return splits_of(quotes)


@pytest.fixture(scope="module")
def other(tiny, mapped, quotes, found):
    task = found["while_return_true"].task
    return paired_trial(mapped(quotes), task, tiny.tokenizer, "test", PAIRS)


@pytest.fixture(scope="module")
def claim(splits, quotes, nonsense, other):
    return needed(splits, quotes, {"nonsense": nonsense}, {"while": other}, draws=K)


def test_the_shipped_circuit_is_needed(claim):
    assert claim.outcome == "positive", claim.reason
    assert claim.value > 0.5 and claim.p == 1 / (K + 1)
    keys = [condition.key for condition in claim.conditions]
    empty = [f"empty.{name}" for name in ("rotations", "decoders", "nodes")]
    assert keys == ["does", "harm", "specific.while", "namesake.nonsense", *empty]


def nats_of(trial, logits):
    """-log of the softmax over the two targets, by hand: mean over the contexts of each pair."""
    rows = torch.arange(len(logits))
    own, foil = logits[rows, trial.batch.target], logits[rows, trial.batch.foil]
    return -torch.stack([own, foil]).double().log_softmax(0)[0].view(2, -1).mean(0)


def test_harm_is_the_loss_it_costs_over_the_loss_there_is_room_for(claim, splits, quotes):
    trial, site = splits.test, claim.facts["site"]
    delta = trial.mapped.delta(Ablation(list(quotes)), trial.ids, site)
    logits = trial.logits(site, delta)
    before, after = nats_of(trial, trial.untouched), nats_of(trial, logits)
    oracle = float((after.mean() - before.mean()) / (math.log(2) - before.mean()))
    assert claim.value == claim["harm"].value == pytest.approx(oracle, abs=1e-4)
    assert harm(trial, logits) == pytest.approx(oracle, abs=1e-4)
    assert claim["harm"].against == 0.25
    assert harm(trial, trial.untouched) == 0
    coin = trial.untouched.clone()  # one half each costs all there is room for
    rows = torch.arange(len(coin))
    coin[rows, trial.batch.target] = coin[rows, trial.batch.foil]
    assert harm(trial, coin) == pytest.approx(1)
    assert claim.facts["task loss"] == pytest.approx(float(after.mean()), abs=1e-4)


def test_harm_to_a_task_is_resampled_over_what_its_pairs_share(splits, quotes):
    trial = splits.test
    found = harm_to(trial, ablating(quotes), 3)
    nats = trial.nats(trial.logits(3, trial.ablated(list(quotes))(3)))
    columns = torch.stack([nats - trial.nats_0, math.log(2) - trial.nats_0], dim=1)
    oracle = resampled(columns, trial.batch.groups, ratio)
    assert found.value == pytest.approx(oracle.value)
    assert found.interval().low == pytest.approx(oracle.interval().low)


def test_it_must_harm_its_own_task_more_than_others_at_its_own_site(claim, splits, other, quotes):
    site = claim.facts["site"]
    own, theirs = (harm_to(trial, ablating(quotes), site) for trial in (splits.test, other))
    condition = claim["specific.while"]
    assert condition.value == pytest.approx(own.value, abs=1e-4)
    assert condition.against == pytest.approx(theirs.value, abs=1e-4)
    gap = own.minus(theirs).interval()
    assert condition.interval == pytest.approx((gap.low, gap.high), abs=1e-4)


def test_harm_to_the_own_task_is_not_more_than_itself(splits, quotes):
    claim = needed(splits, quotes, {}, {"itself": splits.test}, draws=1)
    assert claim["specific.itself"].state == "open" and claim.outcome == "cannot tell"


def test_another_task_that_the_dense_model_does_not_do_on_test_is_left_out(splits, quotes, other):
    failed = copy(other)
    failed.nats_0 = other.nats_0 + 1
    claim = needed(splits, quotes, {}, {"while": failed}, draws=1)
    assert claim.facts["other tasks that it does on validation only"] == ["while"]
    assert "specific.while" not in [c.key for c in claim.conditions]
    assert claim["others"].state == "open" and "give others=" in claim.reason


def test_a_circuit_that_another_task_needs_more_is_not_for_this_one(splits_of, tiny, mapped, found):
    loop, sums = found["while_return_true"], found["if_equals"]
    trial = paired_trial(mapped(loop), sums.task, tiny.tokenizer, "test", PAIRS)
    claim = needed(splits_of(loop), loop, {}, {"if_equals": trial}, draws=1)
    assert claim["specific.if_equals"].state == "fails" and claim.outcome == "negative"
    assert "more harm to its own task than to if_equals" in claim.reason


@pytest.mark.parametrize("broken", [permuted, turned])
@pytest.mark.parametrize("seed", [0])
def test_through_a_bridge_that_means_nothing_no_circuit_is_needed(
    tiny, quotes, splits_of, broken, seed
):
    splits = splits_of(quotes, broken(tiny.bridges, seed), pairs=6)
    assert needed(splits, quotes, {}, {}, draws=K, stop_early=True).outcome == "negative"


def test_as_many_random_nodes_are_not_needed(splits_of, quotes, random_of):
    null = random_of(quotes)
    assert (
        needed(splits_of(null, pairs=6), null, {}, {}, draws=K, stop_early=True).outcome
        == "negative"
    )


def test_stop_early_gives_a_null_the_verdict_that_all_its_conditions_give(
    splits_of, quotes, random_of
):
    null = random_of(quotes)
    splits = splits_of(null, pairs=6)
    full, short = (needed(splits, null, {}, {}, draws=2, stop_early=e) for e in (False, True))
    assert short.outcome == full.outcome == "negative"
    n = len(short.conditions)
    assert n < len(full.conditions) and short.conditions == full.conditions[:n]


def test_namesakes_are_compared_at_the_length_of_the_circuit_s_ablation(splits, quotes):
    """A circuit is no more harmful than itself; of its nonsense, nodes outside it are taken."""
    claim = needed(splits, quotes, {"nonsense": quotes, "itself": quotes}, {}, draws=1)
    assert claim["namesake.itself"].interval == pytest.approx((0, 0), abs=1e-3)
    assert claim["namesake.nonsense"].detail["nodes"] == len(quotes)
    assert claim["namesake.nonsense"].state == "holds"  # the ranking's next nodes, not its own
    few = quotes.with_nodes(list(quotes)[:12], "few")
    condition = needed(splits, quotes, {"few": few}, {}, draws=1)["namesake.few"]
    trial, site = splits.test, condition.detail["site"]
    own, length = trial.ablated(few)(site), trial.ablated(quotes)(site)
    oracle = harm(trial, trial.logits(site, of_length(own, length)))
    assert condition.against == pytest.approx(oracle, abs=1e-4)
    shorter = harm(trial, trial.logits(site, own))  # control: at its own length
    assert abs(oracle - shorter) > 0.02


def test_where_the_dense_model_does_not_do_the_task_one_cannot_tell(splits_of, quotes):
    splits = splits_of(quotes, task=get_task("single_double_quote:nonsense"), pairs=6)
    claim = needed(splits, quotes, {}, {}, draws=1)
    assert claim.outcome == "cannot tell" and [c.key for c in claim.conditions] == ["does"]
    assert claim["does"].value > 0.3 == claim["does"].against and claim.value == 0


def test_harm_to_text_is_the_nats_per_token_that_the_ablation_costs(tiny, splits, quotes):
    trial, blocks, site = splits.test, tiny.heldout()[:3, :40], 2
    found = text_harm(trial, quotes, site, blocks)
    costs = []
    for ids in blocks.split(1):
        delta = trial.mapped.delta(Ablation(list(quotes)), ids, site)
        after = trial.dense.resume(site, trial.dense.residuals(ids)[site] + delta, ids)
        for y, sign in ((after, 1), (trial.dense.logits(ids), -1)):
            log = y[0, :-1].double().log_softmax(-1)
            costs.append(-sign * float(log.gather(1, ids[0, 1:, None]).mean()))
    assert found == pytest.approx(sum(costs) / 3, abs=1e-4)
    assert text_harm(trial, quotes, site, blocks, at_once=1) == pytest.approx(found, abs=1e-5)
    nothing = quotes.with_nodes([], "none")
    assert text_harm(trial, nothing, site, blocks) == pytest.approx(0, abs=1e-6)
    assert found > 0.001
