"""Pruning: find the few nodes of a SparseGPT that do a task when all others are held still.

    x <- m x + (1 - m) mu                       at every node location, after AbsTopK
    m = 1[tau >= 0],  dm/dtau := sigmoid'(tau / theta) / theta
    loss = task nats + k_coef sum m             AdamW on tau, then rank by tau and search the size

mask.py explains the letters, learn.py learns tau, and search.py finds the size. The train split
decides tau and the calibration, the validation split decides the size (the train split does where
there is no other), and the test split is only reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node, nodes_of
from sparse.circuits.mask import Values, by_location
from sparse.circuits.means import ablation_values
from sparse.circuits.score import circuit_logits
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch, check_vocabulary, logit_difference, task_nats
from sparse.tasks.score import DOES, positions_of, score_batch, tokenizer_of
from sparse.tasks.task import Task

from .calibration import calibrate, calibrated_nats
from .config import PruneConfig
from .learn import learn
from .search import clean, smallest


def prune(
    model: SparseGPT,
    task: Task,
    config: PruneConfig = PruneConfig(),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    means: Values | None = None,
    force: bool = False,
) -> Circuit:
    """Return the smallest circuit found whose validation loss is at most (1 - margin) target_loss.

    The whole model must do the task: at most 0.3 nats (`sparse.tasks.score.DOES`) on the validation
    split, or on train where there is no other. A circuit of a model that does not do the task would
    explain nothing, so this is a ValueError, unless `force`; nonsense twins need it.

    The tokenizer and the node means come from the model's own folder unless they are given. Where
    no size that was tried reaches this goal, the one of least validation loss is returned; if that
    misses target_loss too, `met` is False and a note says so.

    >>> from bridges import load_run
    >>> from sparse import PruneConfig, get_task, prune
    >>> run = load_run("tiny")
    >>> hasty = PruneConfig(n_steps=2, clean_up=0.0, window=0)  # 600 steps find 68 nodes
    >>> circuit = prune(run.sparse, get_task("single_double_quote"), hasty)
    >>> circuit.met, len(circuit) < circuit.n_total
    (True, True)
    """
    tokenizer = tokenizer or tokenizer_of(model, "prune")
    check_vocabulary(tokenizer, model.config.vocab_size)
    empty = Circuit(
        task=task,
        nodes={},
        ablation=ablation_values(model, config.ablation, means, "prune"),
        ablation_kind=config.ablation,
        model_fingerprint=model.fingerprint(),
        d_head=model.config.head_dim,
        target_loss=config.target_loss,
        source=model.source,
    )
    device = next(model.parameters()).device
    of_splits = task.batches(tokenizer, positions_of(model))
    batches = {split: batch.to(device) for split, batch in of_splits.items()}
    if not force:
        _check_does(model, batches.get("validation", batches["train"]))
    with still(model), csr_products(model):
        tau = learn(model, batches["train"], config, empty.ablation)
        with torch.no_grad():
            nodes, search = _choose(model, empty, tau, batches, config)
            circuit = empty.with_nodes(nodes, "prune")
            loss, calibration = _measure(model, circuit, batches)
    circuit = replace(
        circuit,
        loss=loss,
        ranking=by_location(tau, empty.ablation),
        calibration=calibration,
        config={**asdict(config), **search},
    )
    return replace(circuit, notes=_notes(circuit))


def _check_does(model: SparseGPT, batch: TaskBatch) -> None:
    """Raise ValueError unless the whole model does the task."""
    score = score_batch(model, batch)
    if not score.does:
        raise ValueError(
            f"prune: the model does not do {batch.task}: {score.nats:.3f} nats on {batch.split}, "
            f"where doing it is at most {DOES} and chance {score.chance:.3f}; train it longer, "
            "choose a task that it does (sparse.task_table), or pass force=True (--force) to prune "
            "anyway"
        )


def _choose(
    model: SparseGPT,
    empty: Circuit,
    tau: Float[Tensor, " n"],
    batches: Mapping[str, TaskBatch],
    config: PruneConfig,
) -> tuple[list[Node], dict[str, Any]]:
    """Rank the nodes by tau, search the size and clean up.

    Returns the nodes, and what the search measured for `Circuit.config`.
    """
    chooser = batches.get("validation", batches["train"])
    everything = nodes_of(empty.ablation)
    place = {node: i for i, node in enumerate(everything)}
    ranked = [everything[i] for i in tau.argsort(descending=True, stable=True).tolist()]

    def nats(nodes: Sequence[Node]) -> float:
        keep = torch.zeros(len(everything), dtype=torch.bool)
        keep[[place[node] for node in nodes]] = True
        logits = circuit_logits(model, chooser, by_location(keep, empty.ablation), empty.ablation)
        return task_nats(logits, chooser).mean().item()

    goal = config.target_loss * (1 - config.margin)
    k, curve = smallest(lambda k: nats(ranked[:k]), len(ranked), goal, config.window)
    nodes = ranked[:k]
    if config.clean_up and curve[k] <= goal:
        limit = min(goal, curve[k] + config.clean_up)
        silent = _silent(empty.with_nodes(nodes, "trial"), model)
        nodes = clean(nodes, nats, limit, silent, config.n_trials)
    return nodes, {"k_before_clean_up": k, "curve": sorted(curve.items())}


def _silent(circuit: Circuit, model: SparseGPT) -> set[Node]:
    """Return the nodes of the circuit that nothing in it reads.

    They are at locations where only an edge leads further, and no edge starts at them.
    """
    sources = {edge.source for edge in circuit.edges(model)}
    carried = ("attn.act_in", "attn.v", "mlp.act_in", "mlp.post_act")
    return {n for n in circuit if n.location.partition(".")[2] in carried} - sources


def _measure(
    model: SparseGPT, circuit: Circuit, batches: Mapping[str, TaskBatch]
) -> tuple[dict[str, float], tuple[float, float]]:
    """Return the losses of the circuit and its references on every split, and the calibration.

    The references are the whole model, the model with no node kept, and the circuit's complement.
    """
    kept = circuit.masks()
    cases = {
        "full": {at: torch.ones_like(m) for at, m in kept.items()},
        "circuit": kept,
        "empty": {at: torch.zeros_like(m) for at, m in kept.items()},
        "complement": {at: ~m for at, m in kept.items()},
    }
    loss: dict[str, float] = {}
    delta: dict[str, Tensor] = {}
    for split, batch in batches.items():
        for what, keep in cases.items():
            logits = circuit_logits(model, batch, keep, circuit.ablation)
            loss[f"{what}/{split}"] = task_nats(logits, batch).mean().item()
            if what == "circuit":
                difference = logit_difference(logits, batch)
                delta[split] = torch.cat(
                    [difference[: batch.n_pairs], -difference[batch.n_pairs :]]
                )
    alpha, beta = calibrate(delta["train"])
    for split, d in delta.items():
        loss[f"calibrated/{split}"] = calibrated_nats(d, alpha, beta).mean().item()
    return loss, (alpha, beta)


def _notes(circuit: Circuit) -> tuple[str, ...]:
    notes = []
    split = "validation" if "circuit/validation" in circuit.loss else "train"
    target, full = circuit.target_loss, circuit.loss[f"full/{split}"]
    if split == "train":
        notes.append("no validation split: the size was chosen on train")
    if not circuit.met:
        notes.append(f"target of {target} nats NOT met: the size of least {split} loss was taken")
    if full > target:
        notes.append(f"the full model itself is at {full:.3f} {split} nats, above {target}")
    return tuple(notes)
