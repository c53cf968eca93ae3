"""Measure a circuit in the sparse model, on held-out pairs, beside circuits drawn at random.

    sufficiency  task loss when everything outside the circuit is ablated       nats, lower
    necessity    task loss when the circuit alone is ablated                    nats, higher
    fidelity     KL(full || circuit) at the scored position, whole vocabulary   nats, lower

Ablated nodes are held at a fixed value, their mean over training text or zero. Every mean is over
pairs, the independent unit; the value of a pair is the mean over its two contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bridges.losses.quantities import kl_nats
from evals.scores.paired import counted, paired, per_pair
from evals.scores.score import Score
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import nodes_of
from sparse.circuits.means import load_means
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.learn import learn
from sparse.circuits.score import circuit_logits, last_logits
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import TaskBatch, task_nats
from sparse.tasks.nonsense import easier_nonsense, is_nonsense_of
from sparse.tasks.score import positions_of

RANDOM = "random circuits of equal size"
OTHERS = "random sets of equally many other nodes"
Masks = Mapping[str, Tensor]
Measure = Callable[[Circuit], Tensor]


class _Split:
    """One split of the circuit's task in the sparse model; measures any circuit on it."""

    def __init__(self, model: SparseGPT, circuit: Circuit, batch: TaskBatch) -> None:
        self.model, self.circuit, self.batch = model, circuit, batch
        self.full = last_logits(model, batch)

    def sufficient(self, c: Circuit, ablation: Masks) -> Float[Tensor, " pair"]:
        """Return the task loss, in nats, with everything outside `c` ablated."""
        return per_pair(task_nats(self._logits(c.masks(), ablation), self.batch))

    def necessary(self, c: Circuit) -> Float[Tensor, " pair"]:
        """Return the task loss, in nats, with the nodes of `c` ablated and no others."""
        rest = {at: ~mask for at, mask in c.masks().items()}
        return per_pair(task_nats(self._logits(rest, self.circuit.ablation), self.batch))

    def fidelity(self, c: Circuit) -> Float[Tensor, " pair"]:
        """Return KL(full || c) in nats at the scored position, over the whole vocabulary."""
        return per_pair(kl_nats(self.full, self._logits(c.masks(), self.circuit.ablation)))

    def detail(self) -> dict[str, Any]:
        """Return what a reader needs beside the rows: the full model, the empty circuit, ..."""
        circuit, batch = self.circuit, self.batch
        empty = self.sufficient(circuit.with_nodes([], "none"), circuit.ablation)
        return {
            "split": batch.split,
            "pairs": batch.n_pairs,
            "full model": float(task_nats(self.full, batch).mean()),
            "everything ablated": float(empty.mean()),
            "target loss": circuit.target_loss,
            "targets": [list(pair) for pair in batch.targets],
            "dropped pairs": batch.dropped,
            "levels": batch.levels(),
        }

    def _logits(self, keep: Masks, ablation: Masks) -> Float[Tensor, "prompt vocab"]:
        return circuit_logits(self.model, self.batch, keep, ablation)


@torch.no_grad()
def evaluate_circuit(
    model: SparseGPT,
    circuit: Circuit,
    tokenizer: Any,
    *,
    nonsense: Circuit | None = None,
    equal_size: Circuit | None = None,
    means: Mapping[str, Tensor] | None = None,
    draws: int = 20,
    split: str = "test",
    seed: int = 0,
    progress: bool = False,
) -> list[Score]:
    """Return the scores of `circuit` on a split of its task, beside random circuits of equal size.

    There are `draws` random circuits. The nonsense twin of a task has the same prompts with
    unrelated targets; if pruning finds a good circuit for it too, the method is too expressive and
    the circuit says little. `nonsense` is the circuit that `prune` found for it, the control of the
    size. `equal_size` is a circuit for it of this circuit's size (`nonsense_at_size`), the control
    of the loss. Where both have the same number of nodes they share one row.

    A circuit is scored under its own kind of ablation and, where possible, under the other kind
    too. For a circuit found with zero ablation the other kind needs `means`; by default they are
    read from the folder of the sparse model, and without them the row is left out. Raises
    ValueError for a circuit of another model.

    >>> from bridges import load_run
    >>> from evals import evaluate_circuit
    >>> run = load_run("tiny")
    >>> circuit = run.circuits()["single_double_quote"]
    >>> rows = evaluate_circuit(run.sparse, circuit, run.tokenizer, draws=3)
    >>> rows[0].key, rows[0].unit, rows[0].outcome
    ('circuit.sufficiency.mean', 'nats', 'beats')
    """
    circuit.check(model)
    batch = circuit.task.batch(tokenizer, split, positions_of(model))
    batch = batch.to(next(model.parameters()).device)
    drawn = [circuit.random(model, seed + i) for i in range(draws)]
    apart = [circuit.random(model, seed + i, outside=True) for i in range(draws)]
    on_split = _Split(model, circuit, batch)
    bar = tqdm(total=4 * (draws + 1), desc="circuit", disable=not progress, leave=False)

    def row(key: str, name: str, measure: Measure, controls: list[Circuit], **more: Any) -> Score:
        def measured(c: Circuit) -> Tensor:
            bar.update()
            return measure(c)

        control = torch.stack([measured(c) for c in controls])
        given = {"unit": "nats", "better": "lower", "control_name": RANDOM, "seed": seed}
        given |= {"key": f"circuit.{key}", "detail": detail}
        return paired(name, measured(circuit), control, **{**given, **more})

    with bar:
        detail = on_split.detail()
        rows = []
        for kind, values in _ablations(circuit, means).items():
            measure = partial(on_split.sufficient, ablation=values)
            name = f"sufficiency, {kind} ablation"
            rows.append(row(f"sufficiency.{kind}", name, measure, drawn))
        others = {"better": "higher", "control_name": OTHERS}
        rows.append(row("necessity", "necessity", on_split.necessary, apart, **others))
        rows.append(row("fidelity", "KL(full || circuit)", on_split.fidelity, drawn))
    rows += _sizes(model, circuit, drawn, nonsense)
    return rows + _twins(model, circuit, nonsense, equal_size, tokenizer, batch, seed)


def _twins(
    model: SparseGPT,
    circuit: Circuit,
    nonsense: Circuit | None,
    equal_size: Circuit | None,
    tokenizer: Any,
    batch: TaskBatch,
    seed: int,
) -> list[Score]:
    """Return the scores of the circuit's loss beside that of its nonsense twin's circuits.

    It is one row where `nonsense` and `equal_size` have the same number of nodes.
    """
    twins: dict[str, Circuit] = {}
    if equal_size is not None:
        twins["nonsense.equal_size"] = equal_size
    if nonsense is not None and (equal_size is None or len(nonsense) != len(equal_size)):
        twins["nonsense.found_size"] = nonsense
    return [_nonsense(model, circuit, t, tokenizer, batch, seed, k) for k, t in twins.items()]


def nonsense_at_size(
    model: SparseGPT, circuit: Circuit, tokenizer: Any, nonsense: Circuit | None = None
) -> Circuit:
    """Return the nonsense twin's circuit of this circuit's size.

    Its nodes are the first of the ranking that learning the masks on the nonsense task gives, with
    the settings with which this circuit was found. They are as many as this circuit had before its
    clean-up, so the twin never has fewer nodes than the circuit. `nonsense` is what `prune` found
    for the twin, in either direction; if it was found with the same settings its ranking is used.
    Otherwise one is learned here, in the direction that the model likes better (`easier_nonsense`).
    """
    config = _config(circuit)
    k = max(len(circuit), circuit.config.get("k_before_clean_up", 0))
    if nonsense is not None and nonsense.ranking and is_nonsense_of(circuit.task, nonsense.task):
        same = nonsense.model_fingerprint == circuit.model_fingerprint
        if same and _config(nonsense) == config:
            return nonsense.resized(k)
    twin = easier_nonsense(circuit.task, model, tokenizer)
    batch = twin.batch(tokenizer, "train", positions_of(model))
    batch = batch.to(next(model.parameters()).device)
    everything = nodes_of(circuit.ablation)
    tau = learn(model.eval(), batch, config, circuit.ablation)
    best = tau.argsort(descending=True, stable=True)[:k].tolist()
    return replace(circuit.with_nodes([everything[i] for i in best], "nonsense"), task=twin)


def _config(circuit: Circuit) -> PruneConfig:
    known = PruneConfig.__dataclass_fields__
    return PruneConfig.from_dict({k: v for k, v in circuit.config.items() if k in known})


def _ablations(circuit: Circuit, means: Masks | None) -> dict[str, Masks]:
    """Return the ablation values by kind: the circuit's own, then the other kind's if known."""
    own: dict[str, Masks] = {circuit.ablation_kind: circuit.ablation}
    if circuit.ablation_kind == "mean":
        return own | {"zero": {at: torch.zeros_like(x) for at, x in circuit.ablation.items()}}
    if means is None and circuit.source is not None:
        means = load_means(circuit.source.folder, circuit.model_fingerprint)
    return own if means is None else own | {"mean": means}


def _sizes(
    model: SparseGPT, circuit: Circuit, drawn: list[Circuit], nonsense: Circuit | None
) -> list[Score]:
    """Return the scores of the circuit's two sizes, its numbers of nodes and of edges.

    The control of the nodes is the nonsense twin's circuit, or the whole model where there is none;
    that of the edges is random circuits.
    """
    whole = {"of the whole model": circuit.n_total}
    if nonsense is None:
        draws, name = (circuit.n_total,), "the whole model"
    else:
        draws, name = (len(nonsense),), "the nonsense twin"
    nodes = counted(
        "nodes",
        len(circuit),
        draws,
        key="circuit.nodes",
        unit="nodes",
        control_name=name,
        better="lower",
        detail=whole,
    )
    edges = counted(
        "edges among its nodes",
        len(circuit.edges(model)),
        tuple(len(c.edges(model)) for c in drawn),
        key="circuit.edges",
        unit="edges",
        control_name=RANDOM,
        better="higher",
        detail={"meaning": "more edges than chance: its nodes are wired to each other"},
    )
    return [nodes, edges]


def _nonsense(
    model: SparseGPT,
    circuit: Circuit,
    twin: Circuit,
    tokenizer: Any,
    batch: TaskBatch,
    seed: int,
    key: str,
) -> Score:
    """Return the score of the circuit's loss beside the nonsense twin's on the nonsense task.

    Only pairs that the tokenizer leaves in both tasks are used, so that the contexts are the same.
    """
    twin.check(model)
    other = twin.task.batch(tokenizer, batch.split, positions_of(model)).to(batch.ids.device)
    place = {key: i for i, key in enumerate(_keys(other))}
    both = [(i, place[key]) for i, key in enumerate(_keys(batch)) if key in place]
    if len(both) < 2:
        raise ValueError(
            f"evaluate_circuit: {circuit.task.name} and {twin.task.name} share {len(both)} pairs "
            f"of the {batch.split} split; pass the circuit of this task's own nonsense twin"
        )
    mine, theirs = torch.tensor(both, device=batch.ids.device).T
    losses = []
    for c, b, rows in ((circuit, batch, mine), (twin, other, theirs)):
        scored = circuit_logits(model, b, c.masks(), c.ablation)
        losses.append(per_pair(task_nats(scored, b))[rows])
    full = task_nats(last_logits(model, other), other)
    return paired(
        f"nonsense twin ({len(twin)} nodes, the circuit {len(circuit)})",
        losses[0],
        losses[1][None],
        key=f"circuit.{key}",
        unit="nats",
        control_name=f"the nonsense twin's circuit of {len(twin)} nodes",
        better="lower",
        detail={"full model on the nonsense task": float(full.mean())},
        seed=seed,
    )


def _keys(batch: TaskBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the tokens of the two contexts of every pair."""
    tokens = [
        tuple(ids[: last + 1])
        for ids, last in zip(batch.ids.tolist(), batch.last.tolist(), strict=True)
    ]
    n = batch.n_pairs
    return list(zip(tokens[:n], tokens[n:], strict=True))
