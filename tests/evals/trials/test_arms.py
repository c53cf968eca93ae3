"""Laws of arms: every one chooses its site on validation, alike, and is scaled to a goal."""

import pytest
import torch

from evals.claims.carries import share
from evals.claims.needed import harm
from evals.scores.controls import of_length, rotation
from evals.trials.arms import (
    GRID,
    LARGEST,
    Arm,
    Splits,
    ablating,
    alike,
    complement,
    everything,
    mixed,
    once,
    steering,
    turned,
)
from evals.trials.dense_trial import Trial
from evals.trials.matched import apart
from evals.trials.unrelated import unrelated

SITES = range(5)


@pytest.fixture(scope="module")
def splits(mapped, batch_of, quotes):
    trials = []
    for split in ("validation", "test"):
        batch = batch_of(quotes.task, split)
        kept, sources = unrelated(batch, torch.arange(5))
        trials.append(Trial(mapped(quotes), batch.take(kept), sources))
    return Splits(validation=trials[0], test=trials[1])


@pytest.fixture(scope="module")
def claim(quotes):
    return once(steering(quotes))


def only_at(site, factor=1.0):
    """An arm that adds the true difference at one site, and nothing at the others."""
    return lambda trial: lambda s: factor * (s == site) * trial.true_difference()(s)


@pytest.mark.parametrize("statistic", [share, harm])
def test_an_arm_stands_where_its_statistic_is_largest_on_validation(
    splits, claim, statistic, quotes
):
    for make in (claim, ablating(quotes), turned(claim, 3)):
        trial = splits.validation
        found = []
        for site in SITES:
            h = trial.h[site] + make(trial)(site)
            logits = trial.dense.resume(site, h, trial.ids, positions=trial.batch.last[:, None])
            found.append(statistic(trial, logits.squeeze(1)))
        arm = splits.placed("x", make, statistic)
        assert arm.site == max(SITES, key=found.__getitem__) and arm.factor == 1
        assert arm.on_validation == pytest.approx(max(found), abs=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_an_arm_that_works_at_one_site_is_placed_there(splits, site):
    arm = splits.placed("planted", only_at(site), share)
    assert arm.site == site and arm.on_validation == pytest.approx(1, abs=1e-3)
    assert share(splits.test, splits.run(arm)) == pytest.approx(1, abs=1e-3)


def test_the_site_is_chosen_on_validation_and_not_on_test(splits):
    """An arm that does the whole on validation at site 1 and on test at site 3."""

    def make(trial):
        return only_at(1 if trial is splits.validation else 3)(trial)

    arm = splits.placed("two-faced", make, share)
    assert arm.site == 1
    assert share(splits.test, splits.run(arm)) == pytest.approx(0, abs=1e-3)


def test_draws_of_an_empty_control_choose_their_own_sites(splits):
    ticks = []
    draws = [("a draw", only_at(site)) for site in (0, 2, 4)]
    found = splits.statistics(draws, share, lambda: ticks.append(1))
    assert found == pytest.approx([1, 1, 1], abs=1e-3) and len(ticks) == 3
    fixed = [Arm(name="x", make=make, site=0, on_validation=0.0) for _, make in draws]  # control
    at_first = [share(splits.test, splits.run(arm)) for arm in fixed]
    assert at_first == pytest.approx([1, 0, 0], abs=1e-3)


def test_it_reaches_a_goal_at_the_smallest_factor_and_no_smaller_one_of_the_grid_does(
    splits, claim
):
    trial = splits.validation
    arm = splits.placed("the circuit", claim, share)

    def at(factor):
        return share(trial, trial.logits(arm.site, factor * claim(trial)(arm.site)))

    factors = []
    for goal in (0.02, 0.5 * arm.on_validation, arm.on_validation):
        found = splits.reaching(arm, goal)
        assert (found.site, found.make, found.name) == (arm.site, arm.make, arm.name)
        assert at(found.factor) >= goal - 1e-6
        below = [f for f in GRID if f < found.factor]
        assert all(at(f) < goal for f in below)
        step = found.factor - max(below, default=0.0)
        assert at(found.factor - step / 8) < goal + 0.02  # bisected, not only a place of the grid
        factors.append(found.factor)
    assert factors == sorted(factors) and factors[0] < factors[-1]
    assert factors[-1] == pytest.approx(1, abs=0.05)  # its own share at its own length


def test_what_never_reaches_the_goal_is_none(splits, claim):
    arm = splits.placed("the circuit", claim, share)
    assert splits.reaching(arm, 1.5) is None
    nothing = splits.placed("nothing", only_at(2, 0.0), share)
    assert splits.reaching(nothing, 0.1) is None
    assert splits.reaching(splits.placed("true", only_at(2), share), 0.9).factor < 1.01
    small = splits.placed("small", only_at(2, 0.9 / LARGEST), share)
    assert splits.reaching(small, 0.3) is not None
    smaller = splits.placed("smaller", only_at(2, 0.01 / LARGEST), share)
    assert splits.reaching(smaller, 0.3) is None  # control: more than 8 times would do it


def test_the_grid_ends_at_eight_and_grows_by_a_root_of_two():
    assert GRID[-1] == LARGEST == 8 and len(GRID) == 14 and list(GRID) == sorted(GRID)
    assert all(b / a == pytest.approx(2**0.5) for a, b in zip(GRID, GRID[1:], strict=False))


@pytest.mark.parametrize("of", ["alike", "turned", "mixed"])
def test_an_empty_control_is_as_long_as_the_claim_at_every_token_and_site(
    splits, claim, quotes, of
):
    other = steering(apart(quotes, 3))
    make = {
        "alike": alike(other, claim), "turned": turned(claim, 3), "mixed": mixed(claim, 3),
    }[of]  # fmt: skip
    for trial in (splits.validation, splits.test):
        own, control = claim(trial), make(trial)
        for site in SITES:
            a, b = own(site).norm(dim=-1), control(site).norm(dim=-1)
            moved = control(site).norm(dim=-1) > 0
            assert moved.any() or site == 0
            torch.testing.assert_close(b[moved], a[moved], atol=1e-5, rtol=1e-4)
            if of != "alike":  # other nodes may move nothing where the circuit moves something
                torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
    plain = other(splits.test)(4).norm(dim=-1)  # control: at their own length they are shorter
    assert plain.mean() < 0.9 * claim(splits.test)(4).norm(dim=-1).mean()


def test_a_mixed_decoder_writes_a_rotation_of_the_change(splits, claim):
    """D' = D R: what it adds is D (R dz) at the length of D dz, and D' D'^T = D D^T."""
    trial, r = splits.test, rotation(splits.test.sparse.d_resid, 7)
    own, made = claim(trial), mixed(claim, 7)(trial)
    for i, site in enumerate(trial.sites):
        decoder = trial.bridges.decoders[i].weight * trial.bridges.scale[i]
        dz = own.changes[trial.bridges.config.pairs[site]]
        want = of_length(torch.einsum("ij,jk,bpk->bpi", decoder, r, dz), own(site))
        torch.testing.assert_close(made(site), want.detach(), atol=1e-4, rtol=1e-3)
        mixed_decoder = decoder @ r
        torch.testing.assert_close(
            mixed_decoder @ mixed_decoder.T, decoder @ decoder.T, atol=1e-3, rtol=1e-3
        )
    assert not torch.equal(mixed(claim, 8)(trial)(4), made(4))


def test_a_turned_arm_is_turned_alike_at_all_tokens_and_differently_by_seed(splits, claim):
    trial = splits.test
    own, made = claim(trial)(4).flatten(0, 1), turned(claim, 2)(trial)(4).flatten(0, 1)
    torch.testing.assert_close(made @ made.T, own @ own.T, atol=1e-2, rtol=1e-3)
    assert not torch.allclose(made, turned(claim, 3)(trial)(4).flatten(0, 1), atol=0.1)


def test_the_complement_and_the_circuit_are_everything(quotes):
    own, rest = set(quotes), complement(quotes)
    assert not own & set(rest) and own | set(rest) == set(everything(quotes))
    assert len(rest) == len(set(rest)) == quotes.n_total - len(quotes)


def test_a_delta_is_computed_once_for_a_trial(splits, quotes):
    calls = []

    def make(trial):
        calls.append(trial)
        return trial.steered(list(quotes)[:2])

    kept = once(make)
    for trial in (splits.test, splits.validation, splits.test):
        torch.testing.assert_close(kept(trial)(3), make(trial)(3))
    assert calls.count(splits.test) == 2 + 1 and calls.count(splits.validation) == 1 + 1


def test_an_arm_that_nearly_reaches_is_taken_where_it_comes_nearest(splits, claim):
    """An edit past the whole answer does not beat, uncompared, all that stop at the answer."""
    arm = splits.placed("claim", claim, share)
    delta = claim(splits.validation)(arm.site)
    found = [share(splits.validation, splits.validation.logits(arm.site, f * delta)) for f in GRID]
    most = max(found)
    near = splits.reaching(arm, most / 0.97)
    assert near is not None and near.factor == GRID[found.index(most)]
    assert splits.reaching(arm, most / 0.9) is None
