"""What is done to which nodes of the sparse model, and what that adds to the dense stream.

Delta transport, valid for every node and for whole circuits (docs/method.md#delta-transport): run
the sparse model clean and intervened, and add the decoded difference of its residual streams,

    dz_t = z'_t - z_t                                 at every sparse site t
    h_s <- h_s + strength * sigma_s D_s dz_t          at one dense site s, bridged to t

`Ablation` and `Steering` are the two values that say what z' is. The decoder's bias and its
reconstruction error cancel, so strength 0 is the untouched dense model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bridges.maps.bridge import BridgeSet
from bridges.run_folder import run_folder
from dense import DenseModel, Edit, LiveEdit
from dense.edit import check_amount, check_site
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.circuits.means import load_means
from sparse.model.gpt import SparseGPT

from . import stream_change
from .directions import read_edits

Nodes = Iterable[Node] | None
"""Which nodes; None: those of the circuit."""
Ids = Int[Tensor, "batch pos"]
Mask = Shaped[Tensor, "batch pos"] | None
Strength = float | Tensor
Delta = Float[Tensor, "batch pos d_dense"]


@runtime_checkable
class Mapped(Protocol):
    """What an intervention is computed from: a circuit, its model, the bridges, the dense model."""

    @property
    def circuit(self) -> Circuit: ...

    @property
    def sparse(self) -> SparseGPT: ...

    @property
    def bridges(self) -> BridgeSet: ...

    @property
    def dense(self) -> DenseModel: ...


def bridged(bridges: BridgeSet, site: int | None) -> int:
    """Return `site`; raise ValueError unless it is a dense site with a bridge."""
    if site is None:
        raise ValueError("no site was chosen; pass site=, or call choose_site() first")
    check_site(site)
    bridges.index(site)
    return site


class Intervention(ABC):
    """Something done to nodes of the sparse model; subclasses say what."""

    nodes: Nodes

    @abstractmethod
    def check(self, mapped: Mapped, ids: Ids, attention_mask: Mask = None) -> None:
        """Raise ValueError unless it can be done to these prompts."""

    @abstractmethod
    def changes(
        self, mapped: Mapped, ids: Ids, attention_mask: Mask = None
    ) -> list[stream_change.Change]:
        """Return dz_t at every sparse site t; 0 at padding."""

    def delta(
        self, mapped: Mapped, ids: Ids, site: int | None, attention_mask: Mask = None
    ) -> Delta:
        """Return what it adds to the dense residual at dense `site`, at strength 1."""
        self.check(mapped, ids, attention_mask)
        site = bridged(mapped.bridges, site)
        changes = self.changes(mapped, ids, attention_mask)
        return mapped.bridges.transport(site, changes[mapped.bridges.config.pairs[site]])

    def edits(
        self,
        mapped: Mapped,
        ids: Ids,
        site: int | None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return it as edits of the dense residual at the positions of `ids`."""
        delta, at = self.delta(mapped, ids, site, attention_mask), bridged(mapped.bridges, site)
        check_amount(strength, "strength")
        return [Edit(site=at, direction=delta, amount=strength, prompt_only=True)]

    def chosen(self, mapped: Mapped) -> stream_change.Chosen:
        """Return which nodes it is done to, at the locations that have any."""
        circuit = mapped.circuit
        if self.nodes is not None:
            circuit = circuit.with_nodes(self.nodes, "chosen")
        masks = {at: mask for at, mask in circuit.masks().items() if mask.any()}
        return {at: mask.to(mapped.dense.device) for at, mask in masks.items()}


@dataclass(frozen=True)
class Ablation(Intervention):
    """The nodes are held at one value at every position.

    kind "mean" is the mean over the text the sparse model was trained on, "zero" is 0.
    """

    nodes: Nodes = None
    kind: Literal["mean", "zero"] = "mean"

    def __post_init__(self) -> None:
        if self.kind not in ("mean", "zero"):
            raise ValueError(f"kind={self.kind!r} must be 'mean' or 'zero'")

    def check(self, mapped: Mapped, ids: Ids, attention_mask: Mask = None) -> None:
        """Raise ValueError for prompts that the dense model cannot take."""
        mapped.dense.inputs(ids, attention_mask)

    @torch.no_grad()
    def changes(
        self, mapped: Mapped, ids: Ids, attention_mask: Mask = None
    ) -> list[stream_change.Change]:
        """Return what holding the nodes changes at every sparse site."""
        chosen, values = self.chosen(mapped), self.values(mapped)
        return stream_change.ablated(mapped.sparse, ids, chosen, values, attention_mask)

    def values(self, mapped: Mapped) -> Mapping[str, Tensor]:
        """Return the value of every node when it is held, by location.

        The means are the circuit's own, or those of its run folder where it was found with zero.
        """
        circuit = mapped.circuit
        values: Mapping[str, Tensor] = circuit.ablation
        if self.kind == "zero":
            values = {at: torch.zeros_like(value) for at, value in values.items()}
        elif circuit.ablation_kind != "mean":
            folder = run_folder(circuit, "a circuit with means")
            values = load_means(folder, circuit.model_fingerprint)
        return {at: value.to(mapped.dense.device) for at, value in values.items()}

    def live_edits(
        self, mapped: Mapped, site: int | None, strength: Strength = 1.0
    ) -> list[LiveEdit]:
        """Return edits that do to any tokens what `edits` does to some, anew at every pass."""
        check_amount(strength, "strength")
        chosen, values = self.chosen(mapped), self.values(mapped)
        at = bridged(mapped.bridges, site)
        source = mapped.bridges.config.pairs[at]

        def delta(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            changes = stream_change.ablated(mapped.sparse, ids, chosen, values, attention_mask)
            return mapped.bridges.transport(at, changes[source])

        return [LiveEdit(site=at, compute=delta, amount=strength)]


@dataclass(frozen=True, eq=False)
class Steering(Intervention):
    """The nodes take the values they have in a run on other prompts of the same shape.

    mode "transport" carries the change of the stream to one dense site. Mode "read" is the paper's
    rule for residual read nodes (Gao et al. 2025, Appendix A.4): only the sublayer that reads them
    sees the change, or the dense ones that answer it (docs/method.md#read-nodes).
    """

    other_ids: Ids
    """The counterfactual prompts, one for each presented prompt, padded alike."""
    nodes: Nodes = None
    mode: Literal["transport", "read"] = "transport"

    def __post_init__(self) -> None:
        if self.mode not in ("transport", "read"):
            raise ValueError(f"mode={self.mode!r} must be 'transport' or 'read'")

    def check(self, mapped: Mapped, ids: Ids, attention_mask: Mask = None) -> None:
        """Raise ValueError unless every position has its counterpart, and the model takes both."""
        if ids.shape != self.other_ids.shape:
            raise ValueError(
                f"the counterfactual ids are {tuple(self.other_ids.shape)} and the ids "
                f"{tuple(ids.shape)}; every position needs its counterpart: give equal lengths"
            )
        for given in (ids, self.other_ids):
            mapped.dense.inputs(given, attention_mask)

    @torch.no_grad()
    def changes(
        self, mapped: Mapped, ids: Ids, attention_mask: Mask = None
    ) -> list[stream_change.Change]:
        """Return what replacing the nodes' values changes at every sparse site."""
        chosen = self.chosen(mapped)
        return stream_change.replaced(mapped.sparse, ids, self.other_ids, chosen, attention_mask)

    def edits(
        self,
        mapped: Mapped,
        ids: Ids,
        site: int | None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return it as edits; in mode "read" two for every sublayer read, whatever `site` is."""
        if self.mode == "transport":
            return super().edits(mapped, ids, site, strength, attention_mask)
        self.check(mapped, ids, attention_mask)
        chosen = self.chosen(mapped)
        if wrong := [at for at in chosen if not at.endswith("act_in")]:
            raise ValueError(
                f"mode='read' is for residual read nodes (act_in), got nodes at {wrong}; pass "
                "nodes= with read nodes only, or use mode='transport'"
            )
        changes = stream_change.read(mapped.sparse, ids, self.other_ids, chosen, attention_mask)
        pairs = [read_edits(mapped.bridges, t, dz, strength) for t, dz in changes.items()]
        return [edit for pair in pairs for edit in pair]
