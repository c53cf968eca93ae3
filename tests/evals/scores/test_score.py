import pytest

from evals.scores.score import Score


def test_one_control_is_one_draw_and_gets_a_normal_interval():
    s = Score(name="kl", unit="nats", value=1.0, control=3.0, stderr=0.5, n=10, better="lower")
    assert (s.draws, s.rank, s.gap, s.n_draws) == ((3.0,), 1, -2.0, 1)
    assert s.interval == pytest.approx((-2.98, -1.02))
    assert s.outcome == "beats"


def test_a_control_that_is_not_the_mean_of_its_draws_is_refused():
    with pytest.raises(ValueError, match="not the mean"):
        Score(name="x", unit="nats", value=1.0, control=5.0, draws=(1.0, 2.0), stderr=0.0, n=2)
