"""One split of a task in the dense model, ready to be resumed with many deltas at one site.

    logits(delta) = resume(site, h + delta, ids)        at the scored positions

The dense model is run up to the site once; every delta then needs only the rest of the model. The
result is what an edit through nnsight gives, because resuming at a site is exact; `Trial.check`
shows this on the model in hand before any control is measured this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.transfer.intervention import Steering
from evals.scores.paired import per_pair
from sparse.circuits.circuit import Circuit
from sparse.tasks.batch import TaskBatch, logit_difference, task_nats
from sparse.tasks.score import positions_of
from sparse.tasks.task import Task

NUMBERS_AT_ONCE = 2**26
"""Largest number of activations and logits in one forward, as `Trial.together` counts them."""
WIDEST = 8
"""Numbers that a block holds at once for a token, in widths of the stream: the stream itself, what
a sublayer reads, and the hidden layer of an MLP before and after its nonlinearity or gate."""
TOLERANCE = 1e-3
"""Largest difference in logits allowed between `DenseCircuit.steer` and resuming at its site."""


class Trial:
    """One split of a task in the dense model, run up to the site of the intervention.

    `h` is the dense residual there, `true` its difference from that on the counterfactual prompts,
    and `delta` what steering with the circuit adds.
    """

    def __init__(
        self, dense_circuit: Any, task: Task, tokenizer: Any, split: str, max_pairs: int
    ) -> None:
        longest = positions_of(dense_circuit.dense, dense_circuit.sparse)
        batch = task.batch(tokenizer, split, longest)
        batch = batch.take(torch.arange(min(max_pairs, batch.n_pairs)))
        self.mapped, self.dense = dense_circuit, dense_circuit.dense
        self.batch: TaskBatch = batch.to(self.dense.device)
        self.site: int = dense_circuit.site
        self.ids = self.batch.ids
        self.counterfactual = self.batch.counterfactual()
        self.h = self.dense.residuals(self.ids)[self.site]
        self.true = self.dense.residuals(self.counterfactual)[self.site] - self.h
        self.delta: Tensor = dense_circuit.delta(Steering(self.counterfactual), self.ids)

    def steered_by(self, circuit: Circuit) -> Float[Tensor, "prompt pos d_dense"]:
        """Return the delta of steering with the nodes of another circuit."""
        return self.mapped.delta(Steering(self.counterfactual, list(circuit)), self.ids)

    def logits(self, delta: Float[Tensor, "prompt pos d_dense"]) -> Tensor:
        """Return the logits at the scored positions with `delta` added at the site."""
        return next(self.many([delta]))

    def many(self, deltas: Sequence[Tensor] | Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield `logits` for every delta, several deltas in one forward (`together`)."""
        waiting: list[Tensor] = []
        for delta in deltas:
            waiting.append(delta)
            if len(waiting) == self.together:
                yield from self._run(waiting)
                waiting = []
        if waiting:
            yield from self._run(waiting)

    @property
    def together(self) -> int:
        """Number of deltas that are run in one forward.

        For one prompt a forward holds the logits of its scored position, and WIDEST d_dense numbers
        at each of its positions.
        """
        n, pos = self.ids.shape
        one = n * (self.dense.vocab_size + WIDEST * pos * self.dense.d_resid)
        return max(1, NUMBERS_AT_ONCE // one)

    def _run(self, deltas: list[Tensor]) -> list[Tensor]:
        h = torch.cat([self.h + delta for delta in deltas])
        ids, last = (x.repeat(len(deltas), 1) for x in (self.ids, self.batch.last[:, None]))
        out = self.dense.resume(self.site, h, ids, positions=last)
        return list(out.squeeze(1).chunk(len(deltas)))

    def moved(self, logits: Tensor) -> Float[Tensor, " pair"]:
        """Return P(target of the other context), in the softmax over the pair's two targets."""
        return per_pair(torch.sigmoid(-logit_difference(logits, self.batch)))

    def margin(self, logits: Tensor) -> Float[Tensor, " pair"]:
        """Return the logit of the other context's target minus that of the own target."""
        return per_pair(-logit_difference(logits, self.batch))

    def nats(self, logits: Tensor) -> Float[Tensor, " pair"]:
        """Return the task loss, in nats."""
        return per_pair(task_nats(logits, self.batch))

    def circuits(self, draws: int, seed: int, outside: bool = False) -> Iterator[Circuit]:
        """Yield random circuits with as many nodes at each location as this one.

        With `outside` they are drawn from the other nodes where these suffice.
        """
        own, sparse = self.mapped.circuit, self.mapped.sparse
        return (own.random(sparse, seed + i, outside=outside) for i in range(draws))

    def check(self) -> None:
        """Raise ValueError unless resuming at the site gives what `DenseCircuit.steer` gives."""
        last = self.batch.last[:, None]
        public = self.mapped.steer(self.ids, self.counterfactual, positions=last).squeeze(1)
        if (gap := float((public - self.logits(self.delta)).abs().max())) > TOLERANCE:
            raise ValueError(
                f"evaluate_transfer: DenseCircuit.steer and resuming at site {self.site} differ by "
                f"{gap:.2g} logits, at most {TOLERANCE} is rounding; the random controls would not "
                "be comparable, so check the dense model's sites"
            )
