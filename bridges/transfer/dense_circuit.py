"""From a circuit in the sparse model to edits of the dense one.

Delta transport (method.md 5.3), valid for every node and for whole circuits: run the sparse model
clean and intervened, and at one dense site s add the decoded difference to the dense residual,

    h_s <- h_s + strength * sigma_s D_s (z'_t - z_t)        t the sparse site s is bridged to

Every `site` here is one of the dense model. The decoder's bias and its reconstruction error cancel,
so strength 0 is the untouched dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bridges.maps.bridge import BridgeSet
from bridges.run_folder import run_folder
from dense import DenseModel, Edit, LiveEdit, run_edited
from dense.edit import check_amount, check_site
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.circuits.means import load_means
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import logit_difference

from . import stream_change
from .directions import first_moved, node_edits, read_edits

Nodes = Iterable[Node] | None
Ids = Int[Tensor, "batch pos"]
Mask = Shaped[Tensor, "batch pos"] | None
Strength = float | Tensor
Logits = Float[Tensor, "batch pos vocab"]
Delta = Float[Tensor, "batch pos d_dense"]


@dataclass(frozen=True, kw_only=True)
class DenseCircuit:
    """A sparse circuit as interventions on the dense model it is bridged to.

    `ablate`, `steer` and `interchange` return dense logits, through nnsight. Each has its edits, to
    be composed with a trace of your own:

        lm = trace_model(mapped.dense)
        edits = mapped.ablation_edits(ids)
        with lm.trace(**mapped.dense.inputs(ids)):                  inside it, in model order
            apply_edits(lm, mapped.dense, edits)
            h = lm.get(mapped.dense.site_path(4)).output.save()
        with editing(lm, mapped.dense, edits) as edited:            or around it, for any number
            ...

    In a generation (`dense.generate_edited`, or `editing`) these edits hold at the prompt's
    positions: what they add was computed there, and a counterfactual has no token beyond the
    prompt. New positions are left alone; they attend to the edited ones. `live_ablation` holds
    the nodes at every position, the new ones too, and `edits(node)` gives fixed directions, which
    act at every position.
    """

    circuit: Circuit
    sparse: SparseGPT
    bridges: BridgeSet
    dense: DenseModel
    site: int | None
    """Where deltas are added unless a call says otherwise; chosen on the validation split."""
    site_effects: dict[int, float] = field(default_factory=dict)
    """What the choice was made by: mean change of the logit difference towards the counterfactual
    target on the validation split, in logits, per bridged site, at strength 1."""

    def __repr__(self) -> str:
        where = "no site chosen" if self.site is None else f"site {self.site}"
        return (
            f"DenseCircuit({self.circuit.task.name!r}, {len(self.circuit)} nodes, in "
            f"{self.dense.name} at {where} of 0..{self.dense.n_sites - 1})"
        )

    def ablate(
        self,
        ids: Ids,
        nodes: Nodes = None,
        kind: Literal["mean", "zero"] = "mean",
        site: int | None = None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> Logits:
        """Return the dense logits with the circuit's nodes (or `nodes`) held at `kind`.

        A row padded under `attention_mask` answers as it does alone. Gradients flow to `strength`.
        """
        edits = self.ablation_edits(ids, nodes, kind, site, strength, attention_mask)
        return run_edited(self.dense, ids, edits, attention_mask)

    def steer(
        self,
        ids: Ids,
        counterfactual_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        strength: Strength = 1.0,
        mode: Literal["transport", "read"] = "transport",
        attention_mask: Mask = None,
    ) -> Logits:
        """Return the dense logits with the nodes moved to their counterfactual values.

        `counterfactual_ids` has the shape and the padding of `ids`. mode "read" is the paper's rule
        for residual read nodes (Appendix A.4): only the sublayer that reads them sees the change,
        or the dense ones that answer it; the sparse site it reads must be bridged (see `edits`).
        """
        edits = self.steering_edits(
            ids, counterfactual_ids, nodes, site, strength, mode, attention_mask
        )
        return run_edited(self.dense, ids, edits, attention_mask)

    def interchange(
        self,
        ids: Ids,
        source_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        attention_mask: Mask = None,
    ) -> Logits:
        """Return the dense logits with the nodes' values taken from a run on `source_ids`.

        An interchange is a steering of strength 1.
        """
        return self.steer(ids, source_ids, nodes, site, attention_mask=attention_mask)

    def ablation_edits(
        self,
        ids: Ids,
        nodes: Nodes = None,
        kind: Literal["mean", "zero"] = "mean",
        site: int | None = None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return what `ablate` does as edits of the dense residual at the positions of `ids`."""
        delta = self.delta_ablate(ids, nodes, kind, site, attention_mask)
        return [self._edit(site, delta, strength)]

    def live_ablation(
        self,
        nodes: Nodes = None,
        kind: Literal["mean", "zero"] = "mean",
        site: int | None = None,
        strength: Strength = 1.0,
    ) -> list[LiveEdit]:
        """Return edits that do to any tokens what `ablate` does, computed anew at every pass.

        In a generation the sparse model is run on the prompt and what was generated so far, so the
        nodes are held at every position. Each step costs two sparse passes over all positions.
        """
        s, chosen, values = self._site(site), self._chosen(nodes), self._ablation(kind)

        def delta(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            changes = stream_change.ablated(self.sparse, ids, chosen, values, attention_mask)
            return self._transport(s, changes)

        check_amount(strength, "strength")
        return [LiveEdit(site=s, compute=delta, amount=strength)]

    def steering_edits(
        self,
        ids: Ids,
        counterfactual_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        strength: Strength = 1.0,
        mode: Literal["transport", "read"] = "transport",
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return what `steer` does as edits of the dense residual at the positions of `ids`."""
        if mode not in ("transport", "read"):
            raise ValueError(f"mode={mode!r} must be 'transport' or 'read'")
        if mode == "transport":
            delta = self.delta_steer(ids, counterfactual_ids, nodes, site, attention_mask)
            return [self._edit(site, delta, strength)]
        self._check_ids(ids, counterfactual_ids, attention_mask)
        chosen = self._chosen(nodes)
        if wrong := [at for at in chosen if not at.endswith("act_in")]:
            raise ValueError(
                f"mode='read' is for residual read nodes (act_in), got nodes at {wrong}; pass "
                "nodes= with read nodes only, or use mode='transport'"
            )
        changes = stream_change.read(self.sparse, ids, counterfactual_ids, chosen, attention_mask)
        read = (read_edits(self.bridges, t, dz, strength) for t, dz in changes.items())
        return [edit for edits in read for edit in edits]

    def interchange_edits(
        self,
        ids: Ids,
        source_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return what `interchange` does as edits of the dense residual."""
        return self.steering_edits(ids, source_ids, nodes, site, attention_mask=attention_mask)

    def transport_edits(
        self,
        delta: Float[Tensor, "*any d_sparse"],
        site: int | None = None,
        strength: Strength = 1.0,
    ) -> list[Edit]:
        """Return what a change `delta` of the sparse residual bridged to `site` adds there.

        Gradients flow to `delta` and `strength`.
        """
        return [self._edit(site, self.bridges.transport(self._site(site), delta), strength)]

    @torch.no_grad()
    def delta_ablate(
        self,
        ids: Ids,
        nodes: Nodes = None,
        kind: Literal["mean", "zero"] = "mean",
        site: int | None = None,
        attention_mask: Mask = None,
    ) -> Delta:
        """Return what ablating the nodes adds to the dense residual at strength 1."""
        self._check_ids(ids, ids, attention_mask)
        s, chosen, values = self._site(site), self._chosen(nodes), self._ablation(kind)
        changes = stream_change.ablated(self.sparse, ids, chosen, values, attention_mask)
        return self._transport(s, changes)

    @torch.no_grad()
    def delta_steer(
        self,
        ids: Ids,
        counterfactual_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        attention_mask: Mask = None,
    ) -> Delta:
        """Return what moving the nodes to their counterfactual values adds, at strength 1."""
        self._check_ids(ids, counterfactual_ids, attention_mask)
        s, chosen = self._site(site), self._chosen(nodes)
        changes = stream_change.replaced(
            self.sparse, ids, counterfactual_ids, chosen, attention_mask
        )
        return self._transport(s, changes)

    @torch.no_grad()
    def edits(self, node: Node) -> list[Edit]:
        """Return the fixed dense direction one unit of a node's value writes or reads.

            write j      sigma D e_j                     at the site after its sublayer
            neuron a     sigma D W_proj[:, a]            at the site after its MLP
            v channel c  sigma D W_o[:, c]               at the site after its attention
            read j       sigma D e_j / gamma_j           at the site its sublayer reads

        (method.md 5.2 and 5.3, before AbsTopK chooses; a read is in units of the normalised stream
        times its root mean square, and its second edit takes it out of the stream again.) They act
        at every position, generated ones too. These are sparse sites; where that of a write is not
        bridged, the edit is at the first bridge after it, to which the stream carries the write.
        A read needs the very site bridged, since at no other is the change what its sublayer
        reads; it is taken out where the map puts the sparse site after it. Raises ValueError
        where there is no such bridge, and for q and k channels: they act through attention
        scores, in no fixed direction.
        """
        self.circuit.with_nodes([node], "checked")  # refuses a node that does not exist
        return node_edits(self.sparse, self.bridges, node)

    def choose_site(self, split: str = "validation") -> DenseCircuit:
        """Return this circuit with the site at which steering moves the dense model most.

        Measured on a split of the task: the mean change of logit(counterfactual target) minus
        logit(own target), in logits, at strength 1. Candidates are the bridged sites whose sparse
        site comes after a node of the circuit; nodes after it take no part there. The sparse model
        runs three times, the dense one once for every candidate and once untouched.
        """
        pairs, chosen = self.bridges.config.pairs, self._chosen(None)
        first = first_moved(chosen, self.sparse)
        sites = [s for s, t in pairs.items() if t >= first]
        if not sites:
            raise ValueError(
                f"the circuit acts from sparse site {first} on and the last bridged one is "
                f"{max(pairs.values())}; bridge a later site"
            )
        batch = self.circuit.task.batch(self.tokenizer, split).to(self.dense.device)
        ids, other = batch.ids, batch.counterfactual()
        self._check_ids(ids, other, None)
        changes = stream_change.replaced(self.sparse, ids, other, chosen)
        before = logit_difference(batch.scored(self.dense.logits(ids)), batch)
        effects = {}
        with torch.no_grad():
            for s in sites:
                moved = run_edited(self.dense, ids, self.transport_edits(changes[pairs[s]], s))
                after = logit_difference(batch.scored(moved), batch)
                effects[s] = float((before - after).mean())
        best = max(effects, key=effects.__getitem__)
        return replace(self, site=best, site_effects=effects)

    @property
    def tokenizer(self) -> Any:
        """The dense model's tokenizer, or the run's where it was opened without one."""
        if self.dense.tokenizer is not None:
            return self.dense.tokenizer
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            run_folder(self.circuit, "a DenseModel with tokenizer")
        )

    def _check_ids(self, ids: Ids, counterfactual_ids: Ids, mask: Tensor | None) -> None:
        if ids.shape != counterfactual_ids.shape:
            raise ValueError(
                f"the counterfactual ids are {tuple(counterfactual_ids.shape)} and the ids "
                f"{tuple(ids.shape)}; every position needs its counterpart: give equal lengths"
            )
        for given in (ids, counterfactual_ids):
            self.dense.inputs(given, mask)  # refuses what the model cannot take

    def _site(self, site: int | None) -> int:
        site = self.site if site is None else site
        if site is None:
            raise ValueError("no site was chosen; pass site=, or call choose_site() first")
        check_site(site)
        self.bridges.index(site)
        return site

    def _chosen(self, nodes: Nodes) -> stream_change.Chosen:
        """Which nodes are intervened on, at the locations that have any."""
        circuit = self.circuit if nodes is None else self.circuit.with_nodes(nodes, "chosen")
        masks = {at: mask for at, mask in circuit.masks().items() if mask.any()}
        return {at: mask.to(self.dense.device) for at, mask in masks.items()}

    def _ablation(self, kind: str) -> Mapping[str, Tensor]:
        ours, circuit = self.circuit.ablation, self.circuit
        if kind == "zero":
            values = {at: torch.zeros_like(value) for at, value in ours.items()}
        elif kind == "mean":
            mean, of = circuit.ablation_kind == "mean", circuit.model_fingerprint
            values = ours if mean else load_means(run_folder(circuit, "a circuit with means"), of)
        else:
            raise ValueError(f"kind={kind!r} must be 'mean' or 'zero'")
        return {at: value.to(self.dense.device) for at, value in values.items()}

    def _edit(self, site: int | None, delta: Tensor, strength: Strength) -> Edit:
        """An edit that belongs to the positions its delta was computed at."""
        check_amount(strength, "strength")
        return Edit(site=self._site(site), direction=delta, amount=strength, prompt_only=True)

    def _transport(self, site: int, changes: list[Tensor]) -> Tensor:
        """What the sparse changes add at dense `site`: the one where it is bridged, decoded."""
        return self.bridges.transport(site, changes[self.bridges.config.pairs[site]])
