"""The two claims about a circuit in the sparse model: it suffices, and it is needed.

    L           task loss of the whole model, nats; L(C) that of the circuit alone (mean ablation)
    L_p(C)      with a share p of the nodes outside C ablated, the others left as they are
    harm h(C)   (L without C  -  L) / (ln 2 - L)                    ratio of means over pairs

    sufficient  L <= 0.3,  L(C) <= max(target, L + 0.05),  L(C) >= L - 0.05,
                |L_p(C) - L| <= 0.1 at p = 0.1, 0.25 and 0.5;
                L_0.25(C) less than that of k random circuits (p <= 0.05) and of every namesake
    necessary   L <= 0.3,  h(C) >= 0.25;
                h(C) more than that of k random node sets of equal activity (p <= 0.05), of the
                nonsense twin's nodes that are not in C, and of every other namesake

Namesakes are circuits found in the same way for something else: for the nonsense twin, at this
circuit's size, and for tasks of other families. In the second claim none has more nodes than the
circuit. Random nodes are never the circuit's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.clusters import ratio, resampled
from evals.scores.verdict import Claim, Condition, favours, outranks, premise, threshold
from evals.trials.matched import NONSENSE, activity_of, apart, at_size, called, outside
from evals.trials.twin_trial import TwinTrial, measuring
from sparse.circuits.circuit import Circuit
from sparse.tasks.batch import CHANCE
from sparse.tasks.score import DOES

from .judge import LEAST, about, few_others, judged, no_namesake

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
    namesakes: Mapping[str, Circuit],
    *,
    draws: int = 39,
    seed: int = 0,
    stop_early: bool = False,
    tick: Tick = lambda: None,
) -> Claim:
    """Return claim 1: the circuit alone does the task, as the model does it.

    `namesakes` are circuits by name; that of the nonsense twin is called "nonsense". `stop_early`
    leaves out the conditions after the first that does not hold. `tick` is called after every draw.
    """
    with measuring(trial.model):
        alone = trial.alone(circuit)
        conditions = _sufficient(trial, circuit, namesakes, alone, draws, seed, tick)
        name, facts = circuit.task.name, _facts(trial, circuit)
        return judged("sufficient", name, _mean(alone), "nats", conditions, facts, stop_early)


def _sufficient(
    trial: TwinTrial,
    circuit: Circuit,
    namesakes: Mapping[str, Circuit],
    alone: Float[Tensor, " pair"],
    draws: int,
    seed: int,
    tick: Tick,
) -> Iterator[Condition]:
    own, loss = _mean(trial.full), _mean(alone)
    yield (does := _does(own))
    if does.state != "holds":
        return  # of what the model does not do, no circuit can be judged
    yield from few_others(circuit)
    goal = max(circuit.target_loss, own + SLACK)
    yield threshold("loss", "task loss, all else at its mean", loss, goal, "nats", "lower")
    yield threshold(
        "not_better", "not better than its own model", loss, own - SLACK, "nats", "higher"
    )
    there = {p: trial.stochastic(circuit, p) for p in SHARES}
    mine = there[COMPARED]
    for p in SHARES:
        name = f"distance from the model, a share {p:g} of all else ablated"
        gap = abs(_mean(there[p]) - own)
        yield threshold(f"stochastic.{p:g}", name, gap, NEAR, "nats", "lower")
    for name, namesake in namesakes.items():
        other = at_size(namesake, circuit, exactly=True) if name == NONSENSE else namesake
        theirs = trial.stochastic(other, COMPARED)
        yield favours(
            f"namesake.{name}",
            f"less loss than {called(name)}",
            resampled((mine - theirs)[:, None], trial.batch.groups, seed=seed),
            _mean(theirs),
            "nats",
            "lower",
            nodes=len(other),
        )
    found = []
    for i in range(draws):
        found.append(_mean(trial.stochastic(apart(circuit, seed + i), COMPARED)))
        tick()
    words = "less loss than random circuits of its size"
    yield outranks("random", words, _mean(mine), found, "nats", "lower")
    yield from no_namesake(namesakes)


def necessary(
    trial: TwinTrial,
    circuit: Circuit,
    namesakes: Mapping[str, Circuit],
    *,
    draws: int = 39,
    seed: int = 0,
    stop_early: bool = False,
    tick: Tick = lambda: None,
) -> Claim:
    """Return claim 2: the sparse model needs the circuit for the task.

    `namesakes`, `stop_early` and `tick` are as in `sufficient`. Of the nonsense twin's ranking the
    first nodes that are not of this circuit are taken.
    """
    with measuring(trial.model):
        harmed = trial.without(circuit)
        room = CHANCE - _mean(trial.full)
        harm = (_mean(harmed) - _mean(trial.full)) / room
        conditions = _necessary(trial, circuit, namesakes, harmed, harm, draws, seed, tick)
        name, facts = circuit.task.name, _facts(trial, circuit)
        facts |= {"loss without it": _mean(harmed)}
        return judged("necessary", name, harm, "fraction", conditions, facts, stop_early)


def _necessary(
    trial: TwinTrial,
    circuit: Circuit,
    namesakes: Mapping[str, Circuit],
    harmed: Float[Tensor, " pair"],
    harm: float,
    draws: int,
    seed: int,
    tick: Tick,
) -> Iterator[Condition]:
    own = _mean(trial.full)
    yield (does := _does(own))
    if does.state != "holds":
        return
    yield from few_others(circuit)
    yield threshold("harm", "harm of ablating it", harm, LEAST, "fraction", "higher")
    for name, namesake in namesakes.items():
        of_nonsense = name == NONSENSE
        other = outside(namesake, circuit) if of_nonsense else at_size(namesake, circuit)
        theirs = trial.without(other)
        columns = torch.stack([harmed - theirs, CHANCE - trial.full], dim=1)
        yield favours(
            f"namesake.{name}",
            f"more harm than {called(name)}{', outside this one' if of_nonsense else ''}",
            resampled(columns, trial.batch.groups, ratio, seed),
            (_mean(theirs) - own) / (CHANCE - own),
            "fraction",
            "higher",
            nodes=len(other),
        )
    activity = activity_of(trial.model, circuit, trial.batch)
    found = []
    for i in range(draws):
        without = trial.without(apart(circuit, seed + i, activity))
        found.append((_mean(without) - own) / (CHANCE - own))
        tick()
    name = "more harm than random nodes as active"
    yield outranks("matched", name, harm, found, "fraction", "higher")
    yield from no_namesake(namesakes)


def _does(nats: float) -> Condition:
    return premise("does", "the sparse model does the task", nats, DOES, "nats", "lower")


def _facts(trial: TwinTrial, circuit: Circuit) -> dict[str, Any]:
    return {"nodes": len(circuit), "whole model": _mean(trial.full), **about(trial.batch)}


def _mean(x: Float[Tensor, " pair"]) -> float:
    return float(x.double().mean())
