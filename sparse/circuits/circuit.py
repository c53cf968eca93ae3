"""Circuits: the few nodes of a SparseGPT that a task needs, and the losses that say how well.

node    one entry of the vector at a node location       0.mlp.post_act 17
edge    a nonzero weight between two kept nodes          docs/method.md#edges: six pairs per layer
file    circuit.json, and circuit.safetensors with the values that replace the other nodes

graph.py defines nodes and edges, pruning/ finds circuits, extract/ runs them fast, and view/ draws
them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparse.model.config import FINAL, LOCATIONS
from sparse.model.gpt import SparseGPT
from sparse.storage.atomic import replace_files
from sparse.storage.hub import Source
from sparse.storage.records import checked
from sparse.tasks.task import Task

from .graph import THIRDS, Edge, Node, Nodes, edges_of, nodes_of

SCHEMA_VERSION = 1
RANKING = "ranking."  # prefix of a location's ranking in circuit.safetensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """The kept nodes of a model, the values that hold all others, and the losses measured so.

    It behaves like a set of nodes: len, in, iteration in forward order, and &, | and - with another
    circuit of the same model.
    """

    task: Task
    nodes: Nodes
    """The kept nodes: location to their sorted indices."""
    ablation: dict[str, Float[Tensor, " _"]]
    """Location to the values at which its nodes are held when they are not kept. It has every node
    location of the model, in forward order."""
    ablation_kind: Literal["mean", "zero"]
    """What `ablation` holds. "mean": each node's mean over the text the model was trained on.
    "zero": zeros."""
    model_fingerprint: str
    """`SparseGPT.fingerprint()` of the model the nodes belong to."""
    d_head: int
    """Width of one attention head: it turns a q, k or v index into head and channel."""
    target_loss: float
    """The loss that `prune` was asked to meet on the validation split, in nats per prompt."""
    loss: dict[str, float] = field(default_factory=dict)
    """Task loss in nats per prompt under `what/split`, for example `circuit/test`, `full/train`."""
    ranking: dict[str, Float[Tensor, " _"]] = field(default_factory=dict)
    """Location to the tau of its nodes, by which `prune` ranked all nodes of the model; empty where
    it is not known."""
    calibration: tuple[float, float] | None = None
    """(alpha, beta) of delta' = alpha delta + beta, where delta is the logit difference of the two
    targets; fitted on the train split (pruning/calibration.py)."""
    source: Source | None = None
    """The folder of the model, which also holds its bridges."""
    config: dict[str, Any] = field(default_factory=dict)
    """How it was found: the fields of `PruneConfig`, or what it was derived from."""
    notes: tuple[str, ...] = ()
    """Warnings for a reader, such as a target that was not met."""

    def __post_init__(self) -> None:
        if self.ablation_kind not in ("mean", "zero"):
            raise ValueError(f"Circuit.ablation_kind={self.ablation_kind!r} must be mean or zero")
        for location, value in self.ablation.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"Circuit.ablation holds NaN or infinity at {location}; measure the means again"
                )
        for location, indices in self.nodes.items():
            if location not in self.ablation:
                raise ValueError(
                    f"Circuit: no node location {location!r}; it has {list(self.ablation)}"
                )
            width = len(self.ablation[location])
            if list(indices) != sorted(set(indices)):
                raise ValueError(f"Circuit: the nodes of {location} must be sorted and distinct")
            if indices and not 0 <= indices[0] <= indices[-1] < width:
                raise ValueError(
                    f"Circuit: {location} has nodes 0..{width - 1}, got {indices[0]}..{indices[-1]}"
                )

        sizes = [
            {at: len(x) for at, x in values.items()} for values in (self.ranking, self.ablation)
        ]
        if self.ranking and sizes[0] != sizes[1]:
            raise ValueError("Circuit.ranking must rank every node that Circuit.ablation names")

    @property
    def met(self) -> bool:
        """Whether the loss is within the target on the split that chose the size.

        That is the validation split, or train for a task without one.
        """
        chosen = self.loss.get("circuit/validation", self.loss.get("circuit/train", float("inf")))
        return chosen <= self.target_loss

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.nodes.values())

    def __iter__(self) -> Iterator[Node]:
        return (Node(at, i) for at in self.ablation for i in self.nodes.get(at, ()))

    def __contains__(self, node: object) -> bool:
        return isinstance(node, tuple) and node[1] in self.nodes.get(node[0], ())

    def __and__(self, other: Circuit) -> Circuit:
        self._like(other)
        return self.with_nodes((n for n in self if n in other), "intersection")

    def __or__(self, other: Circuit) -> Circuit:
        self._like(other)
        return self.with_nodes([*self, *other], "union")

    def __sub__(self, other: Circuit) -> Circuit:
        self._like(other)
        return self.with_nodes((n for n in self if n not in other), "difference")

    def __repr__(self) -> str:
        return (
            f"Circuit({self.task.name!r}, {len(self)} of {self.n_total} nodes, target "
            f"{self.target_loss:g} nats {'met' if self.met else 'not met'})"
        )

    def __str__(self) -> str:
        splits: dict[str, list[str]] = {}
        for what, nats in self.loss.items():
            which, _, split = what.partition("/")
            splits.setdefault(split, []).append(f"{which} {nats:.3f}")
        lines = [
            f"circuit for {self.task.name}: {len(self)} of {self.n_total} nodes, target of "
            f"{self.target_loss} nats {'met' if self.met else 'NOT met'}",
            *(f"  {split}, nats: {', '.join(shown)}" for split, shown in splits.items()),
            *self.notes,
        ]
        return "\n".join(lines)

    @property
    def n_total(self) -> int:
        """Number of nodes of the whole model."""
        return sum(len(value) for value in self.ablation.values())

    def name(self, node: Node) -> str:
        """Return a node's name, such as `0.attn.v.head3.ch5` or `0.mlp.post_act.17`."""
        location, i = node
        if location.partition(".")[2] in THIRDS:
            return f"{location}.head{i // self.d_head}.ch{i % self.d_head}"
        return f"{location}.{i}"

    def masks(self) -> dict[str, Bool[Tensor, " _"]]:
        """Return, for every location, which of its nodes are kept."""
        masks = {at: torch.zeros(len(v), dtype=torch.bool) for at, v in self.ablation.items()}
        for location, indices in self.nodes.items():
            masks[location][list(indices)] = True
        return masks

    def with_nodes(self, nodes: Iterable[Node], how: str) -> Circuit:
        """Return a circuit of other nodes of the same model, without losses: none are measured.

        `how` says in its config what it is. Raises ValueError for what is not a node.
        """
        found: dict[str, list[int]] = {}
        nodes = set(nodes)
        for node in nodes:
            if not isinstance(node, tuple) or len(node) != 2 or not hasattr(node[1], "__index__"):
                raise ValueError(
                    f"Circuit: {node!r} is no node; give each as a pair of location and index, "
                    "such as ('0.mlp.post_act', 17)"
                )
        for location, i in sorted(nodes):
            found.setdefault(location, []).append(i)
        kept = {at: tuple(indices) for at, indices in found.items()}
        origin = {"derived": how, "from": self.config}
        unknown = {"loss": {}, "ranking": {}, "calibration": None, "notes": ()}
        return replace(self, nodes=kept, config=origin, **unknown)

    def resized(self, n: int) -> Circuit:
        """Return the circuit of the first `n` nodes of the ranking, without training anew.

        Of nodes with equal tau the earlier one comes first, as in `prune`. The clean-up of `prune`
        is not repeated. Raises ValueError where the ranking is not known.
        """
        if not self.ranking or not 0 <= n <= self.n_total:
            known = f"0..{self.n_total}" if self.ranking else "none, since its ranking is not known"
            raise ValueError(f"Circuit.resized: n={n}, but the sizes it can have are {known}")
        everything = nodes_of(self.ablation)
        tau = torch.cat([self.ranking[at] for at in self.ablation])
        best = tau.argsort(descending=True, stable=True)[:n].tolist()
        circuit = self.with_nodes((everything[i] for i in best), f"the first {n} of the ranking")
        return replace(circuit, ranking=self.ranking)

    def random(self, model: SparseGPT, seed: int, outside: bool = False) -> Circuit:
        """Return the control of this circuit: random nodes, equally many at each location.

        They are drawn from all nodes of the location. With `outside`, they are drawn from the nodes
        that are not in this circuit, and from its own only where those are too few.
        """
        widths = model.node_widths()
        if FINAL in self.ablation:
            widths[FINAL] = model.d_resid
        if widths != {at: len(value) for at, value in self.ablation.items()}:
            raise ValueError("Circuit.random: the model has other node locations than this circuit")
        rng = torch.Generator().manual_seed(seed)
        nodes: list[Node] = []
        for location, width in widths.items():
            own = set(self.nodes.get(location, ()))
            order = torch.randperm(width, generator=rng).tolist()
            if outside:
                order.sort(key=own.__contains__)
            nodes += [Node(location, i) for i in order[: len(own)]]
        return self.with_nodes(nodes, f"random nodes, seed {seed}, outside={outside}")

    def edges(self, model: SparseGPT) -> list[Edge]:
        """Return the nonzero weights whose two ends are kept, in forward order.

        Six pairs of locations per layer: act_in to q, k and v, v to resid_delta, and in the MLP
        act_in to post_act to resid_delta. Biases, the pairing of q with k, residual links, and the
        embeddings are not edges (docs/method.md#edges).
        """
        return edges_of(model, self.nodes)

    def made_as(self, task: Task, model_fingerprint: str, settings: Mapping[str, Any]) -> bool:
        """Return whether it is of this task and this model, and was pruned with these settings.

        `settings` are the fields of a `PruneConfig` (`dataclasses.asdict`).
        """
        same = self.task == task and self.model_fingerprint == model_fingerprint
        return same and settings.items() <= self.config.items()

    def check(self, model: SparseGPT) -> None:
        """Raise ValueError unless `model` is the one this circuit was found in (by fingerprint)."""
        if (found := model.fingerprint()) != self.model_fingerprint:
            where = f" (it was found in {self.source.folder})" if self.source else ""
            raise ValueError(
                f"this model has fingerprint {found}, but the circuit belongs to "
                f"{self.model_fingerprint}{where}; load that model, or prune this one"
            )

    def __getattr__(self, name: str) -> Any:
        if name == "compile":
            raise AttributeError(
                "Circuit has no attribute 'compile'; it is now sparse.extract(circuit, model, mode)"
            )
        return object.__getattribute__(self, name)  # raises as if this method were not here

    def _like(self, other: Circuit) -> None:
        if self.model_fingerprint != other.model_fingerprint:
            raise ValueError(
                f"circuits of two models ({self.model_fingerprint} and {other.model_fingerprint}) "
                "have no nodes in common; combine circuits of one model"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the circuit as plain values, without the tensors (`ablation` and `ranking`)."""
        source = self.source and {
            "folder": self.source.folder,
            "fingerprint": self.source.fingerprint,
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "n_nodes": len(self),
            "n_total": self.n_total,
            "met": self.met,
            "target_loss": self.target_loss,
            "loss": self.loss,
            "calibration": self.calibration and list(self.calibration),
            "notes": list(self.notes),
            "ablation_kind": self.ablation_kind,
            "model_fingerprint": self.model_fingerprint,
            "d_head": self.d_head,
            "source": source,
            "config": self.config,
            "nodes": {location: list(indices) for location, indices in self.nodes.items()},
            "task": self.task.to_dict(),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, folder: str | Path) -> None:
        """Write circuit.json and circuit.safetensors into `folder`.

        Each file is replaced whole. A save that is killed between the two leaves files of two
        saves, which `load` refuses. The source folder is stored relative to `folder`, so that a run
        can be moved as a whole.
        """
        folder = Path(folder)
        values = self.to_dict()
        if self.source and Path(self.source.folder).is_dir():
            relative = os.path.relpath(Path(self.source.folder).resolve(), folder.resolve())
            values["source"]["folder"] = Path(relative).as_posix()
        ranking = {f"{RANKING}{at}": tau for at, tau in self.ranking.items()}
        tensors = {at: value.contiguous() for at, value in (self.ablation | ranking).items()}
        tensors = save(tensors)
        values["ablation_sha256"] = hashlib.sha256(tensors).hexdigest()
        text = json.dumps(values, indent=1).encode()
        replace_files(folder, {"circuit.safetensors": tensors, "circuit.json": text})

    @classmethod
    def load(cls, folder: str | Path) -> Circuit:
        """Return the circuit that `save` wrote.

        Raises ValueError where a file is missing or broken, or where the two are not of one save.
        """
        folder = Path(folder)
        for name in ("circuit.json", "circuit.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"no circuit in {folder}: {name} is missing; prune, then save")
        try:
            values = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
            tensors = (folder / "circuit.safetensors").read_bytes()
            digest = values.pop("ablation_sha256", None)
            ablation = load(tensors)
        except (ValueError, AttributeError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"the circuit in {folder} is broken ({error}); save it anew"
            ) from error
        if (version := values.pop("schema_version", None)) != SCHEMA_VERSION:
            raise ValueError(
                f"the circuit in {folder} has schema version {version}, this library reads "
                f"{SCHEMA_VERSION}; update the library or prune anew"
            )
        if hashlib.sha256(tensors).hexdigest() != digest:
            raise ValueError(
                f"in {folder}, circuit.json and circuit.safetensors are from two saves "
                "(one was interrupted); save the circuit anew"
            )
        return _from_values(cls, values, ablation, folder)


def _from_values(cls, values: dict[str, Any], ablation: dict[str, Tensor], folder: Path) -> Circuit:
    for derived in ("n_nodes", "n_total", "met"):
        values.pop(derived, None)
    where, elsewhere = f"{folder}/circuit.json", ("ablation", "ranking")  # in the other file
    values = checked(cls, values, where, complete=True, besides=elsewhere)
    if source := values["source"]:
        inside = Path(os.path.normpath(folder / source["folder"]))
        at = str(inside) if inside.is_dir() else source["folder"]
        values["source"] = Source(at, source["fingerprint"])
    values["task"] = Task.from_dict(values["task"])
    values["nodes"] = {at: tuple(indices) for at, indices in values["nodes"].items()}
    values["calibration"] = values["calibration"] and tuple(values["calibration"])
    values["notes"] = tuple(values["notes"])
    order = sorted((at for at in ablation if not at.startswith(RANKING)), key=_depth)
    ranking = {at: ablation[RANKING + at] for at in order if RANKING + at in ablation}
    return cls(ablation={at: ablation[at] for at in order}, ranking=ranking, **values)


def _depth(location: str) -> tuple[bool, int, int]:
    layer, _, rest = location.partition(".")
    return (True, 0, 0) if location == FINAL else (False, int(layer), LOCATIONS.index(rest))
