"""Laws of the claim that a circuit carries the variable in the dense model: nulls never do."""

from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch

from evals.claims import carries as module
from evals.claims.carries import Carrying, carries, mean_difference, share, without_sources
from evals.scores.clusters import resampled
from evals.scores.controls import rotation
from evals.trials.arms import Splits
from evals.trials.prompts import splits as paired_splits
from evals.trials.prompts import unrelated_splits
from sparse import get_task

K, PAIRS = 19, 14


def permuted(bridges, seed=0):
    """Bridges whose decoders write every sparse channel in the place of another one."""
    made = deepcopy(bridges)
    for decoder in made.decoders:
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(decoder.weight.shape[1], generator=rng)
        decoder.weight.data = decoder.weight.data[:, order]
    return made


def turned(bridges, seed=0):
    """Bridges whose decoders write into a dense stream turned by a random rotation."""
    made = deepcopy(bridges)
    for decoder in made.decoders:
        decoder.weight.data = rotation(len(decoder.weight), 1000 + seed) @ decoder.weight.data
    return made


@pytest.fixture(scope="module")
def splits_of(tiny, mapped):
    def splits(circuit, bridges=None, task=None, pairs=PAIRS):
        made = mapped(circuit, bridges)
        return unrelated_splits(made, task or circuit.task, tiny.tokenizer, pairs)[0]

    return splits


@pytest.fixture(scope="module")
def splits(splits_of, quotes):
    return splits_of(quotes)


@pytest.fixture(scope="module")
def claim(splits, quotes, found):
    return carries(splits, quotes, {"while": found["while_return_true"]}, draws=K, unmatched=2)


def test_the_shipped_circuit_carries_the_variable(claim):
    assert claim.outcome == "positive", claim.reason
    assert claim.value > 0.4 and claim.p == 1 / (K + 1)
    keys = [condition.key for condition in claim.conditions]
    rivals = [f"rival.{name}" for name in ("embedding", "all_nodes", "complement", "patch")]
    empty = [f"empty.{name}" for name in ("rotations", "decoders", "nodes")]
    assert keys == ["sources", "does", "share", *empty, *rivals, "namesake.while"]
    assert claim.facts["unmatched pairs"] == 2 and claim.facts["split"] == "test"


def test_its_numbers_are_those_of_its_arm_at_strength_one_on_test(claim, splits, quotes):
    trial, site = splits.test, claim.facts["site"]
    logits = trial.logits(site, trial.steered(list(quotes))(site))
    assert claim.value == claim["share"].value == pytest.approx(share(trial, logits), abs=1e-5)
    mean = float(trial.collateral_a(logits).mean())
    assert claim.facts["collateral A"] == pytest.approx(mean, abs=1e-5)
    gap = float((trial.p_cf - trial.p_0).mean())
    assert claim["does"].value == pytest.approx(gap)
    assert (claim["share"].against, claim["does"].against) == (0.25, 0.1)


def test_a_rival_is_compared_at_the_circuit_s_share_over_what_the_pairs_share(
    claim, splits, quotes
):
    condition = claim["rival.embedding"]
    site, factor = condition.detail["site"], condition.detail["factor"]
    validation, test = splits.validation, splits.test
    there = validation.logits(site, factor * validation.embedded()(site))
    goal = claim.facts["share on validation"]
    assert goal - 1e-4 <= share(validation, there) < goal + 0.05
    theirs = test.collateral_a(test.logits(site, factor * test.embedded()(site)))
    own = claim.facts["site"]
    mine = test.collateral_a(test.logits(own, test.steered(list(quotes))(own)))
    oracle = resampled((mine - theirs)[:, None], test.batch.groups).interval()
    assert condition.interval == pytest.approx((oracle.low, oracle.high), abs=1e-3)
    assert condition.against == pytest.approx(float(theirs.mean()), abs=1e-4)
    assert condition.better == "lower" and condition.factor == oracle.factor


@pytest.mark.parametrize("broken", [permuted, turned])
@pytest.mark.parametrize("seed", [0, 1])
def test_through_a_bridge_that_means_nothing_no_circuit_carries_anything(
    tiny, quotes, splits_of, broken, seed
):
    splits = splits_of(quotes, broken(tiny.bridges, seed), pairs=6)
    claim = carries(splits, quotes, {}, draws=K, stop_early=True)
    assert claim.outcome == "negative"


def test_stop_early_gives_a_null_the_verdict_that_all_its_conditions_give(tiny, quotes, splits_of):
    splits = splits_of(quotes, turned(tiny.bridges), pairs=6)
    full, short = (carries(splits, quotes, {}, draws=2, stop_early=e) for e in (False, True))
    assert short.outcome == full.outcome == "negative"
    n = len(short.conditions)
    assert n < len(full.conditions) and short.conditions == full.conditions[:n]


def test_as_many_random_nodes_carry_nothing(splits_of, quotes, random_of):
    null = random_of(quotes)
    assert (
        carries(splits_of(null, pairs=6), null, {}, draws=K, stop_early=True).outcome == "negative"
    )


@pytest.fixture
def weak(monkeypatch):
    """Makes the full patch do nothing, and puts the circuit itself among its rivals."""

    class Weak(Carrying):
        def __init__(self, *given):
            super().__init__(*given)
            nothing = lambda trial: lambda site: 0 * trial.h[site]  # noqa: E731
            self.rivals = {"patch": nothing, "embedding": self.make}

    monkeypatch.setattr(module, "Carrying", Weak)


def test_a_rival_that_never_reaches_the_share_is_beaten(splits, quotes, weak):
    claim = carries(splits, quotes, {}, draws=1)
    never, itself = claim["rival.patch"], claim["rival.embedding"]
    assert never.state == "holds" and "never reaches its share" in never.name
    assert never.value == claim.facts["share on validation"] and never.against < 0.01
    assert itself.state != "holds"  # control: the circuit has no less collateral than itself


def test_a_rival_with_less_collateral_at_equal_share_refutes_the_claim(splits, quotes, monkeypatch):
    class Strong(Carrying):
        def __init__(self, *given):
            super().__init__(*given)
            self.rivals = {"patch": lambda trial: trial.true_difference()}

    monkeypatch.setattr(module, "Carrying", Strong)
    claim = carries(splits, quotes, {}, draws=1)
    assert claim["rival.patch"].state == "fails" and claim.outcome == "negative"
    assert claim["rival.patch"].detail["factor"] < 1


def test_with_too_few_pairs_one_cannot_tell(splits_of, quotes, splits):
    few = splits_of(quotes, pairs=4)
    assert few.test.batch.n_pairs <= 4
    mixed = Splits(validation=few.validation, test=splits.test)  # too few to choose a site by
    for given in (few, mixed):
        claim = carries(given, quotes, {}, draws=1)
        assert claim.outcome == "cannot tell" and [c.key for c in claim.conditions] == ["sources"]
        assert "pairs of a split that have an unrelated source: 4 beside 5" in claim.reason
    none = without_sources("quotes", 9)
    assert none.outcome == "cannot tell" and none.facts == {"unmatched pairs": 9}
    assert "pairs of a split that have an unrelated source: 0 beside 5" in none.reason


def test_with_few_words_among_many_pairs_one_cannot_tell_though_no_rival_comes_near(
    splits, quotes, weak
):
    n = splits.test.batch.n_pairs
    test = copy(splits.test)
    test.batch = replace(test.batch, groups={"word": ("red", "green") * (n // 2)})
    given = Splits(validation=splits.validation, test=test)
    claim = carries(given, quotes, {}, draws=K)
    assert claim["rival.patch"].state == "holds" and n >= 10
    assert claim["clusters"].state == "open" and claim.outcome == "cannot tell"
    assert "levels of word among its pairs: 2 beside 5" in claim.reason
    assert "clusters" not in [c.key for c in carries(splits, quotes, {}, draws=1).conditions]


def test_a_dense_model_that_resumes_to_something_else_is_refused(splits, quotes, monkeypatch):
    dense = splits.test.dense
    true = dense.resume
    wrong = lambda site, h, ids, **how: true(site, h, ids, **how) + 0.1 * site  # noqa: E731
    monkeypatch.setattr(dense, "resume", wrong)
    with pytest.raises(ValueError, match="resuming there differ by"):
        Carrying(splits, quotes, {})


def test_where_the_dense_model_does_not_tell_the_contexts_apart_one_cannot_tell(splits_of, quotes):
    splits = splits_of(quotes, task=get_task("single_double_quote:nonsense"), pairs=6)
    claim = carries(splits, quotes, {}, draws=1)
    assert claim.outcome == "cannot tell" and [c.key for c in claim.conditions] == ["does"]
    assert claim.value == 0 and "tells the contexts apart" in claim.reason


def test_empty_controls_are_as_many_as_asked_and_differ_by_seed(splits, quotes):
    arms = Carrying(splits, quotes, {})
    for _, draws in arms.empty(3, 0).items():
        made = [make(splits.test)(4) for _, make in draws]
        assert len(made) == 3 and not torch.allclose(made[0], made[1], atol=1e-3)
        own = arms.make(splits.test)(4)
        for delta in made:
            assert delta.norm() == pytest.approx(float(own.norm()), rel=0.02)


def test_the_mean_difference_is_one_direction_whose_sign_is_the_prompt_s_kind(tiny, mapped, quotes):
    made = paired_splits(mapped(quotes), quotes.task, tiny.tokenizer, 6)
    trial, n = made.test, made.test.batch.n_pairs
    deltas = mean_difference(made.validation)(trial)
    rows = torch.arange(2 * n)
    for site in trial.sites[1:]:  # at site 0 both contexts end in one and the same token
        delta = deltas(site)
        at_last = delta[rows, trial.batch.last]
        assert int((delta.norm(dim=-1) > 0).sum()) == 2 * n  # at the scored position alone
        torch.testing.assert_close(at_last[:n], at_last[:1].expand(n, -1))
        torch.testing.assert_close(at_last[n:], -at_last[:n])
        from_, half = made.validation, made.validation.batch.n_pairs
        h = from_.h[site][torch.arange(2 * half), from_.batch.last]
        torch.testing.assert_close(
            at_last[0], h[half:].mean(0) - h[:half].mean(0), atol=1e-4, rtol=1e-3
        )
    moved = max(share(trial, trial.logits(s, deltas(s))) for s in trial.sites)
    assert moved > 0.4  # it needs neither a twin nor a bridge
