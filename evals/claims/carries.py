"""Claim 3: in the dense model the circuit carries what the task is about, and little else.

    source        a context of the other kind from another pair (unrelated.py)
    delta_s       sigma_s D_s dz_t of giving the circuit's nodes their values in the source
    share         (P_edit - P_0) / (P_cf - P_0), P = P(target of the other context)
    collateral A  KL(dense on the counterfactual of the same prompt || edited), nats
    collateral B  KL(untouched || edited) without the two targets, nats; a fact

The share must be at least 0.25, and more than that of the circuit's delta rotated, of the same
change through decoders of the same covariance, and of random nodes (p <= 0.05 each, all of its
length). Rivals and namesakes are then scaled to the circuit's share on validation; on test each
must have more collateral A. One that comes within 5 % of that share is compared where it comes
nearest, and one that does not is beaten. Rivals: the embedding difference decoded, all nodes, all
nodes but the circuit's, the source's full patch. Namesakes: the nonsense twin's circuit, circuits
of other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.clusters import FEWEST, resampled
from evals.scores.verdict import Claim, Condition, favours, outranks, premise, threshold
from evals.trials.arms import (
    Arm,
    Make,
    Splits,
    alike,
    complement,
    everything,
    mixed,
    once,
    steering,
    turned,
)
from evals.trials.dense_trial import Decoded, Deltas, Trial
from evals.trials.matched import NONSENSE, apart, at_size, called
from sparse.circuits.circuit import Circuit

from .judge import LEAST, about, few_others, judged, no_namesake

ROOM = 0.1
"""Least gap between P_cf and P_0: with less, the dense model does not tell the contexts apart."""
Tick = Callable[[], object]


def share(trial: Trial, logits: Tensor) -> float:
    """Return the share of an edit: the statistic of this claim."""
    return trial.share(trial.moved(logits))


class Carrying:
    """The circuit's own arm, and every arm that it is compared with."""

    def __init__(self, splits: Splits, circuit: Circuit, namesakes: Mapping[str, Circuit]) -> None:
        self.splits, self.circuit = splits, circuit
        self.make: Callable[[Trial], Decoded] = once(steering(circuit))
        self.own: Arm = splits.placed("the circuit", self.make, share)
        self.logits: Float[Tensor, "prompt vocab"] = splits.run(self.own)
        splits.test.check(self.own.site, self.make(splits.test)(self.own.site))
        self.rivals: dict[str, Make] = {
            "embedding": lambda trial: trial.embedded(),
            "all_nodes": steering(everything(circuit)),
            "complement": steering(complement(circuit)),
            "patch": lambda trial: trial.patched(),
        }
        self.namesakes: dict[str, Make] = {
            k: steering(at_size(c, circuit, exactly=True) if k == NONSENSE else c)
            for k, c in namesakes.items()
        }

    def empty(self, draws: int, seed: int) -> dict[str, Iterator[tuple[str, Make]]]:
        """Return the empty controls by family: `draws` ways each to make a delta."""
        seeds = range(seed, seed + draws)
        return {
            "rotations": (("a rotation", turned(self.make, i)) for i in seeds),
            "decoders": (("a decoder", mixed(self.make, i)) for i in seeds),
            "nodes": (
                ("random nodes", alike(steering(apart(self.circuit, i)), self.make)) for i in seeds
            ),
        }

    def apart(self, seed: int) -> Make:
        """Return the deltas of random nodes, at the length that they have."""
        return steering(apart(self.circuit, seed))

    def reached(self, name: str, make: Make) -> tuple[Arm, Arm | None]:
        """Return an arm at its own site, and scaled to the circuit's share; None: never there."""
        arm = self.splits.placed(name, make, share)
        return arm, self.splits.reaching(arm, self.own.on_validation)


WORDS = {
    "embedding": "the embedding difference, decoded",
    "all_nodes": "all nodes",
    "complement": "all nodes but the circuit's",
    "patch": "the source's full patch",
    "rotations": "rotations of its own delta",
    "decoders": "random decoders of the same covariance",
    "nodes": "random nodes",
}


def carries(
    splits: Splits, circuit: Circuit, namesakes: Mapping[str, Circuit], **options: Any
) -> Claim:
    """Return claim 3 of a circuit, from trials whose sources are unrelated (`unrelated`).

    `options` are those of `carrying`.
    """
    return carrying(splits, circuit, namesakes, **options)[0]


def carrying(
    splits: Splits,
    circuit: Circuit,
    namesakes: Mapping[str, Circuit],
    *,
    draws: int = 39,
    seed: int = 0,
    unmatched: int = 0,
    stop_early: bool = False,
    tick: Tick = lambda: None,
) -> tuple[Claim, Carrying | None]:
    """Return claim 3, and the arms that were compared; None where none were.

    - `namesakes` are circuits by name: "nonsense", whose ranking is cut to the circuit's size, and
      those of tasks of other families.
    - `draws` is the number k of each empty control, drawn by `seed`.
    - `unmatched` pairs had no source and are not in the trials.
    - `stop_early` leaves out the conditions after the first that does not hold.
    - `tick` is called after every draw, rival and namesake.
    """
    trial = splits.test
    gap = float((trial.p_cf - trial.p_0).mean())
    told = premise(
        "does", "the dense model tells the contexts apart", gap, ROOM, "probability", "higher"
    )
    fewest = min(trial.batch.n_pairs, splits.validation.batch.n_pairs)
    premises = [_with_sources(fewest), told]
    facts = {"unmatched pairs": unmatched, **about(trial.batch), "P": float(trial.p_0.mean())}
    name = circuit.task.name
    if missed := [condition for condition in premises if condition.state != "holds"]:
        return judged("carries", name, 0.0, "fraction", iter(missed), facts), None
    arms = Carrying(splits, circuit, namesakes)
    own, collateral = share(trial, arms.logits), trial.collateral_a(arms.logits)
    facts |= {
        "site": arms.own.site,
        "share on validation": arms.own.on_validation,
        "collateral A": float(collateral.mean()),
        "collateral B": float(trial.collateral_b(arms.logits).mean()),
    }
    conditions = chain(premises, _conditions(arms, own, collateral, draws, seed, tick))
    return judged("carries", name, own, "fraction", conditions, facts, stop_early), arms


def _conditions(
    arms: Carrying,
    own: float,
    collateral: Float[Tensor, " pair"],
    draws: int,
    seed: int,
    tick: Tick,
) -> Iterator[Condition]:
    yield from few_others(arms.circuit)
    yield from _few_clusters(arms.splits.test)
    yield threshold("share", "share of the answer that it moves", own, LEAST, "fraction", "higher")
    for name, deltas in arms.empty(draws, seed).items():
        found = arms.splits.statistics(deltas, share, tick)
        words = f"a larger share than {WORDS[name]} of its length"
        yield outranks(f"empty.{name}", words, own, found, "fraction", "higher")
    both = {f"rival.{k}": (WORDS[k], make) for k, make in arms.rivals.items()}
    both |= {f"namesake.{k}": (called(k), make) for k, make in arms.namesakes.items()}
    for key, (words, make) in both.items():
        yield _against(arms, key, words, make, collateral)
        tick()
    yield from no_namesake(arms.namesakes)


def _against(
    arms: Carrying, key: str, words: str, make: Make, collateral: Float[Tensor, " pair"]
) -> Condition:
    """Return the condition that the circuit has less collateral A than an arm of equal share."""
    trial, goal = arms.splits.test, arms.own.on_validation
    at_full, arm = arms.reached(words, make)
    if arm is None:
        most, name = min(at_full.on_validation, goal), f"{words} never reaches its share"
        return threshold(key, name, goal, most, "fraction", "higher")
    logits = arms.splits.run(arm)
    theirs = trial.collateral_a(logits)
    return favours(
        key,
        f"less collateral than {words}",
        resampled((collateral - theirs)[:, None], trial.batch.groups),
        float(theirs.mean()),
        "nats",
        "lower",
        site=arm.site,
        factor=arm.factor,
        share=share(trial, logits),
        **{"collateral B": float(trial.collateral_b(logits).mean())},
    )


def _with_sources(pairs: int) -> Condition:
    name = "pairs of a split that have an unrelated source"
    return premise("sources", name, float(pairs), float(FEWEST), "pairs", "higher")


def _few_clusters(trial: Trial) -> Iterator[Condition]:
    """Yield a premise that is missed where no interval can be given for these pairs.

    Rivals that never reach the circuit's share are beaten without an interval; what they were
    beaten on must still be more than a few words.
    """
    found = resampled(trial.p_0[:, None], trial.batch.groups)
    if found.draws is None:
        name = f"levels of {found.factor} among its pairs"
        yield premise("clusters", name, float(found.n_clusters), float(FEWEST), "levels", "higher")


def mean_difference(train: Trial) -> Make:
    """Return a reference: the mean dense difference over train pairs, at the scored position.

    It needs neither a twin nor a bridge. It is the mean over the pairs of h on one context minus h
    on the other, at the last token of each; its sign is that of the prompt's kind.
    """
    rows = torch.arange(len(train.ids), device=train.ids.device)
    n = train.batch.n_pairs
    mean = {}
    for site in train.sites:
        at_last = train.h[site][rows, train.batch.last]
        mean[site] = (at_last[n:] - at_last[:n]).mean(0)

    def made(trial: Trial) -> Deltas:
        def delta(site: int) -> Float[Tensor, "prompt pos d_dense"]:
            out = torch.zeros_like(trial.h[site])
            half = trial.batch.n_pairs
            of = torch.arange(2 * half, device=out.device)
            sign = torch.where(of < half, 1.0, -1.0).to(out)
            out[of, trial.batch.last] = sign[:, None] * mean[site]
            return out

        return delta

    return made


def without_sources(task: str, unmatched: int) -> Claim:
    """Return the claim that cannot be told, since no pair of a split has an unrelated source."""
    facts = {"unmatched pairs": unmatched}
    return judged("carries", task, 0.0, "fraction", iter([_with_sources(0)]), facts)
