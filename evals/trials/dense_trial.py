"""One split of a task in the dense model, ready to be resumed with many deltas at any site.

    logits(s, delta) = resume(s, h_s + delta, ids)        at the scored positions

The dense model is run once, which gives h at every site, and the sparse model twice, on the prompts
and on their sources. Every delta then needs one edited run of the sparse model at most, and the
rest of the dense model. The result is what an edit through nnsight gives, because resuming at a
site is exact (`Trial.check` shows it on the model in hand).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.losses.quantities import kl_nats
from bridges.maps.bridge import BridgeSet, through
from bridges.transfer import stream_change
from bridges.transfer.intervention import Ablation, Steering
from dense import Edit, run_edited
from evals.scores.paired import per_pair
from sparse.circuits.graph import Node
from sparse.circuits.taps import recorded
from sparse.model.modes import still
from sparse.tasks.batch import TaskBatch, logit_difference, task_nats

NUMBERS_AT_ONCE = 2**26
"""Largest number of activations and logits in one forward, as `Trial.together` counts them."""
IN_CACHE = 2**22
"""The same on a CPU, where a forward that leaves the cache takes twice as long per delta."""
WIDEST = 8
"""Numbers that a block holds at once for a token, in widths of the stream: the stream itself, what
a sublayer reads, and the hidden layer of an MLP before and after its nonlinearity or gate."""
TOLERANCE = 1e-3
"""Largest difference in logits allowed between an edit through nnsight and resuming at its site."""
NEVER = -1e4
"""Logit of a token that is left out of a distribution: its probability is 0 in float32."""

Deltas = Callable[[int], Float[Tensor, "prompt pos d_dense"]]
"""Dense site to what is added to the dense stream there."""


@dataclass(frozen=True)
class Decoded:
    """Changes dz of the sparse stream as changes of the dense one: sigma_s D_s dz_t at site s.

    It is 0 at tokens that are outlying at s (`BridgeSet`).
    """

    bridges: BridgeSet
    changes: list[Float[Tensor, "prompt pos d_sparse"]]
    """dz at every sparse site."""
    h: list[Float[Tensor, "prompt pos d_dense"]]
    """The dense residuals at every dense site."""

    @torch.no_grad()
    def __call__(self, site: int) -> Float[Tensor, "prompt pos d_dense"]:
        """Return what is added to the dense stream at a dense site."""
        return self.of(self.changes[self.bridges.config.pairs[site]], site)

    @torch.no_grad()
    def of(
        self, dz: Float[Tensor, "prompt pos d_sparse"], site: int
    ) -> Float[Tensor, "prompt pos d_dense"]:
        """Return what any change of the sparse stream at a site adds to the dense one."""
        delta = self.bridges.transport(site, dz)
        ordinary = self.bridges.ordinary(site, self.h[site])
        return through(delta, ordinary, torch.zeros_like(delta))


Logits = Float[Tensor, "prompt vocab"]
PerPair = Float[Tensor, " pair"]


class Trial:
    """Prompts of a task in both models, and for each a source of node values.

    `mapped` has both models and the bridges (a `DenseCircuit`), `sources` one prompt for every row
    of `batch`, of the same length. By default each is the counterfactual of its own pair.
    """

    def __init__(
        self, mapped: Any, batch: TaskBatch, sources: Int[Tensor, "prompt pos"] | None = None
    ) -> None:
        self.mapped, self.dense, self.sparse = mapped, mapped.dense, mapped.sparse
        self.bridges = mapped.bridges
        self.sites: tuple[int, ...] = self.bridges.config.sites
        self.batch = batch.to(self.dense.device)
        self.ids = self.batch.ids
        cf = self.batch.counterfactual()
        self.sources = cf if sources is None else sources.to(self.dense.device)
        with torch.no_grad(), still(self.sparse):
            self.h = self.dense.residuals(self.ids)
            self.z = self.sparse.residuals(self.ids)
            with recorded(self.sparse) as self.there:
                self.z_source = self.sparse.residuals(self.sources)
            self.untouched: Logits = self.dense.last_logits(self.ids, self.batch.last)
            self.full: Logits = self.untouched.roll(self.batch.n_pairs, 0)
        self.p_0, self.p_cf = self.moved(self.untouched), self.moved(self.full)
        self.nats_0 = self.nats(self.untouched)

    # What a delta is made of.

    def steered(self, nodes: Iterable[Node]) -> Decoded:
        """Return what interchanging these nodes with their values in the sources adds, by site."""
        steering = Steering(self.sources, nodes)
        chosen = steering.chosen(self.mapped)
        known = {"there": self.there, "clean": self.z}
        with torch.no_grad(), still(self.sparse):
            dz = stream_change.replaced(self.sparse, self.ids, self.sources, chosen, **known)
        return Decoded(self.bridges, _finite(dz), self.h)

    def ablated(self, nodes: Iterable[Node]) -> Decoded:
        """Return what holding these nodes at their mean adds, by site."""
        ablation = Ablation(nodes)
        chosen, values = ablation.chosen(self.mapped), ablation.values(self.mapped)
        dz = stream_change.ablated(self.sparse, self.ids, chosen, values, clean=self.z)
        return Decoded(self.bridges, dz, self.h)

    def embedded(self) -> Decoded:
        """Return the difference of the embeddings of source and prompt, decoded at every site."""
        return Decoded(self.bridges, [self.z_source[0] - self.z[0]] * len(self.z), self.h)

    def patched(self) -> Deltas:
        """Return the full patch from the source: its dense residual minus that of the prompt."""
        with torch.no_grad():
            there = self.dense.residuals(self.sources)
        return lambda site: there[site] - self.h[site]

    def true_difference(self) -> Deltas:
        """Return the dense residual on the counterfactual minus that on the prompt, by site."""
        return lambda site: self.h[site].roll(self.batch.n_pairs, 0) - self.h[site]

    # What it does.

    def logits(self, site: int, delta: Float[Tensor, "prompt pos d_dense"]) -> Logits:
        """Return the logits at the scored positions with `delta` added at a site."""
        return next(self.many(site, [delta]))

    @torch.no_grad()
    def many(self, site: int, deltas: Iterable[Tensor]) -> Iterator[Logits]:
        """Yield `logits` for every delta, several deltas in one forward (`together`)."""
        waiting: list[Tensor] = []
        for delta in deltas:
            waiting.append(delta)
            if len(waiting) == self.together:
                yield from self._run(site, waiting)
                waiting = []
        if waiting:
            yield from self._run(site, waiting)

    @property
    def together(self) -> int:
        """Number of deltas that are run in one forward.

        For one prompt a forward holds the logits of its scored position, and WIDEST d_dense numbers
        at each of its positions.
        """
        n, pos = self.ids.shape
        one = n * (self.dense.vocab_size + WIDEST * pos * self.dense.d_resid)
        most = IN_CACHE if self.ids.device.type == "cpu" else NUMBERS_AT_ONCE
        return max(1, most // one)

    def _run(self, site: int, deltas: list[Tensor]) -> list[Tensor]:
        h = torch.cat([self.h[site] + delta for delta in deltas])
        ids, last = (x.repeat(len(deltas), 1) for x in (self.ids, self.batch.last[:, None]))
        out = self.dense.resume(site, h, ids, positions=last)
        return list(out.squeeze(1).chunk(len(deltas)))

    def moved(self, logits: Logits) -> PerPair:
        """Return P(target of the other context): in the softmax over the pair's two targets, or,
        for one-sided pairs, over the whole vocabulary."""
        return per_pair(torch.sigmoid(-logit_difference(logits, self.batch))).double()

    def nats(self, logits: Logits) -> PerPair:
        """Return the task loss, in nats."""
        return per_pair(task_nats(logits, self.batch)).double()

    def collateral_a(self, logits: Logits) -> PerPair:
        """Return KL(dense on the counterfactual || edited) over the vocabulary, in nats."""
        return per_pair(kl_nats(self.full, logits)).double()

    def collateral_b(self, logits: Logits) -> PerPair:
        """Return KL(untouched || edited) without the two targets, renormalised, in nats."""
        hidden = self._targets()
        kl = kl_nats(*(x.float().masked_fill(hidden, NEVER) for x in (self.untouched, logits)))
        return per_pair(kl).double()

    def _targets(self) -> Bool[Tensor, "prompt vocab"]:
        hidden = torch.zeros_like(self.untouched, dtype=torch.bool)
        for of in (self.batch.target, self.batch.foil):
            hidden |= torch.zeros_like(hidden).scatter(1, of.clamp(min=0)[:, None], True) & (
                of[:, None] >= 0
            )
        return hidden

    def share(self, p_edit: PerPair) -> float:
        """Return (P_edit - P_0) / (P_cf - P_0), a ratio of means over pairs."""
        return float((p_edit - self.p_0).mean() / (self.p_cf - self.p_0).mean())

    def check(self, site: int, delta: Float[Tensor, "prompt pos d_dense"]) -> None:
        """Raise ValueError unless resuming at the site gives what an edit through nnsight gives."""
        edit = Edit(site=site, direction=delta, amount=1.0, prompt_only=True)
        public = run_edited(self.dense, self.ids, [edit], positions=self.batch.last[:, None])
        gap = float((public.squeeze(1) - self.logits(site, delta)).abs().max())
        if gap > TOLERANCE:
            raise ValueError(
                f"evals: an edit at site {site} and resuming there differ by {gap:.2g} logits, at "
                f"most {TOLERANCE} is rounding; the random controls would not be comparable, so "
                "check the dense model's sites"
            )


def _finite(changes: list[Tensor]) -> list[Tensor]:
    """Return the changes; raise ValueError where one holds NaN, which a control would hide."""
    if not all(bool(dz.isfinite().all()) for dz in changes):
        raise ValueError(
            "evals: an intervention on the sparse model gives NaN or infinity; look at the "
            "circuit's ablation values and at the weights of the sparse model"
        )
    return changes
