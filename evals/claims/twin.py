"""The two claims about a circuit in the sparse model: it suffices, and it is needed.

    L           task loss of the whole model, nats; L(C) that of the circuit alone (mean ablation)
    L_p(C)      with a share p of the nodes outside C ablated, the others left as they are
    harm h(C)   (L without C  -  L) / (ln 2 - L)                    ratio of means over pairs

    sufficient  L <= 0.3,  L(C) <= max(target, L + 0.05),  L(C) >= L - 0.05,
                |L_p(C) - L| <= 0.1 at p = 0.1, 0.25 and 0.5;
                L_0.25(C) less than that of k random circuits (p <= 0.05) and of the nonsense twin's
    necessary   L <= 0.3,  h(C) >= 0.25;
                h(C) more than that of k random node sets of equal activity (p <= 0.05), and of the
                nonsense twin's nodes that are not in C

Random nodes are never the circuit's own. The nonsense twin's circuit has the circuit's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.clusters import fixed, ratio, resampled
from evals.scores.verdict import Claim, Condition, favours, outranks, premise, threshold
from sparse.circuits.circuit import Circuit
from sparse.tasks.batch import CHANCE
from sparse.tasks.score import DOES

from .judge import judged
from .matched import activity_of, apart, outside
from .twin_trial import TwinTrial, measuring

LEAST = 0.25
"""Least harm, and least share, that a claim asks for."""
NEAR = 0.1
"""Largest distance of a stochastic loss from that of the whole model, in nats."""
SLACK = 0.05
"""Nats by which a circuit may be better or worse than its own model."""
SHARES = (0.1, 0.25, 0.5)
"""Shares p of the nodes outside the circuit that are ablated."""
COMPARED = 0.25
"""The share at which circuits are compared with each other."""
Tick = Callable[[], object]


def sufficient(
    trial: TwinTrial,
    circuit: Circuit,
    nonsense: Circuit,
    *,
    draws: int = 39,
    seed: int = 0,
    stop_early: bool = False,
    tick: Tick = lambda: None,
) -> Claim:
    """Return claim 1: the circuit alone does the task, as the model does it.

    `nonsense` is the circuit of the nonsense twin, of equal size (`nonsense_at_size`). `tick` is
    called after every draw.
    """
    with measuring(trial.model):
        alone = trial.alone(circuit)
        conditions = _sufficient(trial, circuit, nonsense, alone, draws, seed, tick)
        facts = {**_facts(trial, circuit), "nonsense nodes": len(nonsense)}
        return judged(
            "sufficient", circuit.task.name, _mean(alone), "nats", conditions, facts, stop_early
        )


def _sufficient(
    trial: TwinTrial,
    circuit: Circuit,
    nonsense: Circuit,
    alone: Float[Tensor, " pair"],
    draws: int,
    seed: int,
    tick: Tick,
) -> Iterator[Condition]:
    own, loss = _mean(trial.full), _mean(alone)
    yield _does(own)
    goal = max(circuit.target_loss, own + SLACK)
    yield threshold("loss", "task loss, all else at its mean", loss, goal, "nats", "lower")
    yield threshold(
        "not_better", "not better than its own model", loss, own - SLACK, "nats", "higher"
    )
    mine = alone
    for p in SHARES:
        there = trial.stochastic(circuit, p)
        if p == COMPARED:
            mine = there
        name = f"distance from the model, a share {p:g} of all else ablated"
        gap = abs(_mean(there) - own)
        yield threshold(f"stochastic.{p:g}", name, gap, NEAR, "nats", "lower")
    theirs = trial.stochastic(nonsense, COMPARED)
    yield favours(
        "nonsense",
        "less loss than the nonsense twin's circuit of its size",
        resampled((mine - theirs)[:, None], trial.batch.groups, seed=seed),
        _mean(theirs),
        "nats",
        "lower",
    )
    found = []
    for i in range(draws):
        found.append(_mean(trial.stochastic(apart(circuit, seed + i), COMPARED)))
        tick()
    name = "less loss than random circuits of its size"
    yield outranks("random", name, _mean(mine), found, "nats", "lower")


def necessary(
    trial: TwinTrial,
    circuit: Circuit,
    nonsense: Circuit,
    *,
    draws: int = 39,
    seed: int = 0,
    stop_early: bool = False,
    tick: Tick = lambda: None,
) -> Claim:
    """Return claim 2: the sparse model needs the circuit for the task.

    `nonsense` is any circuit of the nonsense twin with a ranking; its first nodes that are not of
    this circuit are taken.
    """
    with measuring(trial.model):
        harmed = trial.without(circuit)
        room = CHANCE - _mean(trial.full)
        harm = (_mean(harmed) - _mean(trial.full)) / room
        conditions = _necessary(trial, circuit, nonsense, harmed, harm, draws, seed, tick)
        facts = {**_facts(trial, circuit), "loss without it": _mean(harmed)}
        return judged(
            "necessary", circuit.task.name, harm, "fraction", conditions, facts, stop_early
        )


def _necessary(
    trial: TwinTrial,
    circuit: Circuit,
    nonsense: Circuit,
    harmed: Float[Tensor, " pair"],
    harm: float,
    draws: int,
    seed: int,
    tick: Tick,
) -> Iterator[Condition]:
    own = _mean(trial.full)
    yield _does(own)
    yield threshold("harm", "harm of ablating it", harm, LEAST, "fraction", "higher")
    others = outside(nonsense, circuit)
    theirs = trial.without(others)
    columns = torch.stack([harmed - theirs, CHANCE - trial.full], dim=1)
    yield favours(
        "nonsense",
        "more harm than the nonsense twin's nodes outside it",
        resampled(columns, trial.batch.groups, ratio, seed),
        (_mean(theirs) - own) / (CHANCE - own),
        "fraction",
        "higher",
        nodes=len(others),
    )
    activity = activity_of(trial.model, circuit, trial.batch)
    found = []
    for i in range(draws):
        without = trial.without(apart(circuit, seed + i, activity))
        found.append((_mean(without) - own) / (CHANCE - own))
        tick()
    name = "more harm than random nodes as active"
    yield outranks("matched", name, harm, found, "fraction", "higher")


def _does(nats: float) -> Condition:
    return premise("does", "the sparse model does the task", nats, DOES, "nats", "lower")


def _facts(trial: TwinTrial, circuit: Circuit) -> dict[str, Any]:
    batch = trial.batch
    return {
        "nodes": len(circuit),
        "whole model": _mean(trial.full),
        "pairs": batch.n_pairs,
        "split": batch.split,
        "levels": batch.levels(),
        "fixed": fixed(batch.groups),
    }


def _mean(x: Float[Tensor, " pair"]) -> float:
    return float(x.double().mean())
