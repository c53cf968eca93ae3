"""The predicted time of pruning, beside what pruning does."""

import pytest

from bridges import load_run
from bridges.cost.prune_time import most_losses, prune_seconds
from sparse import PruneConfig, get_task, prune
from sparse.circuits.pruning import prune as of_prune


@pytest.mark.parametrize("target", [0.15, 1e-6])  # met, and never met
def test_a_pruning_measures_no_more_losses_than_are_counted(monkeypatch, target):
    run, counted, real = load_run("tiny"), [], of_prune.circuit_logits
    monkeypatch.setattr(of_prune, "circuit_logits", lambda *a: counted.append(1) or real(*a))
    config = PruneConfig(n_steps=20, n_trials=30, target_loss=target)
    prune(run.sparse, get_task("single_double_quote"), config, tokenizer=run.tokenizer)
    most = most_losses(sum(run.sparse.node_widths().values()), config)
    assert 12 < len(counted) <= most


def test_more_steps_and_more_trials_take_longer(monkeypatch):
    """By a clock that says that one step took 1 s, three took 3 s, and a loss 2 s."""
    run, ticks = load_run("tiny"), iter(range(99))
    monkeypatch.setattr(
        "bridges.cost.prune_time.perf_counter", lambda: float((0, 1, 1, 4, 4, 6)[next(ticks)])
    )
    batches = get_task("single_double_quote").batches(run.tokenizer)
    config = PruneConfig(n_steps=10)
    most = most_losses(sum(run.sparse.node_widths().values()), config)
    assert prune_seconds(run.sparse, batches, config) == 10 * 1.0 + most * 2
