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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.clusters import FEWEST, fixed, resampled
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

from .judge import judged
from .twin import LEAST, few_others, no_namesake

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

    def reached(self, name: str, make: Make) -> Arm | None:
        """Return an arm at its own site, scaled to the circuit's share; None where it never is."""
        arm = self.splits.placed(name, make, share)
        return self.splits.reaching(arm, self.own.on_validation)


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
    facts = {"unmatched pairs": unmatched, **about(trial), "P": float(trial.p_0.mean())}
    name = circuit.task.name
    if told.state != "holds":
        return judged("carries", name, 0.0, "fraction", iter([told]), facts), None
    arms = Carrying(splits, circuit, namesakes)
    own = share(trial, arms.logits)
    facts |= {"site": arms.own.site, "share on validation": arms.own.on_validation}
    conditions = _conditions(arms, told, own, draws, seed, tick, facts)
    return judged("carries", name, own, "fraction", conditions, facts, stop_early), arms


def _conditions(
    arms: Carrying,
    told: Condition,
    own: float,
    draws: int,
    seed: int,
    tick: Tick,
    facts: dict[str, Any],
) -> Iterator[Condition]:
    trial = arms.splits.test
    yield told
    yield from few_others(arms.circuit)
    yield threshold("share", "share of the answer that it moves", own, LEAST, "fraction", "higher")
    for name, deltas in arms.empty(draws, seed).items():
        found = arms.splits.statistics(deltas, share, tick)
        words = f"a larger share than {WORDS[name]} of its length"
        yield outranks(f"empty.{name}", words, own, found, "fraction", "higher")
    mine = trial.collateral_a(arms.logits)
    facts |= {"collateral A": float(mine.mean())}
    facts |= {"collateral B": float(trial.collateral_b(arms.logits).mean())}
    both = {f"rival.{k}": (WORDS[k], make) for k, make in arms.rivals.items()}
    both |= {f"namesake.{k}": (called(k), make) for k, make in arms.namesakes.items()}
    for key, (words, make) in both.items():
        yield _against(arms, key, words, make, own, mine)
        tick()
    yield from no_namesake(arms.namesakes)


def _against(
    arms: Carrying, key: str, words: str, make: Make, own: float, mine: Float[Tensor, " pair"]
) -> Condition:
    """Return the condition that the circuit has less collateral A than an arm of equal share."""
    trial, goal = arms.splits.test, arms.own.on_validation
    arm = arms.reached(words, make)
    if arm is None:
        most = arms.splits.placed(words, make, share).on_validation
        name = f"{words} never reaches its share"
        return threshold(f"{key}", name, goal, min(most, goal), "fraction", "higher")
    logits = arms.splits.run(arm)
    theirs = trial.collateral_a(logits)
    return favours(
        key,
        f"less collateral than {words}",
        resampled((mine - theirs)[:, None], trial.batch.groups),
        float(theirs.mean()),
        "nats",
        "lower",
        site=arm.site,
        factor=arm.factor,
        share=share(trial, logits),
        **{"collateral B": float(trial.collateral_b(logits).mean())},
    )


def about(trial: Trial) -> dict[str, Any]:
    """Return how many pairs and levels a trial has."""
    batch = trial.batch
    return {
        "pairs": batch.n_pairs,
        "split": batch.split,
        "levels": batch.levels(),
        "fixed": fixed(batch.groups),
    }


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


def too_few(task: str, pairs: int, unmatched: int) -> Claim:
    """Return the claim that cannot be told, since fewer than FEWEST pairs have a source."""
    if pairs >= FEWEST:
        raise ValueError(f"too_few: {pairs} pairs are enough; judge them (`carries`)")
    few = premise(
        "sources",
        "pairs that have an unrelated source",
        float(pairs),
        float(FEWEST),
        "pairs",
        "higher",
    )
    return judged("carries", task, 0.0, "fraction", iter([few]), {"unmatched pairs": unmatched})
