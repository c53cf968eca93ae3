"""What a circuit answers: the logits of a model all but some of whose nodes are held still.

This is the one pass that pruning, reports and released circuits share.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import TaskBatch

from .mask import Values, masked


def last_logits(
    model: SparseGPT, batch: TaskBatch, ids: Int[Tensor, "prompt pos"] | None = None
) -> Float[Tensor, "prompt vocab"]:
    """Return the logits at the scored position of every prompt, of `ids` instead if given.

    Only those positions are unembedded, and the last layer is run at those alone
    (`SparseGPT.last_logits`), so `edited` and `recorded` see (prompt, 1, width) there.

    >>> from bridges import load_run
    >>> from sparse import get_task, last_logits
    >>> run = load_run("tiny")
    >>> batch = get_task("single_double_quote").batch(run.tokenizer, "test")
    >>> last_logits(run.sparse, batch).shape == (2 * batch.n_pairs, 2048)
    True
    """
    return model.last_logits(batch.ids if ids is None else ids, batch.last)


def circuit_logits(
    model: SparseGPT, batch: TaskBatch, keep: Values, ablation: Values
) -> Float[Tensor, "prompt vocab"]:
    """Return the logits at the scored positions when the nodes not in `keep` are ablated.

        x <- m x + (1 - m) mu,      m = keep[location], mu = ablation[location]

    `keep` is what `Circuit.masks()` returns; its complement asks what the rest of the model does.
    Gradients reach a float `keep`.
    """
    with masked(model, keep, ablation):
        return last_logits(model, batch)
