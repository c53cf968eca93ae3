"""The logits of a circuit: those of its model while all other nodes are held at constants.

Pruning, reports and released circuits all score a circuit by these functions.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import TaskBatch

from .mask import Keep, Values, masked


def last_logits(
    model: SparseGPT, batch: TaskBatch, ids: Int[Tensor, "prompt pos"] | None = None
) -> Float[Tensor, "prompt vocab"]:
    """Return the logits at the scored position of every prompt of `batch`.

    `ids`, if given, are run in the place of the batch's prompts, at the same positions. To save
    time, only the scored positions are unembedded, and in the last layer the query of attention
    and all that follows it are run at those alone (`SparseGPT.last_logits`). So in the last layer
    `edited` and `recorded` see (prompt, 1, width) at attn.q, attn.resid_delta and the MLP's
    locations, and every position at attn.act_in, attn.k and attn.v.

    >>> from bridges import load_run
    >>> from sparse import get_task, last_logits
    >>> run = load_run("tiny")
    >>> batch = get_task("single_double_quote").batch(run.tokenizer, "test")
    >>> last_logits(run.sparse, batch).shape == (2 * batch.n_pairs, 2048)
    True
    """
    return model.last_logits(batch.ids if ids is None else ids, batch.last)


def circuit_logits(
    model: SparseGPT, batch: TaskBatch, keep: Keep, ablation: Values
) -> Float[Tensor, "prompt vocab"]:
    """Return the logits at the scored positions while the nodes that are not kept are ablated.

        x <- m x + (1 - m) mu,      m = keep[location], mu = ablation[location]

    `keep` holds one mask per location, as `Circuit.masks()` returns them. With the complement of
    these masks, the logits are those of the model without the circuit. Gradients reach a float
    `keep`.
    """
    with masked(model, keep, ablation):
        return last_logits(model, batch)
