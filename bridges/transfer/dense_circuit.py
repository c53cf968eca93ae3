"""A sparse circuit as interventions on the dense model it is bridged to.

Every `site` here is a site of the dense model. intervention.py computes what an intervention adds
to the dense residual; `dense.run_edited` adds it there, through nnsight.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.maps.bridge import BridgeSet
from bridges.run_folder import run_folder
from dense import DenseModel, Edit, LiveEdit, run_edited
from dense.edit import check_amount
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import logit_difference
from sparse.tasks.score import positions_of

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

Logits = Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch wanted vocab"]
Positions = Int[Tensor, "batch wanted"] | None
"""Columns of the ids at which logits are wanted, some for every row; None means at all of them."""
MOVED = {  # old methods and what replaces them, for the message of `__getattr__`
    "ablation_edits": "edits_of(Ablation(...), ids)",
    "steering_edits": "edits_of(Steering(counterfactual_ids, ...), ids)",
    "interchange_edits": "edits_of(Steering(source_ids, ...), ids)",
    "delta_ablate": "delta(Ablation(...), ids)",
    "delta_steer": "delta(Steering(counterfactual_ids, ...), ids)",
}


@dataclass(frozen=True, kw_only=True)
class DenseCircuit:
    """A sparse circuit as interventions on the dense model it is bridged to.

    `ablate`, `steer` and `interchange` run the dense model with an intervention and return its
    logits. The intervention itself is a value, `Ablation(nodes, kind)` or
    `Steering(other_ids, nodes, mode)`. `delta` returns what such a value adds to the dense
    residual, and `edits_of` returns it as edits, which you can use in an nnsight trace of your own:

        lm = trace_model(mapped.dense)
        edits = mapped.edits_of(Ablation(), ids)
        with lm.trace(**mapped.dense.inputs(ids)):                  in one trace, in model order
            apply_edits(lm, mapped.dense, edits)
            h = lm.get(mapped.dense.site_path(4)).output.save()
        with editing(lm, mapped.dense, edits) as edited:            or in all traces of a copy
            ...

    In a generation (`dense.generate_edited`, or `editing`) these edits act at the prompt's
    positions only. What they add was computed there, and a counterfactual prompt has no token
    beyond the prompt. New positions are not edited, but they attend to the edited ones. Two kinds
    of edits act at new positions too: those of `live_ablation`, which are computed anew at every
    pass, and the fixed directions that `edits(node)` returns.
    """

    circuit: Circuit
    sparse: SparseGPT
    bridges: BridgeSet
    dense: DenseModel
    site: int | None
    """The dense site at which deltas are added unless a call says otherwise. `choose_site` chooses
    it on the validation split; None before."""
    site_effects: dict[int, float] = field(default_factory=dict)
    """What `choose_site` measured, by candidate site: the mean change of the logit difference
    towards the counterfactual target, in logits, at strength 1, on the validation split."""

    def __repr__(self) -> str:
        where = "no site chosen" if self.site is None else f"site {self.site}"
        return (
            f"DenseCircuit({self.circuit.task.name!r}, {len(self.circuit)} nodes, in "
            f"{self.dense.name} at {where} of 0..{self.dense.n_sites - 1})"
        )

    def __getattr__(self, name: str) -> Any:
        if name in MOVED:
            raise AttributeError(f"DenseCircuit has no attribute {name!r}; it is now {MOVED[name]}")
        return object.__getattribute__(self, name)  # raises as if this method were not here

    def ablate(
        self,
        ids: Ids,
        nodes: Nodes = None,
        kind: Literal["mean", "zero"] = "mean",
        site: int | None = None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
        positions: Positions = None,
    ) -> Logits:
        """Return the dense logits with the circuit's nodes (or `nodes`) ablated.

        `kind` says at which value the nodes are held (`Ablation`). A row that is padded, with an
        `attention_mask` that says so, gives the same logits as it does alone. With `positions`,
        only the logits at position positions[b, i] of every row b are computed: for the scored ones
        of a task, give `batch.last[:, None]`. Gradients flow to `strength`, the factor on the
        delta.
        """
        done = Ablation(nodes, kind)
        return self._run(done, ids, site, strength, attention_mask, positions)

    def steer(
        self,
        ids: Ids,
        counterfactual_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        strength: Strength = 1.0,
        mode: Literal["transport", "read"] = "transport",
        attention_mask: Mask = None,
        positions: Positions = None,
    ) -> Logits:
        """Return the dense logits with the nodes moved towards their counterfactual values.

        These are the values that the nodes have in a run of the sparse model on
        `counterfactual_ids`, which has the shape and the padding of `ids`. At strength 1 the nodes
        are moved all the way. `mode` is that of `Steering`, and `positions` as in `ablate`.
        """
        done = Steering(counterfactual_ids, nodes, mode)
        return self._run(done, ids, site, strength, attention_mask, positions)

    def interchange(
        self,
        ids: Ids,
        source_ids: Ids,
        nodes: Nodes = None,
        site: int | None = None,
        attention_mask: Mask = None,
        positions: Positions = None,
    ) -> Logits:
        """Return the dense logits with the nodes' values taken from a run on `source_ids`.

        An interchange is a steering of strength 1 in mode "transport".
        """
        done = Steering(source_ids, nodes)
        return self._run(done, ids, site, 1.0, attention_mask, positions)

    def edits_of(
        self,
        intervention: Intervention,
        ids: Ids,
        site: int | None = None,
        strength: Strength = 1.0,
        attention_mask: Mask = None,
    ) -> list[Edit]:
        """Return an intervention as edits of the dense residual at the positions of `ids`.

        Steering in mode "read" gives edits at the sites that its nodes read, and ignores `site`.
        """
        _check(intervention)
        return intervention.edits(self, ids, self._site(site), strength, attention_mask)

    @torch.no_grad()
    def delta(
        self,
        intervention: Intervention,
        ids: Ids,
        site: int | None = None,
        attention_mask: Mask = None,
    ) -> Delta:
        """Return what an intervention adds to the dense residual at a site, at strength 1.

        This is the delta of the whole stream, sigma_s D_s dz_t. The mode of a `Steering` makes no
        difference here: what mode "read" adds instead is in its edits (`edits_of`).
        """
        _check(intervention)
        return intervention.delta(self, ids, self._site(site), attention_mask)

    def live_ablation(
        self,
        nodes: Nodes = None,
        kind: Literal["mean", "zero"] = "mean",
        site: int | None = None,
        strength: Strength = 1.0,
    ) -> list[LiveEdit]:
        """Return edits that ablate the nodes on any tokens, computed anew at every pass.

        `ablate` computes its delta once, for the prompt it is given. In a generation these edits
        run the sparse model at every step, on the prompt and what was generated so far, so the
        nodes are held at every position. Each step costs two sparse passes over all positions.
        """
        return Ablation(nodes, kind).live_edits(self, self._site(site), strength)

    def transport_edits(
        self,
        delta: Float[Tensor, "*any d_sparse"],
        site: int | None = None,
        strength: Strength = 1.0,
    ) -> list[Edit]:
        """Return the edit by which a given change of the sparse residual is added at `site`.

            h_s <- h_s + strength * sigma_s D_s delta

        `delta` is a change at the sparse site that is bridged to `site`, computed in whatever way.
        Gradients flow to `delta` and `strength`.
        """
        check_amount(strength, "strength")
        at = bridged(self.bridges, self._site(site))
        direction = self.bridges.transport(at, delta)
        limit = self.bridges.limits()[at]
        return [Edit(site=at, direction=direction, amount=strength, prompt_only=True, limit=limit)]

    @torch.no_grad()
    def edits(self, node: Node) -> list[Edit]:
        """Return the edits that add one unit of a node's value, in a fixed dense direction.

            write j      sigma D e_j                     at the site after its sublayer
            neuron a     sigma D W_proj[:, a]            at the site after its MLP
            v channel c  sigma D W_o[:, c]               at the site after its attention
            read j       sigma D e_j / gamma_j           at the site its sublayer reads

        (docs/method.md#fixed-directions.) The directions hold before AbsTopK, which may drop what
        they write. A v channel is per unit of attention. A read is in units of the normalised
        stream times its root mean square. The edits act at every position, generated ones too.

        The sites above are sparse sites, and an edit needs a bridged one. Where the site of a write
        is not bridged, the edit is at the first bridge after it: the stream carries the write that
        far. A read needs a bridge at its very site, because at any other site the stream is not
        what its sublayer reads. A read gives two edits; the second takes the change out of the
        stream again, at the dense site that corresponds to the next sparse site (`read_at`).

        Raises ValueError where there is no such bridge, and for q and k channels, which have no
        fixed direction because they act through attention scores.
        """
        self.circuit.with_nodes([node], "checked")  # refuses a node that does not exist
        return node_edits(self.sparse, self.bridges, node)

    def choose_site(self, split: str = "validation") -> DenseCircuit:
        """Return this circuit with the site at which steering moves the dense model most.

        "Moves" means: the mean change of logit(counterfactual target) minus logit(own target), in
        logits, at strength 1, on a split of the task. Candidates are the bridged sites whose
        sparse site comes after at least one node of the circuit. Nodes later than a site cannot
        change the stream there, so they play no part in its delta. The sparse model runs three
        times, the dense model once unedited and once for every candidate. Raises ValueError where
        no bridge comes after a node.
        """
        longest = positions_of(self.dense, self.sparse)
        batch = self.circuit.task.batch(self.tokenizer, split, longest).to(self.dense.device)
        ids, steering = batch.ids, Steering(batch.counterfactual())
        steering.check(self, ids)
        sites = self._candidates(steering)
        changes = steering.changes(self, ids)
        before = logit_difference(self.dense.last_logits(ids, batch.last), batch)
        effects = {}
        with torch.no_grad():
            for s in sites:
                edits = self.transport_edits(changes[self.bridges.config.pairs[s]], s)
                after = run_edited(self.dense, ids, edits, positions=batch.last[:, None])
                effects[s] = float((before - logit_difference(after[:, 0], batch)).mean())
        best = max(effects, key=effects.__getitem__)
        return replace(self, site=best, site_effects=effects)

    @property
    def tokenizer(self) -> Any:
        """The dense model's tokenizer, or that of the circuit's run if the model has none."""
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
        positions: Positions,
    ) -> Logits:
        edits = self.edits_of(intervention, ids, site, strength, attention_mask)
        return run_edited(self.dense, ids, edits, attention_mask, positions)

    def _candidates(self, steering: Steering) -> list[int]:
        """Return the bridged dense sites whose sparse site comes after a node of the circuit."""
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


def _check(intervention: Any) -> None:
    if not isinstance(intervention, Intervention):
        raise ValueError(
            f"{intervention!r:.80} is no intervention; give Ablation(nodes, kind) or "
            "Steering(other_ids, nodes, mode)"
        )
