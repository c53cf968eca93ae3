"""Claim 4: the dense model needs the circuit, and for this task more than for others.

    delta_s    sigma_s D_s dz_t of holding the circuit's nodes at their mean, strength 1
    harm h     (L_edit - L_0) / (ln 2 - L_0), L task nats of the dense model, ratio of means

The harm must be at least 0.25, and more than that of the delta rotated, of the same change through
decoders of the same covariance, and of random nodes as active (p <= 0.05 each, all of its length).
It must be more than the harm of the nonsense twin's nodes outside the circuit, and of every other
namesake, at its length. And it must exceed the harm that the same ablation, at the same site, does
to every task of another family that the dense model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.losses.quantities import ce_nats
from bridges.transfer.intervention import Ablation
from evals.scores.clusters import Resampled, ratio, resampled
from evals.scores.verdict import Claim, Condition, favours, outranks, premise, threshold
from evals.trials.arms import Arm, Make, Splits, ablating, alike, mixed, once, turned
from evals.trials.dense_trial import Decoded, Trial
from evals.trials.matched import NONSENSE, activity_of, apart, called, outside
from sparse.circuits.circuit import Circuit
from sparse.tasks.batch import CHANCE
from sparse.tasks.score import DOES

from .carries import WORDS
from .judge import LEAST, about, few_others, judged, no_namesake

Tick = Callable[[], object]


def harm(trial: Trial, logits: Tensor) -> float:
    """Return the harm of an edit: the statistic of this claim."""
    gap = trial.nats(logits) - trial.nats_0
    return float(gap.mean() / (CHANCE - trial.nats_0).mean())


def harm_to(trial: Trial, make: Make, site: int) -> Resampled:
    """Return the harm of an ablation at a site to a task, resampled over what its pairs share."""
    nats = trial.nats(trial.logits(site, make(trial)(site)))
    columns = torch.stack([nats - trial.nats_0, CHANCE - trial.nats_0], dim=1)
    return resampled(columns, trial.batch.groups, ratio)


def needed(
    splits: Splits,
    circuit: Circuit,
    namesakes: Mapping[str, Circuit],
    others: Mapping[str, Trial],
    *,
    heldout: Int[Tensor, "block pos"] | None = None,
    draws: int = 39,
    seed: int = 0,
    stop_early: bool = False,
    tick: Tick = lambda: None,
) -> Claim:
    """Return claim 4 of a circuit.

    `namesakes` are as in `carries`; of the nonsense twin's ranking the first nodes outside the
    circuit are taken. `others` are test trials of tasks of other families; those that the dense
    model does not do on test are left out and named in the facts. `heldout` are blocks of text for
    a fact: the nats per token that the same ablation costs there.
    """
    trial = splits.test
    own_nats = float(trial.nats_0.mean())
    does = premise("does", "the dense model does the task", own_nats, DOES, "nats", "lower")
    name, facts = circuit.task.name, {**about(trial.batch), "untouched": own_nats}
    if does.state != "holds":
        return judged("needed", name, 0.0, "fraction", iter([does]), facts)
    make = once(ablating(circuit))
    arm = splits.placed("the circuit", make, harm)
    logits = splits.run(arm)
    trial.check(arm.site, make(trial)(arm.site))
    own = harm(trial, logits)
    facts |= {"site": arm.site, "harm on validation": arm.on_validation}
    facts |= {"task loss": float(trial.nats(logits).mean())}
    done = {k: other for k, other in others.items() if float(other.nats_0.mean()) <= DOES}
    if undone := [k for k in others if k not in done]:
        facts |= {"other tasks that it does on validation only": undone}
    if heldout is not None:
        facts |= {"held-out text, nats per token": text_harm(trial, circuit, arm.site, heldout)}

    def conditions() -> Iterator[Condition]:
        yield does
        yield from few_others(circuit)
        yield threshold("harm", "harm of ablating it", own, LEAST, "fraction", "higher")
        yield from _specific(trial, done, make, arm)
        for k, namesake in namesakes.items():
            yield _namesake(splits, circuit, k, namesake, make, logits)
        yield from _empty(splits, circuit, make, own, draws, seed, tick)
        yield from no_namesake(namesakes)
        if not done:  # "for this task more than for others" was not asked
            words = "other tasks that the dense model does (give others=)"
            yield premise("others", words, 0.0, 1.0, "tasks", "higher")

    return judged("needed", name, own, "fraction", conditions(), facts, stop_early)


def _namesake(
    splits: Splits,
    circuit: Circuit,
    name: str,
    namesake: Circuit,
    make: Callable[[Trial], Decoded],
    logits: Tensor,
) -> Condition:
    """Return the condition that a namesake, at the circuit's length, does less harm."""
    of_nonsense = name == NONSENSE
    nodes = outside(namesake, circuit) if of_nonsense else namesake
    where = ", outside this one" if of_nonsense else ""
    trial, arm = splits.test, splits.placed(name, alike(ablating(nodes), make), harm)
    theirs = splits.run(arm)
    gap = trial.nats(logits) - trial.nats(theirs)
    columns = torch.stack([gap, CHANCE - trial.nats_0], dim=1)
    return favours(
        f"namesake.{name}",
        f"more harm than {called(name)}{where}, of its length",
        resampled(columns, trial.batch.groups, ratio),
        harm(trial, theirs),
        "fraction",
        "higher",
        site=arm.site,
        nodes=len(nodes),
    )


def _specific(
    trial: Trial, others: Mapping[str, Trial], make: Make, arm: Arm
) -> Iterator[Condition]:
    """Yield the conditions that it harms its own task more than every other one."""
    own = harm_to(trial, make, arm.site)
    for name, other in others.items():
        theirs = harm_to(other, make, arm.site)
        words = f"more harm to its own task than to {name}"
        yield favours(
            f"specific.{name}", words, own.minus(theirs), theirs.value, "fraction", "higher"
        )


def _empty(
    splits: Splits,
    circuit: Circuit,
    make: Callable[[Trial], Decoded],
    own: float,
    draws: int,
    seed: int,
    tick: Tick,
) -> Iterator[Condition]:
    """Yield the conditions on the empty controls, all of the delta's length."""
    seeds = range(seed, seed + draws)
    activity = activity_of(splits.validation.sparse, circuit, splits.validation.batch)
    families: dict[str, Iterator[tuple[str, Make]]] = {
        "rotations": (("a rotation", turned(make, i)) for i in seeds),
        "decoders": (("a decoder", mixed(make, i)) for i in seeds),
        "nodes": (
            ("random nodes", alike(ablating(apart(circuit, i, activity)), make)) for i in seeds
        ),
    }
    for family, deltas in families.items():
        found = splits.statistics(deltas, harm, tick)
        words = f"more harm than {WORDS[family]} of its length"
        yield outranks(f"empty.{family}", words, own, found, "fraction", "higher")


@torch.no_grad()
def text_harm(
    trial: Trial, circuit: Circuit, site: int, blocks: Int[Tensor, "block pos"], at_once: int = 8
) -> float:
    """Return the nats per token that ablating the circuit at a site costs on held-out text."""
    costs: list[Float[Tensor, " block"]] = []
    for part in blocks.split(at_once):
        ids = part.to(trial.dense.device)
        h = trial.dense.residuals(ids)
        delta = trial.mapped.delta(Ablation(list(circuit)), ids, site)
        edited = trial.dense.resume(site, h[site] + delta, ids)
        before = ce_nats(trial.dense.unembed(h[-1], ids), ids)
        costs.append((ce_nats(edited, ids) - before).mean(-1))
    return float(torch.cat(costs).mean())
