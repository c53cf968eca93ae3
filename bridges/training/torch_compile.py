"""The heavy parts of a co-training step through torch.compile, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dense import DenseModel
from sparse.model.gpt import SparseGPT


@contextmanager
def compiled(dense: DenseModel, sparse: SparseGPT, **options: Any) -> Iterator[None]:
    """Run both models' sublayers through `torch.compile(**options)` while the context is open.

    Parameters keep their names and `state_dict` what it holds. Numbers are those of the backend:
    bit for bit with `backend="aot_eager"`, to rounding with inductor. `csr_products` leaves a
    compiled twin alone, so that on a CPU a twin of few weights may be slower than without. The
    dense model stays compiled (`DenseModel.compile`); the twin is left as it was found.

    >>> from bridges import compiled, load_run
    >>> run = load_run("tiny")
    >>> with compiled(run.dense, run.sparse, backend="eager"):
    ...     logits = run.sparse(run.heldout()[:1]).logits
    """
    dense.compile(**options)
    with sparse.compile_sublayers(**options):
        yield
