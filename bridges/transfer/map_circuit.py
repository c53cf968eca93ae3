"""Carrying a circuit over to the dense model that its sparse model is bridged to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridges.maps.bridge import BridgeSet
from bridges.run_folder import check_prefix, run_folder
from dense import as_dense, config_of
from sparse.circuits.circuit import Circuit
from sparse.model.gpt import SparseGPT

from .dense_circuit import DenseCircuit


def map_circuit(
    sparse_circuit: Circuit,
    dense_model: Any,
    bridges: BridgeSet | None = None,
    *,
    sparse_model: SparseGPT | None = None,
) -> DenseCircuit:
    """Return a circuit of the sparse model as a circuit of the dense model.

    The result intervenes on the dense model as the circuit's nodes would. `dense_model` is a
    DenseModel, a PreTrainedModel, an nnsight model or a name. Bridges and sparse model default to
    those of the run in which the circuit was found. The site of the interventions is chosen on the
    task's validation split (`DenseCircuit.choose_site`). Raises ValueError where the fingerprints
    show that circuit, bridges and models do not belong together, and where the dense model's
    tokenizer puts other special tokens before a text than that run was trained with.

    >>> from bridges import load_run, map_circuit
    >>> run = load_run("tiny")
    >>> map_circuit(run.circuits()["single_double_quote"], run.dense)
    DenseCircuit('single_double_quote', 71 nodes, in tiny at site 1 of 0..4)
    """
    if sparse_model is None:
        opened: SparseGPT = SparseGPT.from_pretrained(run_folder(sparse_circuit, "sparse_model="))
        sparse_model = opened.requires_grad_(False)
    if bridges is None:
        bridges = BridgeSet.load(_bridges_folder(sparse_circuit)).requires_grad_(False)
    sparse_circuit.check(sparse_model)
    bridges.check_dense_config(config_of(dense_model), sparse_model)
    dense = as_dense(dense_model)
    if sparse_circuit.source is not None:
        check_prefix(Path(sparse_circuit.source.folder).parent, dense)
    bridges.check(dense, sparse_model)
    sparse_model.to(dense.device)  # pyright: ignore
    bridges.to(dense.device)
    mapped = DenseCircuit(
        circuit=sparse_circuit, sparse=sparse_model, bridges=bridges, dense=dense, site=None
    )
    return mapped.choose_site()


def _bridges_folder(circuit: Circuit) -> Path:
    folder = run_folder(circuit, "bridges=").resolve().parent / "bridges"
    if not folder.is_dir():
        raise ValueError(
            f"no bridges beside the sparse model: {folder} is missing; pass bridges=, or restore it"
        )
    return folder
