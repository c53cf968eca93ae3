"""A sparse circuit as interventions on the dense model it is bridged to.

Every `site` here is one of the dense model. What an intervention is stands in intervention.py; how
it reaches the dense model, through nnsight, is `dense.run_edited`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.maps.bridge import BridgeSet
from bridges.run_folder import run_folder
from dense import DenseModel, Edit, LiveEdit, run_edited
from dense.edit import check_amount
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import logit_difference

from .directions import first_moved, node_edits
from .intervention import (
    Ablation,
    Delta,
    Ids,
    Intervention,
    Mask,
    Nodes,
    Steering,
    Strength,
    bridged,
)

Logits = Float[Tensor, "batch pos vocab"]
MOVED = {  # what had a method of its own before interventions were values
    "ablation_edits": "edits_of(Ablation(...), ids)",
    "steering_edits": "edits_of(Steering(counterfactual_ids, ...), ids)",
    "interchange_edits": "edits_of(Steering(source_ids, ...), ids)",
    "delta_ablate": "delta(Ablation(...), ids)",
    "delta_steer": "delta(Steering(counterfactual_ids, ...), ids)",
}


@dataclass(frozen=True, kw_only=True)
class DenseCircuit:
    """A sparse circuit as interventions on the dense model it is bridged to.

    `ablate`, `steer` and `interchange` return dense logits, through nnsight. What they do is a
    value, `Ablation(nodes, kind)` or `Steering(other_ids, nodes, mode)`: `delta` says what it adds
    to the dense residual, and `edits_of` gives the edits, to be composed with a trace of your own:

        lm = trace_model(mapped.dense)
        edits = mapped.edits_of(Ablation(), ids)
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

    def __getattr__(self, name: str) -> Any:
        hint = f"; it is now {MOVED[name]}" if name in MOVED else ""
        raise AttributeError(f"DenseCircuit has no attribute {name!r}{hint}")

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
        done = Ablation(nodes, kind)
        return self._run(done, ids, site, strength, attention_mask)

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

        `counterfactual_ids` has the shape and the padding of `ids`; `mode` is that of `Steering`.
        """
        done = Steering(counterfactual_ids, nodes, mode)
        return self._run(done, ids, site, strength, attention_mask)

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
        done = Steering(source_ids, nodes)
        return self._run(done, ids, site, 1.0, attention_mask)

    def edits_of(
        self,
        intervention: Intervention,
        ids: Ids,
        site: int | None = None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return an intervention as edits of the dense residual at the positions of `ids`."""
        return intervention.edits(self, ids, self._site(site), strength, attention_mask)

    @torch.no_grad()
    def delta(
        self,
        intervention: Intervention,
        ids: Ids,
        site: int | None = None,
        attention_mask: Mask = None,
    ) -> Delta:
        """Return what an intervention adds to the dense residual at a site, at strength 1."""
        return intervention.delta(self, ids, self._site(site), attention_mask)

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
        return Ablation(nodes, kind).live_edits(self, self._site(site), strength)

    def transport_edits(
        self,
        delta: Float[Tensor, "*any d_sparse"],
        site: int | None = None,
        strength: Strength = 1.0,
    ) -> list[Edit]:
        """Return what a change `delta` of the sparse residual bridged to `site` adds there.

        Gradients flow to `delta` and `strength`.
        """
        check_amount(strength, "strength")
        at = bridged(self.bridges, self._site(site))
        direction = self.bridges.transport(at, delta)
        return [Edit(site=at, direction=direction, amount=strength, prompt_only=True)]

    @torch.no_grad()
    def edits(self, node: Node) -> list[Edit]:
        """Return the fixed dense direction one unit of a node's value writes or reads.

            write j      sigma D e_j                     at the site after its sublayer
            neuron a     sigma D W_proj[:, a]            at the site after its MLP
            v channel c  sigma D W_o[:, c]               at the site after its attention
            read j       sigma D e_j / gamma_j           at the site its sublayer reads

        (docs/method.md#fixed-directions; before AbsTopK chooses. A read is in units of the
        normalised stream times its root mean square, and its second edit takes it out of the
        stream again.) They act at every position, generated ones too. These are sparse sites; where
        that of a write is not bridged, the edit is at the first bridge after it, to which the
        stream carries the write. A read needs the very site bridged, since at no other is the
        change what its sublayer reads; it is taken out where the map puts the sparse site after
        it. Raises ValueError where there is no such bridge, and for q and k channels: they act
        through attention scores, in no fixed direction.
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
        batch = self.circuit.task.batch(self.tokenizer, split).to(self.dense.device)
        ids, steering = batch.ids, Steering(batch.counterfactual())
        steering.check(self, ids)
        sites = self._candidates(steering)
        changes = steering.changes(self, ids)
        before = logit_difference(batch.scored(self.dense.logits(ids)), batch)
        effects = {}
        with torch.no_grad():
            for s in sites:
                edits = self.transport_edits(changes[self.bridges.config.pairs[s]], s)
                after = logit_difference(batch.scored(run_edited(self.dense, ids, edits)), batch)
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

    def _run(
        self,
        intervention: Intervention,
        ids: Ids,
        site: int | None,
        strength: Strength,
        attention_mask: Mask,
    ) -> Logits:
        edits = self.edits_of(intervention, ids, site, strength, attention_mask)
        return run_edited(self.dense, ids, edits, attention_mask)

    def _candidates(self, steering: Steering) -> list[int]:
        """Return the bridged dense sites that a node of the circuit comes before."""
        pairs, first = self.bridges.config.pairs, first_moved(steering.chosen(self), self.sparse)
        sites = [s for s, t in pairs.items() if t >= first]
        if not sites:
            raise ValueError(
                f"the circuit acts from sparse site {first} on and the last bridged one is "
                f"{max(pairs.values())}; bridge a later site"
            )
        return sites

    def _site(self, site: int | None) -> int | None:
        return self.site if site is None else site
