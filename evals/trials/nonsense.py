"""The circuit of the nonsense twin: what the same search finds where there is nothing to find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import nodes_of
from sparse.circuits.mask import by_location
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.learn import learn
from sparse.model.gpt import SparseGPT
from sparse.tasks.nonsense import easier_nonsense, is_nonsense_of
from sparse.tasks.score import positions_of


def nonsense_of(
    model: SparseGPT, circuit: Circuit, tokenizer: Any, found: Circuit | None = None
) -> Circuit:
    """Return a circuit of the nonsense twin of this circuit's task, with a ranking of all nodes.

    `found` is what `prune` found for the twin, in either direction; it is returned if it has a
    ranking and was found with the same settings in the same model. Otherwise the masks are learned
    here with this circuit's settings, in the direction that the model likes better
    (`easier_nonsense`), and the circuit has as many nodes as this one. Raises ValueError where
    `found` is of another task.
    """
    config = _config(circuit)
    if found is not None:
        if not is_nonsense_of(circuit.task, found.task):
            raise ValueError(
                f"the circuit for {found.task.name} is not of the nonsense twin of "
                f"{circuit.task.name}; pass that, or leave it out to have it learned"
            )
        same = found.model_fingerprint == circuit.model_fingerprint
        if same and found.ranking and _config(found) == config:
            return found
    twin = easier_nonsense(circuit.task, model, tokenizer)
    batch = twin.batch(tokenizer, "train", positions_of(model))
    batch = batch.to(next(model.parameters()).device)
    with torch.enable_grad():  # the caller may measure without gradients
        tau = learn(model.eval(), batch, config, circuit.ablation)
    everything = nodes_of(circuit.ablation)
    best = tau.argsort(descending=True, stable=True)[: len(circuit)].tolist()
    nodes = circuit.with_nodes([everything[i] for i in best], "nonsense")
    ranking = by_location(tau.detach().cpu(), circuit.ablation)
    return replace(nodes, task=twin, ranking=ranking)


def _config(circuit: Circuit) -> PruneConfig:
    known = PruneConfig.__dataclass_fields__
    return PruneConfig.from_dict({k: v for k, v in circuit.config.items() if k in known})
