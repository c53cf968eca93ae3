"""Writing a circuit as `viz_data.pt`, the released form; circuit.py reads it.

The format is described in docs/method.md#released-files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import EDGES, THIRDS, Node
from sparse.circuits.mask import masked
from sparse.circuits.taps import recorded
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still

from .circuit import RELEASED, Replay
from .config import write_config
from .files import write_torch


def save_circuit(replay: Replay, model: SparseGPT, path: str | Path) -> None:
    """Write a circuit as `viz_data.pt`: nodes, prompts, edges, and losses as sums over the pair.

    The losses of the circuit and of the whole model are measured now. So are those without a node
    and without a sublayer, unless the circuit came from a released file that holds them. The loss
    changes by edge are never measured: they are copied from such a file, and are 0 without one.
    Activations are those of the circuit. No text samples are written. Raises ValueError for another
    model than the circuit's.

    >>> import os
    >>> import tempfile
    >>> import torch
    >>> from bridges import load_run
    >>> from sparse import release
    >>> run = load_run("tiny")
    >>> circuit = run.circuits()["single_double_quote"].resized(2)
    >>> batch = circuit.task.batch(run.tokenizer, "test").take(torch.arange(2))
    >>> replay = release.Replay(circuit=circuit, batch=batch, stored=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release.save_circuit(replay, run.sparse, f"{folder}/viz_data.pt")
    ...     os.listdir(folder)
    ['viz_data.pt']
    """
    replay.circuit.check(model)
    circuit, tokens = replay.circuit, replay.batch.ids.masked_fill(~replay.batch.real, 0)
    known = circuit.config.get(RELEASED, {})
    kept = {at: list(circuit.nodes.get(at, ())) for at in circuit.ablation}
    per_node = known.get("node_nats") or _node_nats(replay, model)
    per_layer = known.get("layer_nats") or _layer_nats(replay, model)
    with still(model), masked(model, circuit.masks(), circuit.ablation):
        with recorded(model, list(kept)) as seen:
            model.model(replay.batch.ids, use_cache=False)
    activations = {at: {i: seen[at][..., i].clone() for i in kept[at]} for at in kept}
    importances = {
        "ch_interv_losses": {at: [2 * x for x in per_node.get(at, [])] for at in kept},
        "layer_interv_losses": {at: 2 * x for at, x in per_layer.items()},
        "loss": 2 * replay.measure(model, None),
        "interv_loss": 2 * replay.measure(model, circuit),
        "pair_data": _pair_data(circuit, model, known.get("edge_nats")),
        "pair_data_connections": _pair_data(circuit, model, None, weights=True),
        "task_samples": (tokens.cpu(), activations),
        "beeg_model_config": write_config(model.config),
    }
    values = {
        "circuit_data": {at: torch.tensor(ids, dtype=torch.long) for at, ids in kept.items()},
        "samples": {},
        "importances": importances,
        "all_loss": [(i, 2 * x) for i, x in known.get("search", [])],
        "prune_config": known.get("prune_config"),
        "num_total_nodes": circuit.n_total,
    }
    write_torch(path, values)


def _node_nats(replay: Replay, model: SparseGPT) -> dict[str, list[float]]:
    """Return, for every node, the loss of the circuit without it, in nats per prompt."""
    circuit, found = replay.circuit, {}
    for at, indices in circuit.nodes.items():
        without = [circuit.with_nodes(set(circuit) - {Node(at, i)}, "less") for i in indices]
        found[at] = [replay.measure(model, c) for c in without]
    return found


def _layer_nats(replay: Replay, model: SparseGPT) -> dict[str, float]:
    """Return, for every sublayer, the loss of the circuit without its nodes, in nats per prompt."""
    circuit, found = replay.circuit, {}
    for layer in range(model.config.num_hidden_layers):
        for sublayer in (f"{layer}.attn", f"{layer}.mlp"):
            rest = [node for node in circuit if not node.location.startswith(f"{sublayer}.")]
            found[sublayer] = replay.measure(model, circuit.with_nodes(rest, "less"))
    return found


def _pair_data(
    circuit: Circuit, model: SparseGPT, nats: list | None, weights: bool = False
) -> list[list[Any]]:
    """Return, for each pair of locations, [matrix, source nodes, target nodes, (names of both)].

    The matrix is (source, target), with a last row "bias" where the model has biases. With
    `weights` it holds them. Otherwise it holds the loss changes `nats`, doubled to sums over the
    pair of prompts, and 0 where there is none.
    """
    changes = {(a, i, b, j): 2 * x for a, i, b, j, x in nats or []}
    found = []
    for layer in range(model.config.num_hidden_layers):
        for source, target, module in EDGES:
            a, b = f"{layer}.{source}", f"{layer}.{target}"
            ins: list[Any] = [*circuit.nodes.get(a, ())]
            outs = [*circuit.nodes.get(b, ())]
            at = f"{layer}.{module}"
            w = model.model.blocks.get_parameter(f"{at}.weight").detach().cpu()
            bias = None
            if model.config.linear_bias:
                bias = model.model.blocks.get_parameter(f"{at}.bias").detach().cpu()
            if target in THIRDS:
                w = w.chunk(3)[THIRDS.index(target)]
                bias = None if bias is None else bias.chunk(3)[THIRDS.index(target)]
            matrix = w.T[ins][:, outs]
            if bias is not None:
                matrix = torch.cat([matrix, bias[outs][None]])
                ins.append("bias")
            if not weights:
                rows = [[changes.get((a, i, b, j), 0.0) for j in outs] for i in ins]
                matrix = torch.tensor(rows).reshape(len(ins), len(outs))
            found.append([matrix, ins, outs, (a, b)])
    return found
