"""One split of a task in the sparse model, on which any circuit can be measured.

alone        task loss when every node outside the circuit is held at its ablation value
stochastic   the same when each node outside is held with probability p, drawn for every pair
without      task loss when the circuit's nodes are held and no others
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from evals.scores.paired import per_pair
from sparse.circuits.circuit import Circuit
from sparse.circuits.score import circuit_logits, last_logits
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch, task_nats

N_MASKS = 2
"""Forwards over which a stochastic loss is averaged; in each, every pair has a mask of its own."""


class TwinTrial:
    """One split of a task in the sparse model; losses are in nats, one number for each pair."""

    def __init__(self, model: SparseGPT, batch: TaskBatch, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.batch = batch.to(next(model.parameters()).device)
        with measuring(model):  # as the circuits are measured, so that all nodes give the same
            self.full: Float[Tensor, " pair"] = self._nats(last_logits(model, self.batch))

    def alone(self, circuit: Circuit) -> Float[Tensor, " pair"]:
        """Return the task loss with everything outside the circuit ablated."""
        logits = circuit_logits(self.model, self.batch, circuit.masks(), circuit.ablation)
        return self._nats(logits)

    def without(self, circuit: Circuit) -> Float[Tensor, " pair"]:
        """Return the task loss with the circuit's nodes ablated and no others."""
        rest = {at: ~mask for at, mask in circuit.masks().items()}
        return self._nats(circuit_logits(self.model, self.batch, rest, circuit.ablation))

    def stochastic(self, circuit: Circuit, p: float) -> Float[Tensor, " pair"]:
        """Return the task loss with a share p of the nodes outside the circuit ablated.

        Each of them is held at its ablation value with probability p, and otherwise keeps its own.
        Which ones is drawn for every pair anew, for both its contexts alike, and for every circuit
        and p from the same numbers, so that circuits are compared under the same draws.
        """
        total = torch.zeros_like(self.full)
        for i in range(N_MASKS):
            rng = torch.Generator().manual_seed(self.seed * N_MASKS + i)
            keep = {}
            for at, mask in circuit.masks().items():
                u = torch.rand(self.batch.n_pairs, 1, len(mask), generator=rng)
                keep[at] = (mask | (u >= p)).repeat(2, 1, 1)
            total += self._nats(circuit_logits(self.model, self.batch, keep, circuit.ablation))
        return total / N_MASKS

    def _nats(self, logits: Tensor) -> Tensor:
        return per_pair(task_nats(logits, self.batch))


@contextmanager
def measuring(model: SparseGPT) -> Iterator[None]:
    """Run the sparse model in eval mode, without gradients, with its products taken sparsely."""
    with torch.no_grad(), still(model), csr_products(model):
        yield
