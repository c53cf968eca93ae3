"""Cases whose answer is known: nulls, of which no claim may be positive, and planted truths.

A case is a run (two models, bridges, tokenizer), a circuit, its namesakes and the claims that are
asked. Every null takes away one cause and leaves the rest as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bridges import load_run
from bridges.maps.bridge import BridgeSet
from evals.scores.verdict import Kind
from evals.trials.matched import activity_of, apart, outside
from sparse import PruneConfig, SparseGPT, Task, node_means, prune
from sparse.circuits.circuit import Circuit
from sparse.tasks.pair import Targets

ALL: tuple[Kind, ...] = ("sufficient", "necessary", "carries", "needed")
DENSE: tuple[Kind, ...] = ("carries", "needed")
TASKS = (
    "single_double_quote", "while_return_true", "else_elif", "if_equals", "var_if", "indent_for",
)  # fmt: skip
SENSELESS: tuple[Targets, ...] = ((" The", " This"), (" the", " this"), ("+", "*"), (";", "#"))
QUICK = PruneConfig(k_coef=3e-3, n_steps=200, n_pairs=8, clean_up=0.0, window=0)
"""How null circuits are pruned: fewer steps and pairs than by default, for circuits of a like size.
"""
NOISE = 8.0
"""Norm of the noise on a decoder, in norms of the decoder; its own norm is kept."""


HARDER: dict[str, Any] = {"noise": 0.1, "margin": 3.5}
"""Settings of every other planted truth: twice the noise on the dense weights, and two thirds of
the lead of the right answer. (With twice the distraction the distractors themselves cost the model
more than 0.05 nats, and with a noise of 0.2 a dense copy may not do the task: that is no truth.)"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A circuit, asked for the claims `kinds` on its own task."""

    run: Any
    circuit: Circuit
    namesakes: Callable[[], Mapping[str, Circuit]]
    """Makes the namesakes: pruning them takes long, and most nulls fail before they are needed."""
    others: tuple[Task, ...]
    """Tasks of other families that the dense model does."""
    kinds: tuple[Kind, ...]


@cache
def shipped() -> tuple[Any, dict[str, Circuit]]:
    """Return the built-in run and its circuits."""
    run = load_run("tiny")
    return run, run.circuits()


def task_of(i: int) -> tuple[str, int]:
    """Return the task and the seed of case i: the tasks in turn."""
    return TASKS[i % len(TASKS)], i // len(TASKS)


def other_tasks(name: str) -> tuple[Task, ...]:
    """Return the tasks that both models do, without one."""
    _, found = shipped()
    return tuple(found[n].task for n in TASKS if n != name)


def rivals_of(name: str) -> dict[str, Circuit]:
    """Return the namesakes of a true circuit: its nonsense twin's, and those of other tasks."""
    _, found = shipped()
    others = {n: found[n] for n in TASKS if n != name}
    return {"nonsense": found[f"{name}:nonsense"], **others}


# Circuits pruned for targets without sense.


def senseless(task: Task, i: int) -> Task:
    """Return the task with two unrelated targets, in either direction."""
    first, second = SENSELESS[i // 2 % len(SENSELESS)]
    return task.with_targets((first, second) if i % 2 else (second, first))


def swapped(task: Task, i: int) -> Task:
    """Return the task with its two targets exchanged."""
    own = task.train[0]
    return task.with_targets((own.target_2 or "\n", own.target_1))


def garbage(task: Task, i: int) -> Task:
    """Return the task with two tokens of the vocabulary as targets, drawn by `i`."""
    run, _ = shipped()
    rng = Random(f"{task.name} {i}")
    while True:
        ids = rng.sample(range(run.dense.vocab_size), 2)
        texts = [run.tokenizer.decode([t]) for t in ids]
        changed = replace(task.with_targets((texts[0], texts[1])), alternatives=())
        try:
            for split in ("train", "validation", "test"):
                changed.batch(run.tokenizer, split)
        except ValueError:
            continue
        return changed


MAKERS = {"senseless": senseless, "swapped": swapped, "garbage": garbage}


def pruned_for(folder: Path, kind: str, i: int, seed: int) -> Circuit:
    """Return the circuit pruned for case i of a kind of targets, from the cache if it is there."""
    run, found = shipped()
    name, number = task_of(i)
    task = replace(MAKERS[kind](found[name].task, number), name=f"{name}:nonsense")
    at = folder / "circuits" / f"{kind}-{i}-{seed}"
    if (at / "circuit.json").is_file():
        return Circuit.load(at)
    config = replace(QUICK, seed=seed + 2 * number)  # swapped targets have no other difference
    circuit = prune(run.sparse, task, config, tokenizer=run.tokenizer, force=True)
    circuit.save(at)
    return circuit


def without_sense(kind: str, on_true: bool) -> Callable[[int, Path], Case]:
    """Return the cases of a circuit for targets without sense.

    It is asked for those targets, or for the true ones (`on_true`); for these it may be necessary
    and needed, since it reads the same contexts.
    """

    def case(i: int, folder: Path) -> Case:
        run, found = shipped()
        name, _ = task_of(i)
        true = "the true circuit" if on_true else "the true task"

        def namesakes() -> dict[str, Circuit]:
            again = pruned_for(folder, kind, i, 1)
            others = {n: found[n] for n in TASKS if n != name}
            return {"nonsense": again, true: found[name], **others}

        circuit = pruned_for(folder, kind, i, 0)
        return Case(
            run=run,
            circuit=replace(circuit, task=found[name].task) if on_true else circuit,
            namesakes=namesakes,
            others=other_tasks(name),
            kinds=("sufficient", "carries") if on_true else ALL,
        )

    return case


# Circuits that are not of the task.


def random_nodes(i: int, folder: Path) -> Case:
    """Return a case of random nodes, equally many at every location."""
    return _nodes(i, lambda true, seed: apart(true, 1000 + seed))


def live_nodes(i: int, folder: Path) -> Case:
    """Return a case of random nodes that are as active as the circuit's."""
    run, _ = shipped()

    def drawn(true: Circuit, seed: int) -> Circuit:
        batch = true.task.batch(run.tokenizer, "validation")
        return apart(true, 2000 + seed, activity_of(run.sparse, true, batch))

    return _nodes(i, drawn)


def nonsense_outside(i: int, folder: Path) -> Case:
    """Return a case of a nonsense circuit's nodes that are not of the true circuit."""
    kind = ("senseless", "garbage")[i % 2]
    found = pruned_for(folder, kind, i, 0)
    case = _nodes(i, lambda true, seed: outside(found, true))
    beside = case.namesakes

    def namesakes() -> dict[str, Circuit]:
        return {**beside(), "nonsense": pruned_for(folder, kind, i, 1)}

    return replace(case, namesakes=namesakes, kinds=("necessary", "needed"))


def _nodes(i: int, make: Callable[[Circuit, int], Circuit]) -> Case:
    run, found = shipped()
    name, seed = task_of(i)
    true = found[name]
    circuit = replace(make(true, seed), task=true.task)
    beside = {**rivals_of(name), "the true circuit": true}
    return Case(
        run=run, circuit=circuit, namesakes=lambda: beside, others=other_tasks(name), kinds=ALL
    )


def other_circuit(i: int, folder: Path) -> Case:
    """Return a case of the circuit of another task."""
    run, found = shipped()
    pairs = [(a, b) for a in TASKS for b in TASKS if a != b]
    asked, owner = Random(0).sample(pairs, len(pairs))[i % len(pairs)]
    beside = {**rivals_of(asked), "the true circuit": found[asked]}
    beside.pop(owner)
    circuit = replace(found[owner], task=found[asked].task)
    return Case(
        run=run, circuit=circuit, namesakes=lambda: beside, others=other_tasks(asked), kinds=ALL
    )


# Bridges that carry nothing.


def spoiled(change: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[int, Path], Case]:
    """Return the cases of true circuits through decoders that were changed."""

    def case(i: int, folder: Path) -> Case:
        run, found = shipped()
        name, seed = task_of(i)
        bridges = with_decoders(run.bridges, change, seed)
        fields = {"dense": run.dense, "sparse": run.sparse, "tokenizer": run.tokenizer}
        return Case(
            run=SimpleNamespace(bridges=bridges, **fields),
            circuit=found[name],
            namesakes=lambda: rivals_of(name),
            others=other_tasks(name),
            kinds=DENSE,
        )

    return case


def with_decoders(
    bridges: BridgeSet, change: Callable[[Tensor, torch.Generator], Tensor], seed: int
) -> BridgeSet:
    """Return the bridges with every decoder changed, by a seed."""
    new = BridgeSet(bridges.config)
    new.load_state_dict(bridges.state_dict())
    new.dense_fingerprint = bridges.dense_fingerprint
    new.sparse_fingerprint = bridges.sparse_fingerprint
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in new.decoders:
            layer.weight.copy_(change(layer.weight, rng))  # pyright: ignore
    return new.eval().requires_grad_(False)


def permuted(d: Tensor, rng: torch.Generator) -> Tensor:
    """Return the decoder with its sparse channels permuted."""
    return d[:, torch.randperm(d.shape[1], generator=rng)]


def rotated(d: Tensor, rng: torch.Generator) -> Tensor:
    """Return the decoder with the dense stream rotated."""
    return _rotation(d.shape[0], rng) @ d


def covariant(d: Tensor, rng: torch.Generator) -> Tensor:
    """Return a decoder of the same covariance: the sparse stream is rotated before it."""
    return d @ _rotation(d.shape[1], rng)


def noised(times: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return a change that adds noise of `times` the decoder's norm and keeps that norm."""

    def change(d: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(d.shape, generator=rng)
        sum_ = d + times * noise * d.norm() / noise.norm()
        return sum_ * d.norm() / sum_.norm()

    return change


def _rotation(n: int, rng: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=rng))
    return q * r.diagonal().sign()


# Twins that learned nothing.


def without_twin(
    change: Callable[[SparseGPT, torch.Generator], None],
) -> Callable[[int, Path], Case]:
    """Return the cases of the true circuit's nodes in a changed twin, with bridges fitted anew."""

    def case(i: int, folder: Path) -> Case:
        run, found = shipped()
        name, seed = task_of(i)
        twin = SparseGPT(run.sparse.config)
        twin.load_state_dict(run.sparse.state_dict())
        with torch.no_grad():
            change(twin, torch.Generator().manual_seed(seed))
        twin.eval().requires_grad_(False)
        bridges = ridge(run, twin, run.heldout()[:32])
        means = node_means(twin, run.heldout()[:16])
        nodes = {
            k: replace(c, model_fingerprint=twin.fingerprint(), ablation=means, source=None)
            for k, c in {**rivals_of(name), name: found[name]}.items()
        }
        circuit = nodes.pop(name)
        fields = {"dense": run.dense, "sparse": twin, "tokenizer": run.tokenizer}
        return Case(
            run=SimpleNamespace(bridges=bridges, **fields),
            circuit=circuit,
            namesakes=lambda: nodes,
            others=other_tasks(name),
            kinds=ALL,
        )

    return case


def shuffled(twin: SparseGPT, rng: torch.Generator) -> None:
    """Shuffle the entries of every matrix: the same numbers, equally many zeros."""
    for p in twin.parameters():
        if p.dim() > 1:
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=rng)].view_as(p))


def reinitialised(twin: SparseGPT, rng: torch.Generator) -> None:
    """Draw every weight that is not zero anew, of the same spread."""
    for p in twin.parameters():
        if p.dim() > 1:
            drawn = torch.randn(p.shape, generator=rng) * p[p != 0].std()
            p.copy_(torch.where(p != 0, drawn, 0.0))


def untrained(twin: SparseGPT, rng: torch.Generator) -> None:
    """Put the twin back to where its training began: dense and random."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    twin.load_state_dict(SparseGPT(twin.config).state_dict())


@torch.no_grad()
def ridge(run: Any, twin: SparseGPT, blocks: Tensor, penalty: float = 1e-2) -> BridgeSet:
    """Return bridges whose encoders and decoders are ridge regressions between the two models."""
    new = BridgeSet(run.bridges.config)
    h, z = run.dense.residuals(blocks), twin.residuals(blocks)
    new.calibrate(h)
    for i, (s, t) in enumerate(new.config.pairs.items()):
        x = ((h[s] - new.mean[i]) / new.scale[i]).flatten(0, 1).double()
        y = z[t].flatten(0, 1).double()
        for layer, a, b in ((new.encoders[i], x, y), (new.decoders[i], y, x)):
            centre, offset = a.mean(0), b.mean(0)
            gram = (a - centre).T @ (a - centre)
            gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            w = torch.linalg.solve(gram, (a - centre).T @ (b - offset)).T
            layer.weight.copy_(w)  # pyright: ignore
            layer.bias.copy_(offset - w @ centre)  # pyright: ignore
    new.dense_fingerprint = run.dense.fingerprint
    new.sparse_fingerprint = twin.fingerprint()
    return new.eval().requires_grad_(False)


# Models made by hand.


def planted(decoy: bool) -> Callable[[int, Path], Case]:
    """Return the cases of planted pairs: truths, or decoys that do the task another way.

    Every other truth is a harder one.
    """

    def case(i: int, folder: Path) -> Case:
        from bridges import plant_pair

        pair = plant_pair(i, decoy=decoy, **({} if decoy or i % 2 else HARDER))
        found = pair.planted.circuits
        name = list(found)[i % len(found)]
        others = {n: c for n, c in found.items() if n != name}
        return Case(
            run=pair,
            circuit=found[name],
            namesakes=lambda: {"nonsense": pair.planted.nonsense(name), **others},
            others=tuple(c.task for c in others.values()),
            kinds=DENSE if decoy else ALL,
        )

    return case


NULLS: dict[str, Callable[[int, Path], Case]] = {
    **{f"{kind} targets, on their own task": without_sense(kind, on_true=False) for kind in MAKERS},
    **{f"{kind} targets, on the true task": without_sense(kind, on_true=True) for kind in MAKERS},
    "random circuits": random_nodes,
    "live-matched circuits": live_nodes,
    "another task's circuit": other_circuit,
    "nonsense nodes outside the circuit": nonsense_outside,
    "bridges permuted": spoiled(permuted),
    "bridges rotated": spoiled(rotated),
    "bridges noised at kept length (8x)": spoiled(noised(NOISE)),
    "bridges of the same covariance": spoiled(covariant),
    "twin shuffled": without_twin(shuffled),
    "twin re-initialised": without_twin(reinitialised),
    "twin untrained": without_twin(untrained),
    "planted decoy": planted(decoy=True),
}
TRUTHS = "planted truth"


def cases(kind: str, numbers: range, folder: Path) -> Iterator[tuple[int, Case]]:
    """Yield the numbered cases of a kind."""
    make = planted(decoy=False) if kind == TRUTHS else NULLS[kind]
    return ((i, make(i, folder)) for i in numbers)
