"""Test a circuit in the sparse model: is it sufficient, is it necessary, and what else is so.

The two claims are in twin.py. The rows are facts beside controls, on which no verdict rests:

    sufficiency  task loss when everything outside the circuit is ablated       nats, lower
    necessity    task loss when the circuit alone is ablated                    nats, higher
    nodes, edges its size, beside that of its nonsense twin's circuit and of random circuits

and those of facts.py. Every mean is over pairs; the value of a pair is the mean over its two
contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from evals.scores.paired import counted, paired
from evals.scores.score import Score
from evals.trials.matched import NONSENSE, activity_of, apart
from evals.trials.nonsense import nonsense_of
from evals.trials.prompts import check_numbers, picked
from evals.trials.twin_trial import TwinTrial, measuring
from sparse.circuits.circuit import Circuit
from sparse.model.gpt import SparseGPT
from sparse.tasks.score import positions_of
from sparse.tasks.task import Task

from .evaluation import Evaluation
from .facts import twin_facts
from .twin import necessary, sufficient

RANDOM = "random circuits of equal size"
OTHERS = "random sets of equally many other nodes"
FACT_DRAWS = 10
"""Random circuits beside each fact."""


def evaluate_circuit(
    model: SparseGPT,
    circuit: Circuit,
    tokenizer: Any,
    *,
    nonsense: Circuit | None = None,
    namesakes: Mapping[str, Circuit] | None = None,
    task: Task | None = None,
    blocks: Int[Tensor, "block pos"] | None = None,
    draws: int = 39,
    max_pairs: int = 64,
    facts: bool = True,
    seed: int = 0,
    progress: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Return the claims "sufficient" and "necessary" of a circuit, on the test split of its task.

    - `nonsense` is the circuit that `prune` found for the nonsense twin. Without one that was found
      in the same way, masks for it are learned here, which takes as long as for the circuit.
    - `namesakes` are circuits of tasks of other families, by name.
    - `task` is another task to ask the circuit for, by default its own.
    - `draws` is the number of random circuits, of at most `max_pairs` pairs.
    - `facts` adds the rows of `twin_facts`; `blocks` is text of the run for one of them.

    Raises ValueError for a circuit of another model.

    >>> from bridges import load_run
    >>> from evals import evaluate_circuit
    >>> run = load_run("tiny")
    >>> found = run.circuits()
    >>> circuit, twin = found["else_elif"], found["else_elif:nonsense"]
    >>> options = dict(nonsense=twin, draws=19, max_pairs=16, facts=False)
    >>> evaluation = evaluate_circuit(run.sparse, circuit, run.tokenizer, **options)
    >>> evaluation["sufficient"].outcome, evaluation.rows[0].key
    ('positive', 'circuit.sufficiency')
    """
    check_numbers("evaluate_circuit", draws, max_pairs)
    circuit.check(model)
    for namesake in (namesakes or {}).values():
        namesake.check(model)
    nonsense = nonsense_of(model, circuit, tokenizer, nonsense)
    asked = circuit if task is None else replace(circuit, task=task)
    batch = asked.task.batch(tokenizer, "test", positions_of(model))
    trial = TwinTrial(model, batch.take(picked(batch, max_pairs, seed)), seed)
    beside = {**(namesakes or {}), NONSENSE: nonsense}
    options: dict[str, Any] = {"draws": draws, "seed": seed, "tick": tick}
    claims = (
        sufficient(trial, asked, beside, **options),
        necessary(trial, asked, beside, **options),
    )
    rows = _rows(trial, asked, nonsense, seed)
    if facts:
        rows += twin_facts(
            model,
            asked,
            tokenizer,
            blocks=blocks,
            max_pairs=max_pairs,
            seed=seed,
            progress=progress,
        )
    return Evaluation(claims=claims, rows=tuple(rows))


def _rows(trial: TwinTrial, circuit: Circuit, nonsense: Circuit, seed: int) -> list[Score]:
    """Return losses and sizes of the circuit, beside random circuits."""
    seeds = range(seed, seed + FACT_DRAWS)
    detail = {
        "split": trial.batch.split,
        "pairs": trial.batch.n_pairs,
        "full model": float(trial.full.mean()),
        "target loss": circuit.target_loss,
        "targets": [list(pair) for pair in trial.batch.targets],
        "dropped pairs": trial.batch.dropped,
        "levels": trial.batch.levels(),
    }
    with measuring(trial.model):
        activity = activity_of(trial.model, circuit, trial.batch)
        alone = torch.stack([trial.alone(apart(circuit, i)) for i in seeds])
        without = torch.stack([trial.without(apart(circuit, i, activity)) for i in seeds])
        own, harmed = trial.alone(circuit), trial.without(circuit)
    return [
        paired(
            "sufficiency: all else at its mean",
            own,
            alone,
            key="circuit.sufficiency",
            unit="nats",
            control_name=RANDOM,
            better="lower",
            detail=detail,
            seed=seed,
        ),
        paired(
            "necessity: the circuit at its mean",
            harmed,
            without,
            key="circuit.necessity",
            unit="nats",
            control_name=OTHERS,
            better="higher",
            seed=seed,
        ),
        *_sizes(trial.model, circuit, nonsense, seed),
    ]


def _sizes(model: SparseGPT, circuit: Circuit, nonsense: Circuit, seed: int) -> list[Score]:
    """Return the numbers of nodes and of edges."""
    drawn = [apart(circuit, i) for i in range(seed, seed + FACT_DRAWS)]
    nodes = counted(
        "nodes",
        len(circuit),
        (len(nonsense),),
        key="circuit.nodes",
        unit="nodes",
        control_name="the nonsense twin's circuit",
        better="lower",
        detail={"of the whole model": circuit.n_total},
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
