"""Interventions on nodes of the sparse model, and what they add to the dense stream.

    dz_t = z'_t - z_t                                 at every sparse site t
    h_s <- h_s + strength * sigma_s D_s dz_t          at one dense site s, bridged to t

This is delta transport, which works for every node and for whole circuits
(docs/method.md#delta-transport): the sparse model is run once as it is, which gives z, and once
with the intervention, which gives z'. The difference of the two residual streams is decoded and
added to the dense stream. An intervention is a value that says how z' comes about: an `Ablation` or
a `Steering`. Only differences are decoded, so the decoder's bias and what it fails to reconstruct
cancel, and strength 0 is the untouched dense model. A token that is outlying at s (`BridgeSet`)
keeps its dense residual.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bridges.maps.bridge import BridgeSet, through
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
"""Which nodes an intervention is done to; None means all nodes of the circuit."""
Ids = Int[Tensor, "batch pos"]
Mask = Shaped[Tensor, "batch pos"] | None
Strength = float | Tensor
Delta = Float[Tensor, "batch pos d_dense"]


@runtime_checkable
class Mapped(Protocol):
    """The four things an intervention is computed from; `DenseCircuit` has them."""

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
    """Something done to nodes of the sparse model; subclasses say what.

    `mapped` is the circuit that it is done to, with both models and the bridges. `ids` are the
    prompts and `site` is a dense site.
    """

    nodes: Nodes

    @abstractmethod
    def check(self, mapped: Mapped, ids: Ids, attention_mask: Mask = None) -> None:
        """Raise ValueError unless the intervention can be done to these prompts."""

    @abstractmethod
    def changes(
        self, mapped: Mapped, ids: Ids, attention_mask: Mask = None
    ) -> list[stream_change.Change]:
        """Return dz_t, the change of the sparse stream, at every sparse site t; 0 at padding."""

    def delta(
        self, mapped: Mapped, ids: Ids, site: int | None, attention_mask: Mask = None
    ) -> Delta:
        """Return sigma_s D_s dz_t, what is added to the dense residual at `site` at strength 1.

        It is 0 at outlying tokens; to find them the dense model is run once, where it has any.
        """
        delta, at = self._carried(mapped, ids, site, attention_mask)
        if math.isinf(mapped.bridges.limits()[at]):
            return delta
        ordinary = mapped.bridges.ordinary(at, mapped.dense.residuals(ids, attention_mask)[at])
        return through(delta, ordinary, torch.zeros_like(delta))

    def edits(
        self,
        mapped: Mapped,
        ids: Ids,
        site: int | None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return the intervention as edits of the dense residual at the positions of `ids`."""
        delta, at = self._carried(mapped, ids, site, attention_mask)
        check_amount(strength, "strength")
        limit = mapped.bridges.limits()[at]
        return [Edit(site=at, direction=delta, amount=strength, prompt_only=True, limit=limit)]

    def _carried(
        self, mapped: Mapped, ids: Ids, site: int | None, attention_mask: Mask
    ) -> tuple[Delta, int]:
        """Return the delta at all tokens, outlying ones too, and its dense site."""
        self.check(mapped, ids, attention_mask)
        at = bridged(mapped.bridges, site)
        changes = self.changes(mapped, ids, attention_mask)
        return mapped.bridges.transport(at, changes[mapped.bridges.config.pairs[at]]), at

    def _keep_nodes(self) -> None:
        """Keep the nodes as a tuple: a generator would be used up by the first call."""
        if isinstance(self.nodes, str):
            raise ValueError(
                f"nodes={self.nodes!r} is a text; give nodes, or None for the circuit's"
            )
        if self.nodes is not None:
            object.__setattr__(self, "nodes", tuple(self.nodes))

    def chosen(self, mapped: Mapped) -> stream_change.Chosen:
        """Return the nodes it is done to, as masks by location; empty masks are left out."""
        circuit = mapped.circuit
        if self.nodes is not None:
            circuit = circuit.with_nodes(self.nodes, "chosen")
        masks = {at: mask for at, mask in circuit.masks().items() if mask.any()}
        return {at: mask.to(mapped.dense.device) for at, mask in masks.items()}


@dataclass(frozen=True)
class Ablation(Intervention):
    """Hold nodes at one value, the same at every position.

    `kind` says at which value: "mean" is the node's mean over the text that the sparse model was
    trained on, "zero" is 0.
    """

    nodes: Nodes = None
    kind: Literal["mean", "zero"] = "mean"

    def __post_init__(self) -> None:
        self._keep_nodes()
        if self.kind not in ("mean", "zero"):
            raise ValueError(f"kind={self.kind!r} must be 'mean' or 'zero'")

    def check(self, mapped: Mapped, ids: Ids, attention_mask: Mask = None) -> None:
        """Raise ValueError for prompts that the dense model cannot take."""
        mapped.dense.inputs(ids, attention_mask)

    @torch.no_grad()
    def changes(
        self, mapped: Mapped, ids: Ids, attention_mask: Mask = None
    ) -> list[stream_change.Change]:
        """Return what holding the nodes changes in the sparse stream, at every sparse site."""
        chosen, values = self.chosen(mapped), self.values(mapped)
        return stream_change.ablated(mapped.sparse, ids, chosen, values, attention_mask)

    def values(self, mapped: Mapped) -> Mapping[str, Tensor]:
        """Return the value at which each node is held, by location.

        The means are those that the circuit was found with. A circuit found with zero ablation has
        none; then they are read from its run folder.
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
        """Return edits that compute the delta anew at every pass, from the tokens so far.

        Those of `edits` hold for one set of prompts; these hold for any tokens.
        """
        check_amount(strength, "strength")
        chosen, values = self.chosen(mapped), self.values(mapped)
        at = bridged(mapped.bridges, site)
        source = mapped.bridges.config.pairs[at]

        def delta(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            changes = stream_change.ablated(mapped.sparse, ids, chosen, values, attention_mask)
            return mapped.bridges.transport(at, changes[source])

        limit = mapped.bridges.limits()[at]
        return [LiveEdit(site=at, compute=delta, amount=strength, limit=limit)]


@dataclass(frozen=True, eq=False)
class Steering(Intervention):
    """Give nodes the values that they have in a run on other prompts of the same shape.

    Mode "transport" decodes the change of the sparse stream at one dense site, from which on the
    whole dense model sees it. Mode "read" is the paper's rule for residual read nodes (Gao et al.
    2025, Appendix A.4; docs/method.md#read-nodes): the change is shown only to the dense sublayers
    that correspond to the sparse sublayer which reads those nodes, and then taken out again.
    """

    other_ids: Ids
    """The counterfactual prompts, one for each presented prompt, padded alike."""
    nodes: Nodes = None
    mode: Literal["transport", "read"] = "transport"

    def __post_init__(self) -> None:
        self._keep_nodes()
        if self.mode not in ("transport", "read"):
            raise ValueError(f"mode={self.mode!r} must be 'transport' or 'read'")

    def check(self, mapped: Mapped, ids: Ids, attention_mask: Mask = None) -> None:
        """Raise ValueError unless both prompts have one shape and the dense model takes both."""
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
        """Return what replacing the nodes' values changes in the sparse stream, at every site.

        Raises ValueError in mode "read", whose changes belong to single sublayers: see `edits`.
        """
        if self.mode == "read":
            raise ValueError(
                "mode='read' has no one delta: each node is read at a site of its own; take its "
                "edits (edits_of), or mode='transport'"
            )
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
        """Return the steering as edits: one at `site`, or in mode "read" two per sublayer.

        In mode "read" the sites follow from the nodes, so `site` is not used. Raises ValueError if
        a node is then not a residual read (act_in).
        """
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
