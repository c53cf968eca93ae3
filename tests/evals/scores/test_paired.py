"""Laws of a number beside its control."""

import json
import math

import pytest
import torch

from evals.scores.paired import bootstrap, counted, paired
from evals.scores.score import Score


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(seed=0, shift=0.0, n=60, draws=100, better="higher", **more):
    # each draw has its own mean, as random directions do, and shares the prompts' difficulty
    prompts = normal(seed, n)
    means = 0.5 * normal(seed + 10_000, draws + 1)
    noise = 0.2 * normal(seed + 20_000, draws + 1, n)
    rows = prompts + means[:, None] + noise
    given = {"unit": "logits", "control_name": "random directions", "better": better} | more
    return paired("effect", rows[0] + shift, rows[1:], **given)


def test_a_score_without_a_control_cannot_be_built():
    with pytest.raises(ValueError, match="'kl' has no control"):
        Score(name="kl", unit="nats", value=1.0, stderr=0.1, n=3)
    with pytest.raises(ValueError, match="no draw of its control"):
        paired("kl", torch.ones(4), torch.ones(0, 4), unit="nats", control_name="x", better="lower")


def test_every_control_scores_zero_gap_against_itself():
    rows = normal(1, 50)
    s = paired("x", rows, rows[None], unit="nats", control_name="itself", better="lower")
    assert (s.gap, s.stderr, s.interval, s.rank) == (0.0, 0.0, (0.0, 0.0), 0)
    assert s.outcome == "indistinguishable"


def test_rank_counts_the_draws_beaten_in_the_direction_that_is_better():
    values, draws = torch.full((3,), 2.0), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).repeat(3, 1).T
    up = paired("x", values, draws, unit="nats", control_name="draws", better="higher")
    down = paired("x", values, draws, unit="nats", control_name="draws", better="lower")
    assert (up.rank, down.rank, up.draws, up.control) == (2, 2, (0.0, 1.0, 2.0, 3.0, 4.0), 2.0)
    draws[4] = 1.5
    down = paired("x", values, draws, unit="nats", control_name="draws", better="lower")
    assert down.rank == 1


def test_a_planted_effect_beats_every_draw_and_its_mirror_image_is_worse():
    assert (score(shift=5).outcome, score(shift=5).rank) == ("beats", 100)
    assert score(shift=-5, better="lower").outcome == "beats"
    assert (score(shift=-5).outcome, score(shift=-5).beaten_by) == ("worse", 100)


def test_control_a_planted_null_is_called_an_effect_about_once_in_twenty():
    for draws in (20, 100):
        found = [score(seed, draws=draws).outcome == "beats" for seed in range(300)]
        assert 0.02 < sum(found) / 300 < 0.08


def test_the_interval_covers_the_true_gap():
    covered, errors = 0, []
    for seed in range(200):
        values, control = 0.3 + normal(seed, 60), normal(seed + 999, 1, 60)
        s = paired("x", values, control, unit="nats", control_name="c", better="lower")
        covered += s.interval[0] <= 0.3 <= s.interval[1]
        errors.append((s.gap - 0.3) / s.stderr)
    assert 0.90 < covered / 200 <= 0.99
    assert 0.85 < torch.tensor(errors).std() < 1.15


def test_pairing_takes_the_difficulty_of_the_prompts_out_of_the_error():
    hard = 100 * normal(0, 80)
    noise = normal(1, 2, 80)
    given = {"unit": "nats", "control_name": "c", "better": "lower"}
    s = paired("x", hard + noise[0], (hard + noise[1])[None], **given)
    assert s.stderr < 0.3


def test_a_weighted_mean_is_the_ratio_of_sums_and_equal_weights_are_none():
    num, den, c = normal(0, 40).abs(), normal(1, 40).abs() + 0.1, normal(2, 3, 40).abs()
    given = {"unit": "fraction", "control_name": "c", "better": "lower"}
    s = paired("fvu", num / den, c, weights=den, **given)
    assert s.value == pytest.approx(float(num.sum() / den.sum()), rel=1e-6)
    plain = paired("x", num, c, **given)
    equal = paired("x", num, c, weights=torch.full((40,), 7.0), **given)
    assert plain.stderr == pytest.approx(equal.stderr)
    assert plain.stderr == pytest.approx(float((num - c.mean(0)).std() / 40**0.5), rel=1e-5)


def test_the_bootstrap_is_seeded():
    gaps, w = normal(0, 30), torch.ones(30)
    assert bootstrap(gaps, w, 3) == bootstrap(gaps, w, 3) != bootstrap(gaps, w, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(bad):
    good = {"name": "kl", "unit": "nats", "value": 1.0, "draws": (2.0,), "stderr": 0.1, "n": 3}
    for name, value in (("value", bad), ("draws", (bad,)), ("stderr", bad)):
        with pytest.raises(ValueError, match=name):
            Score(**good | {name: value})
    values = torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match="'kl': values hold"):
        paired("kl", values, values[None], unit="nats", control_name="c", better="lower")
    with pytest.raises(ValueError):
        Score(**good | {"detail": {"x": bad}})


def test_a_score_survives_json_and_an_edited_file_does_not():
    s = score(shift=3)
    text = json.dumps(s.to_dict(), allow_nan=False)
    assert Score.from_dict(json.loads(text)) == s
    for change in ({"rank": 3}, {"outcome": "worse"}, {"value": -9.0}, {"extra": 1}):
        with pytest.raises(ValueError):
            Score.from_dict(s.to_dict() | change)
    with pytest.raises(ValueError, match="draws"):
        Score.from_dict({k: v for k, v in s.to_dict().items() if k != "draws"})


def test_a_count_has_no_sampling_error():
    s = counted("size", 60, (5632,), unit="nodes", control_name="the whole model", better="lower")
    assert (s.stderr, s.n, s.outcome) == (0.0, 1, "beats")
