"""Contexts in which a model runs in another mode; when they close it is as it was found."""

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
    """Put `model` in evaluation mode, and let none of its parameters ask for a gradient."""
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
    """Run the sublayers of `blocks` through `torch.compile(**options)`; contexts nest.

    One sublayer of all blocks is one code object, so the blocks share their graphs. A block says
    that it is compiled (`sublayers_compiled`), so that who would replace its products keeps off.
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
