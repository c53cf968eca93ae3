"""Contexts that run a model in another mode and put it back into its own when they close."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .blocks import Block

SUBLAYERS = ("attend", "think")


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put `model` into training or evaluation mode (dropout is off while evaluating)."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode with all its parameters frozen (no gradients for them)."""
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with mode(model, training=False):
            yield
    finally:
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)


@contextmanager
def compiled_sublayers(blocks: Iterable[Block], **options: Any) -> Iterator[None]:
    """Run the sublayers of `blocks` through `torch.compile(**options)`; such contexts may nest.

    `Block.attend` is one function for all blocks, and so is `Block.think`, so the blocks share the
    compiled graphs. While the context is open, `sublayers_compiled` is true on every block, and
    `sparse.ops.csr_linear.csr_products` leaves the matrix products of such a model alone.
    """
    changed = []
    for block in blocks:
        names = (*SUBLAYERS, "sublayers_compiled")
        changed.append((block, {n: vars(block)[n] for n in names if n in vars(block)}))
        for name in SUBLAYERS:
            own = getattr(type(block), name).__get__(block)
            setattr(block, name, torch.compile(own, **options))
        block.sublayers_compiled = True
    try:
        yield
    finally:
        for block, held in changed:
            for name in SUBLAYERS:
                delattr(block, name)
            block.sublayers_compiled = False
            vars(block).update(held)
