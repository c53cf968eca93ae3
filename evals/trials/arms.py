"""Arms of an experiment in the dense model: ways to make a delta, each at the site it does best at.

    arm      a way to make a delta at any site, on either split
    site     where the arm's statistic (share or harm) is largest on validation, at strength 1
    reach    the smallest factor up to 8 on the delta at which the arm's share on validation is that
             of the circuit

The claim, its empty controls, its rivals and its namesakes all choose their site in this one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.controls import of_length, rotated, rotation
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node, nodes_of

from .dense_trial import Decoded, Deltas, Trial

Statistic = Callable[[Trial, Tensor], float]
"""A trial and the logits of an edit to the number by which a site is chosen."""
Make = Callable[[Trial], Deltas]
LARGEST = 8.0
"""Largest factor on a delta."""
GRID = tuple(LARGEST * 2 ** (-i / 2) for i in range(13, -1, -1))
"""Factors that are tried, 0.09 to 8."""
NEARLY = 0.95
"""Part of the goal that counts as reaching it, at the factor of the largest share. Without it an
edit that goes past the whole answer would beat all that stop at the answer, uncompared."""
HALVINGS = 4
"""Bisection steps between two of them."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to make a delta, and where and by how much it is applied."""

    name: str
    make: Make
    site: int
    on_validation: float
    """Its statistic at that site on validation, at strength 1."""
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The same task on the split that chooses and on the split that counts."""

    validation: Trial
    test: Trial

    def placed(self, name: str, make: Make, statistic: Statistic) -> Arm:
        """Return the arm at the site where its statistic is largest on validation."""
        deltas = make(self.validation)
        found = {
            site: statistic(self.validation, self.validation.logits(site, deltas(site)))
            for site in self.validation.sites
        }
        best = max(found, key=found.__getitem__)
        return Arm(name=name, make=make, site=best, on_validation=found[best])

    def run(self, arm: Arm) -> Float[Tensor, "prompt vocab"]:
        """Return the logits of the arm on test."""
        return self.test.logits(arm.site, arm.factor * arm.make(self.test)(arm.site))

    def reaching(self, arm: Arm, goal: float) -> Arm | None:
        """Return the arm at the smallest factor whose share on validation is `goal`; None: never.

        The factors of GRID are tried in order, and the first that reaches the goal is refined by
        bisection. Where none does, but the largest share is at least NEARLY of the goal, the arm is
        taken there.
        """
        trial, delta = self.validation, arm.make(self.validation)(arm.site)

        def shares(factors: Iterable[float]) -> Iterator[float]:
            logits = trial.many(arm.site, (factor * delta for factor in factors))
            return (trial.share(trial.moved(y)) for y in logits)

        low, high = 0.0, None
        largest, nearest = -math.inf, 0.0
        for factor, found in zip(GRID, shares(GRID), strict=True):
            if found >= goal:
                high = factor
                break
            if found > largest:
                largest, nearest = found, factor
            low = factor
        if high is None:
            return replace(arm, factor=nearest) if largest >= NEARLY * goal else None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if next(shares([middle])) >= goal else (middle, high)
        return replace(arm, factor=high)

    def statistics(
        self, draws: Iterable[tuple[str, Make]], statistic: Statistic, tick: Callable[[], object]
    ) -> list[float]:
        """Return, for every draw of an empty control, its statistic on test at its own site."""
        found = []
        for name, make in draws:
            found.append(statistic(self.test, self.run(self.placed(name, make, statistic))))
            tick()
        return found


def steering(nodes: Iterable[Node]) -> Callable[[Trial], Decoded]:
    """Return the arm's deltas of interchanging these nodes with their values in the sources."""
    kept = tuple(nodes)
    return lambda trial: trial.steered(kept)


def ablating(nodes: Iterable[Node]) -> Callable[[Trial], Decoded]:
    """Return the arm's deltas of holding these nodes at their mean."""
    kept = tuple(nodes)
    return lambda trial: trial.ablated(kept)


def everything(circuit: Circuit) -> list[Node]:
    """Return all nodes of the model."""
    return nodes_of(circuit.ablation)


def complement(circuit: Circuit) -> list[Node]:
    """Return all nodes that are not of the circuit."""
    own = set(circuit)
    return [node for node in nodes_of(circuit.ablation) if node not in own]


def alike(make: Make, like: Make) -> Make:
    """Return the deltas of `make`, at every token as long as those of `like` at the same site."""

    def made(trial: Trial) -> Deltas:
        own, other = make(trial), like(trial)
        return lambda site: of_length(own(site), other(site))

    return made


def turned(like: Make, seed: int) -> Make:
    """Return the deltas of `like`, turned in the dense stream by a rotation of this seed."""

    def made(trial: Trial) -> Deltas:
        own = like(trial)
        return lambda site: rotated(own(site), seed)

    return made


def mixed(like: Callable[[Trial], Decoded], seed: int) -> Make:
    """Return the deltas that a random decoder of the same covariance makes of the same changes.

        D' = D R,   D' D'^T = D D^T         R a rotation of the sparse stream, by seed

    Every sparse channel then writes a random mixture of what all channels write. Lengths are those
    of `like`.
    """

    def made(trial: Trial) -> Deltas:
        own, r = like(trial), rotation(trial.sparse.d_resid, seed)

        @torch.no_grad()
        def delta(site: int) -> Float[Tensor, "prompt pos d_dense"]:
            dz = own.changes[trial.bridges.config.pairs[site]]
            return of_length(own.of(dz @ r.T.to(dz), site), own(site))

        return delta

    return made


def once(make: Callable[[Trial], Decoded]) -> Callable[[Trial], Decoded]:
    """Return `make`, computed once for every trial: the sparse model then runs once for it."""
    known: dict[int, Decoded] = {}

    def made(trial: Trial) -> Decoded:
        if id(trial) not in known:
            known[id(trial)] = make(trial)
        return known[id(trial)]

    return made
