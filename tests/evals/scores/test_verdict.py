"""Laws of a verdict: conditions that could refute a claim, and what they say together."""

import json
import math
from dataclasses import replace

import jaxtyping
import pytest
import torch

from evals.scores.clusters import Resampled
from evals.scores.verdict import (
    Claim,
    Condition,
    false_positives,
    favours,
    outranks,
    premise,
    q_values,
    threshold,
)

HOLDS, FAILS = 0.9, 0.1


def at_least(value, key="share"):
    return threshold(key, "share", value, 0.5, "fraction", "higher")


def given(value, key="does"):
    return premise(key, "does the task", value, 0.5, "fraction", "higher")


def difference(low, high, n_clusters=10):
    draws = torch.linspace(low, high, 2001, dtype=torch.float64)
    middle, spread = (low + high) / 2, (high - low) / 2
    draws = middle + (draws - middle) / 0.95  # 95 % of them lie from low to high
    assert draws.max() <= middle + 1.1 * spread + 1e-9
    return Resampled(value=middle, draws=draws, factor="frame", n_clusters=n_clusters)


def rival(low, high, better="higher", key="rival", n_clusters=10):
    return favours(key, "rival", difference(low, high, n_clusters), 1.0, "nats", better)


def claim(*conditions, kind="carries", task="t", **more):
    given = {"value": 0.6, "unit": "fraction", "conditions": conditions}
    return Claim(kind=kind, task=task, **given | more)


def ranked(p, k=99):
    """A condition whose p is this one."""
    as_good = round(p * (k + 1)) - 1
    return outranks("random", "beats", 0.0, [1.0] * as_good + [-1.0] * (k - as_good), "nats",
                    "higher")  # fmt: skip


@pytest.mark.parametrize("make", [threshold, premise])
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_threshold_holds_up_to_its_very_edge_and_a_missed_premise_is_open(make, better):
    sign = 1 if better == "higher" else -1
    missed = "fails" if make is threshold else "open"
    for gap, state in ((0.1, "holds"), (0.0, "holds"), (-0.1, missed)):
        found = make("k", "loss", 0.3 + sign * gap, 0.3, "nats", better)
        assert found.state == state and found.margin == pytest.approx(gap)
        assert found.p is None and found.interval is None
        assert found.reason == ("" if state == "holds" else f"loss: {found.value:.4g} beside 0.3 "
                                "nats")  # fmt: skip


def test_p_counts_the_draws_that_are_at_least_as_good_ties_too():
    rng = torch.Generator().manual_seed(0)
    for better in ("higher", "lower"):
        for k in (19, 39, 40):
            for _ in range(20):
                draws = torch.randint(0, 4, (k,), generator=rng).double().tolist()
                value = float(torch.randint(0, 5, (1,), generator=rng))
                found = outranks("k", "beats", value, draws, "nats", better)
                as_good = 0
                for draw in draws:
                    as_good += draw >= value if better == "higher" else draw <= value
                assert found.p == (1 + as_good) / (k + 1)
                assert found.state == ("holds" if found.p <= 0.05 else "fails")
                assert found.against == (max(draws) if better == "higher" else min(draws))


@pytest.mark.parametrize("k, as_good, state", [
    (19, 0, "holds"), (19, 1, "fails"), (39, 1, "holds"), (39, 2, "fails"), (99, 4, "holds"),
    (99, 5, "fails"), (18, 0, "open"), (18, 9, "open"), (1, 0, "open"),
])  # fmt: skip
def test_a_rank_needs_nineteen_draws_to_be_told(k, as_good, state):
    found = outranks("k", "beats", 0.0, [0.0] * as_good + [-1.0] * (k - as_good), "nats", "higher")
    assert found.state == state
    assert ("too few draws to tell" in found.reason) == (state == "open")
    if state != "holds":
        assert found.reason.startswith(f"beats: p = {found.p:.3g} of {k} draws")


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_an_interval_holds_fails_or_is_open_by_the_side_of_zero_it_lies_on(better):
    sign = 1 if better == "higher" else -1
    for ends, state in (
        ((0.1, 0.3), "holds"),
        ((-0.1, 0.3), "open"),
        ((-0.3, -0.1), "fails"),
        ((0.0, 0.2), "open"),
    ):
        low, high = sorted(sign * x for x in ends)
        found = replace(rival(low, high, better), interval=(low, high))
        assert found.state == state
        assert rival(low, high, better).interval == pytest.approx((low, high))
        assert found.value - found.against == pytest.approx((low + high) / 2)
        assert ("95 % interval of the difference" in found.reason) == (state != "holds")


def test_too_few_clusters_are_open_and_say_how_many_there_must_be():
    few = Resampled(value=5.0, draws=None, factor="word", n_clusters=3)
    found = favours("k", "rival", few, 1.0, "nats", "higher")
    assert (found.state, found.interval, found.value) == ("open", None, 6.0)
    assert "3 clusters (word) give no interval, at least 5 are needed" in found.reason


def test_it_says_how_many_clusters_would_tell():
    """The half width shrinks as 1 / sqrt(n): n clusters make it as small as the margin."""
    found = rival(-0.0999, 0.3, n_clusters=10)  # margin 0.1, half width 0.2: four times as many
    assert "about 40 clusters (frame) would tell, here are 10" in found.reason
    assert "would tell" not in rival(-0.3, 0.1).reason  # it is worse: more pairs show no more
    assert "would tell" not in rival(-0.3, -0.1).reason and rival(0.1, 0.3).reason == ""
    assert "about 40 clusters" in rival(-0.3, 0.0999, "lower").reason
    skewed = replace(rival(-0.1, 0.3), interval=(-0.01, 0.11))  # the end across 0 is 0.11 away
    assert "about 13 clusters" in skewed.reason  # and not 4, fewer than there are


@pytest.mark.parametrize("states, outcome", [
    (("holds",), "positive"), (("holds", "holds"), "positive"), (("holds", "open"), "cannot tell"),
    (("open", "fails"), "negative"), (("fails", "holds"), "negative"), (("open",), "cannot tell"),
    (("holds", "open", "fails", "holds"), "negative"),
])  # fmt: skip
def test_one_that_fails_beats_one_that_is_open_and_that_beats_all_that_hold(states, outcome):
    make = {"holds": lambda k: at_least(HOLDS, k), "fails": lambda k: at_least(FAILS, k),
            "open": lambda k: given(FAILS, k)}  # fmt: skip
    conditions = [make[state](f"c{i}") for i, state in enumerate(states)]
    found = claim(*conditions)
    worst = {"positive": None, "negative": "fails", "cannot tell": "open"}[outcome]
    assert found.outcome == outcome
    assert found.reason == "; and ".join(c.reason for c in conditions if c.state == worst)
    assert str(found).startswith(f"carries/t: {outcome} (0.6 fraction)")
    assert found.reason in str(found)


def test_the_hardest_condition_is_what_fails_else_is_open_else_the_closest_rival():
    near, far = rival(0.01, 0.4, key="near"), rival(0.3, 0.4, key="far")
    fine, unknown, missed = at_least(0.5), given(FAILS), at_least(FAILS, "missed")
    assert claim(fine, unknown, near, missed).hardest.key == "missed"
    assert claim(fine, near, unknown).hardest.key == "does"
    assert claim(fine, far, near, ranked(0.05)).hardest.key == "near"
    assert claim(fine, near, far).hardest.key == "near"  # control: whatever the order
    assert claim(fine, ranked(0.05)).hardest.key == "share"
    wide, narrow = rival(0.01, 4, key="wide"), rival(0.2, 0.3, key="narrow")
    assert narrow.margin < wide.margin  # but its interval is farther from 0 in its own widths
    assert claim(narrow, wide).hardest.key == "wide"


def test_p_of_a_claim_is_the_largest_of_its_ranks():
    low, high = replace_key(ranked(0.02), "a"), replace_key(ranked(0.04), "b")
    assert claim(low, high, at_least(HOLDS)).p == 0.04
    assert claim(at_least(HOLDS)).p is None


def replace_key(condition, key):
    return Condition.from_dict(condition.to_dict() | {"key": key})


def test_nothing_can_be_claimed_without_conditions_nor_twice_under_one_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks
    with pytest.raises(ValueError, match="needs conditions that could refute it"):
        claim()
    with pytest.raises(ValueError, match="'share'.*twice; rename one"):
        claim(at_least(HOLDS), at_least(FAILS))
    with pytest.raises(ValueError, match="kind must be one of"):
        claim(at_least(HOLDS), kind="proved")
    with pytest.raises(ValueError, match="rank needs some"):
        Condition(key="k", name="n", test="rank", unit="nats", value=1, against=0, better="higher")
    for name, wrong in (("test", "taste"), ("unit", "furlongs"), ("better", "bigger")):
        with pytest.raises(ValueError, match=f"{name} is '{wrong}'; one of"):
            replace(at_least(HOLDS), **{name: wrong})
    with pytest.raises(TypeError):  # a verdict is computed, not given
        Claim(kind="carries", task="t", value=1.0, unit="nats", conditions=(at_least(FAILS),),
              outcome="positive")  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_wherever_they_stand(bad):
    with pytest.raises(ValueError, match="'share' holds NaN or infinity"):
        at_least(bad)
    with pytest.raises(ValueError, match="NaN or infinity"):
        threshold("k", "n", 0.0, bad, "nats", "lower")
    with pytest.raises(ValueError, match="NaN or infinity"):
        outranks("k", "n", 0.0, [1.0, bad], "nats", "higher")
    with pytest.raises(ValueError, match="NaN or infinity"):
        replace(rival(0.1, 0.3), interval=(0.1, bad))
    with pytest.raises(ValueError, match="'carries/t' holds NaN or infinity"):
        claim(at_least(HOLDS), value=bad)
    with pytest.raises(ValueError):
        threshold("k", "n", 0.0, 1.0, "nats", "lower", harm=bad)
    with pytest.raises(ValueError):
        claim(at_least(HOLDS), facts={"harm": bad})


MANY = (at_least(FAILS), given(FAILS), replace_key(ranked(0.2), "r"), rival(-0.1, 0.3))


def test_a_claim_comes_back_from_json_as_it_was():
    found = claim(*MANY, facts={"site": 3, "levels": {"frame": 8}})
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Claim.from_dict(json.loads(text)) == found
    assert found["does"] == MANY[1]
    with pytest.raises(KeyError, match="has no condition 'x'; it has"):
        found["x"]


@pytest.mark.parametrize("path, value, says", [
    (("outcome",), "positive", "outcome"), (("reason",), "", "reason"),
    (("conditions", 0, "state"), "holds", "state"), (("conditions", 0, "value"), 0.9, "state"),
    (("conditions", 2, "p"), 0.01, "p"), (("conditions", 3, "interval"), [0.1, 0.3], "state"),
    (("conditions", 0, "reason"), "fine", "reason"),
])  # fmt: skip
def test_an_edited_file_is_refused(path, value, says):
    values = json.loads(json.dumps(claim(*MANY).to_dict()))
    assert Claim.from_dict(values)
    place = values
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=f"the file says {says} .*edited"):
        Claim.from_dict(values)


def test_a_condition_taken_out_of_a_file_is_missed():
    values = json.loads(json.dumps(claim(*MANY).to_dict()))
    del values["conditions"][0]
    with pytest.raises(ValueError, match="the file was edited"):
        Claim.from_dict(values)


def claims_of(ps):
    return [claim(ranked(p), task=f"t{i}") for i, p in enumerate(ps)]


@pytest.mark.parametrize("ps", [
    (0.01,), (0.01, 0.02, 0.03, 0.04, 0.5), (0.04, 0.01, 0.04, 0.9), (0.9, 0.9, 0.05),
    (1.0, 1.0), (0.02, 0.02, 0.02), (0.05, 0.04, 0.03, 0.02, 0.01),
])  # fmt: skip
def test_q_is_the_smallest_level_at_which_benjamini_and_hochberg_reject(ps):
    """Reject the r smallest p, r the largest with p_(r) <= q r / n: tried at every level q."""
    found = q_values(claims_of(ps))
    n = len(ps)
    levels = sorted({p * n / r for p in ps for r in range(1, n + 1)} | {1.0})
    for i, p in enumerate(ps):
        smallest = 1.0
        for q in levels:
            fit = [r for r in range(1, n + 1) if sorted(ps)[r - 1] <= q * r / n + 1e-12]
            if fit and p <= sorted(ps)[max(fit) - 1]:
                smallest = min(smallest, q)
        assert found[f"carries/t{i}"] == pytest.approx(smallest)
    assert all(q >= p - 1e-12 for q, p in zip(found.values(), sorted(ps, reverse=True),
                                              strict=True))  # fmt: skip


def test_claims_without_a_rank_have_no_q_and_are_no_false_positives():
    claims = [*claims_of((0.01, 0.5)), claim(at_least(HOLDS), task="none")]
    assert set(q_values(claims)) == {"carries/t0", "carries/t1"}
    assert false_positives(claims) == pytest.approx(2 * 0.05) and false_positives([]) == 0
    assert q_values([]) == {}
