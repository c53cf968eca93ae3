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

    The names of the parameters and the contents of `state_dict` do not change. The numbers are the
    same bit for bit with `backend="aot_eager"`, and the same up to rounding with inductor. A
    compiled twin does not use the sparse products of `csr_products`, so on a CPU a twin with few
    nonzero weights may be slower compiled than not. When the context closes, the twin is as it
    was before, while the dense model stays compiled (`DenseModel.compile`).

    >>> from bridges import compiled, load_run
    >>> run = load_run("tiny")
    >>> with compiled(run.dense, run.sparse, backend="eager"):
    ...     logits = run.sparse(run.heldout()[:1]).logits
    """
    dense.compile(**options)
    with sparse.compile_sublayers(**options):
        yield
