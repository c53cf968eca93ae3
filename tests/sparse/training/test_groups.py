import pytest

from sparse.training.groups import warmup_decay
from sparse.training.sparsity import SparsityConfig


def test_the_learning_rate_rises_from_zero_and_falls_to_zero():
    assert [warmup_decay(t, 1000) for t in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert warmup_decay(505, 1000) == pytest.approx(0.5) and warmup_decay(1000, 1000) == 0.0
    assert warmup_decay(0, 1000, warmup=0.0) == 1.0
    assert warmup_decay(0, 50) == 1.0  # one per cent of 50 steps is no step


def test_the_relative_learning_rate_peaks_at_half_time_at_0_505():
    steps = 10_000
    anneal = SparsityConfig(density=1 / 64).anneal(steps)
    lr = [warmup_decay(t, steps) * anneal.lr_scale(t) for t in range(steps)]
    assert lr[0] == 0.0
    assert max(lr) == pytest.approx(0.505, abs=1e-3) and lr.index(max(lr)) == 5000
    assert lr[100] == pytest.approx(1 / 8)
