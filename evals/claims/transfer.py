"""Test a circuit in the dense model: does it carry the variable, and does the model need it.

The two claims are in carries.py and needed.py; portrait.py draws them and adds rows of facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.transfer.dense_circuit import DenseCircuit
from evals.scores.pictures import Pictures
from evals.scores.verdict import Claim
from evals.trials.arms import Splits
from evals.trials.matched import NONSENSE
from evals.trials.nonsense import nonsense_of
from evals.trials.prompts import check_numbers, splits, unrelated_splits, unrelated_trial
from sparse.circuits.circuit import Circuit
from sparse.tasks.task import Task

from . import portrait
from .carries import Carrying, carrying, without_sources
from .claims import Trials, trials_of
from .evaluation import Evaluation
from .needed import needed


@torch.no_grad()
def evaluate_transfer(
    dense_circuit: Any,
    task: Task | None = None,
    tokenizer: Any = None,
    *,
    nonsense: Circuit | None = None,
    namesakes: Mapping[str, Circuit] | None = None,
    others: Sequence[Task] | Trials = (),
    heldout: Int[Tensor, "block pos"] | None = None,
    draws: int = 39,
    max_pairs: int = 64,
    facts: bool = True,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Return the claims "carries" and "needed" of a mapped circuit, in its dense model.

    - `dense_circuit` is what `map_circuit` returned. Sites are chosen here, on validation, for the
      circuit and for everything that it is compared with.
    - `task` is another task to ask the circuit for, by default its own.
    - `nonsense` and `namesakes` are as in `evaluate_circuit`.
    - `others` are tasks of other families that the dense model does. The claim "needed" asks that
      they are harmed less; without any, it says nothing of what else the circuit is needed for.
    - `heldout` are blocks of text on which the cost of the ablation is shown.
    - `facts` adds pictures and rows.

    >>> from bridges import load_run, map_circuit
    >>> from evals import evaluate_transfer
    >>> run = load_run("tiny")
    >>> found = run.circuits()
    >>> mapped = map_circuit(found["else_elif"], run.dense)
    >>> options = dict(nonsense=found["else_elif:nonsense"], draws=19, max_pairs=8, facts=False)
    >>> print(evaluate_transfer(mapped, **options)["carries"].outcome)
    negative
    """
    tokenizer = tokenizer or dense_circuit.tokenizer
    check_numbers("evaluate_transfer", draws, max_pairs)
    dense_circuit.bridges.check(dense_circuit.dense, dense_circuit.sparse)
    for namesake in (namesakes or {}).values():
        namesake.check(dense_circuit.sparse)
    nonsense = nonsense_of(dense_circuit.sparse, dense_circuit.circuit, tokenizer, nonsense)
    circuit: Circuit = dense_circuit.circuit
    circuit = circuit if task is None else replace(circuit, task=task)
    mapped = DenseCircuit(
        circuit=circuit,
        sparse=dense_circuit.sparse,
        bridges=dense_circuit.bridges,
        dense=dense_circuit.dense,
        site=None,
    )
    beside = {**(namesakes or {}), NONSENSE: nonsense}
    if not isinstance(others, Trials):
        others = trials_of(mapped, others, tokenizer, max_pairs, seed)
    options: dict[str, Any] = {"draws": draws, "seed": seed, "tick": tick}
    ask = SimpleNamespace(mapped=mapped, tokenizer=tokenizer, max_pairs=max_pairs)
    carried, arms = _carries(ask, beside, options)
    own = splits(mapped, circuit.task, tokenizer, max_pairs, seed)
    need = needed(own, circuit, beside, others, heldout=heldout, **options)
    if not facts or arms is None:
        return Evaluation(claims=(carried, need))
    return Evaluation(
        claims=(carried, need),
        rows=tuple(portrait.rows(arms, own, portrait.CURVE_DRAWS, seed)),
        pictures=_pictures(ask, arms, carried, own, seed),
    )


def _pictures(ask: Any, arms: Carrying, carried: Claim, own: Splits, seed: int) -> Pictures:
    circuit, train = arms.circuit, None
    if circuit.task.train:
        train, _ = unrelated_trial(
            ask.mapped, circuit.task, ask.tokenizer, "train", ask.max_pairs, seed
        )
    return Pictures(
        scatters=(portrait.scatter(arms, carried, train, seed),),
        curves=(portrait.curve(arms, seed),),
        examples=portrait.examples(own.test, circuit, ask.tokenizer),
    )


def _carries(
    ask: Any, namesakes: Mapping[str, Circuit], options: Mapping[str, Any]
) -> tuple[Claim, Carrying | None]:
    """Return claim 3, and its arms where there are any."""
    circuit = ask.mapped.circuit
    both, missing = unrelated_splits(
        ask.mapped, circuit.task, ask.tokenizer, ask.max_pairs, options["seed"]
    )
    if both is None:
        return without_sources(circuit.task.name, missing), None
    return carrying(both, circuit, namesakes, unmatched=missing, **options)
