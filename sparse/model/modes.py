"""Contexts that put a model into training or evaluation mode, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .gpt import SparseGPT


@contextmanager
def still(model: SparseGPT) -> Iterator[None]:
    """Put the model in eval mode, without gradients, while the context is open."""
    training, wanted = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put `model` into training or evaluation mode, and back (dropout is off while evaluating)."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
