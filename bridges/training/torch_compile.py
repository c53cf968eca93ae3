"""The heavy parts of a co-training step through torch.compile, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dense import DenseModel
from sparse.model.gpt import SparseGPT

SUBLAYERS = {"attend", "think"}


@contextmanager
def compiled(dense: DenseModel, sparse: SparseGPT, **options: Any) -> Iterator[None]:
    """Run both models' sublayers through `torch.compile(**options)` while the context is open.

    Parameters keep their names and `state_dict` what it holds. Numbers are those of the backend:
    bit for bit with `backend="aot_eager"`, to rounding with inductor. `csr_products` leaves a
    compiled twin alone, so that on a CPU a twin of few weights may be slower than without. The
    dense model stays compiled (`DenseModel.compile`); the twin is left as it was found.
    """
    dense.compile(**options)
    blocks: list[Any] = list(sparse.model.blocks)
    before = [
        {name: vars(block)[name] for name in SUBLAYERS & vars(block).keys()} for block in blocks
    ]
    for block in blocks:  # one sublayer of all blocks is one code object: they share their graphs
        for name in SUBLAYERS:
            own = getattr(type(block), name).__get__(block)
            setattr(block, name, torch.compile(own, **options))
    try:
        yield
    finally:
        for block, held in zip(blocks, before, strict=True):
            for name in SUBLAYERS:
                delattr(block, name)
            vars(block).update(held)
