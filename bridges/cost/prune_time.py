"""Measure how long the pruning of a circuit takes at most, on the device at hand.

    seconds = steps * (a step on tau) + losses * (the loss of one circuit on the validation split)

    losses <= 2 (ceil(log2(nodes)) + 1) + window + n_trials + 12

The losses are those of the search for the size, of the sizes below it, of the clean-up, and those
that the circuit is saved with: four cases on three splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

import torch

from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.learn import learn
from sparse.circuits.score import circuit_logits
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch

TIMED = 2
"""Steps that are timed, after a first one that warms up."""
SAVED = 12
"""Losses that a circuit is saved with: of four cases on three splits."""


def prune_seconds(
    sparse: SparseGPT, batches: Mapping[str, TaskBatch], config: PruneConfig
) -> float:
    """Return the seconds that `prune` takes at most for one circuit of a task.

    `batches` are those of the task's splits. The weights of `sparse` should be as sparse as they
    will be; what they compute does not matter.

    >>> from bridges import load_run
    >>> from bridges.cost.prune_time import prune_seconds
    >>> from sparse import PruneConfig, get_task
    >>> run = load_run("tiny")
    >>> batches = get_task("single_double_quote").batches(run.tokenizer)
    >>> prune_seconds(run.sparse, batches, PruneConfig()) > 0
    True
    """
    device = sparse.device
    train = batches["train"].to(device)
    chooser = batches.get("validation", batches["train"]).to(device)
    zero = {at: torch.zeros(n, device=device) for at, n in sparse.node_widths().items()}
    everything = {at: torch.ones_like(x, dtype=torch.bool) for at, x in zero.items()}

    def seconds_of(steps: int) -> float:
        begun = perf_counter()
        learn(sparse, train, replace(config, n_steps=steps), zero).sum().item()
        return perf_counter() - begun

    with still(sparse), csr_products(sparse):
        first = seconds_of(1)
        step = max(0.0, seconds_of(1 + TIMED) - first) / TIMED
        with torch.no_grad():
            begun = perf_counter()
            circuit_logits(sparse, chooser, everything, zero).sum().item()
            loss = perf_counter() - begun
    return config.n_steps * step + most_losses(sum(sparse.node_widths().values()), config) * loss


def most_losses(n_nodes: int, config: PruneConfig) -> int:
    """Return how often `prune` measures the loss of a circuit at most, for a model of `n_nodes`.

    >>> from bridges.cost.prune_time import most_losses
    >>> from sparse import PruneConfig
    >>> most_losses(1024, PruneConfig(window=12, n_trials=200))
    246
    """
    trials = config.n_trials if config.clean_up else 0
    return 2 * (math.ceil(math.log2(n_nodes)) + 1) + config.window + trials + SAVED
