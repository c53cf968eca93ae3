"""Opening a dense model, whatever it is given as."""

from pathlib import Path
from typing import Any

from torch import nn

from .model import DenseModel


def as_dense(model: Any) -> DenseModel:
    """Return `model` as a DenseModel: one already, a PreTrainedModel, an nnsight wrapper or a name.

    A wrapper gives the model inside it, and its tokenizer. Raises ValueError for anything else.
    """
    if isinstance(model, DenseModel):
        return model
    if isinstance(model, (str, Path)):
        return DenseModel.from_pretrained(model)
    tokenizer = None
    if type(model).__module__.partition(".")[0] == "nnsight":
        tokenizer = getattr(model, "tokenizer", None)
        model = model._module
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no dense model; pass a DenseModel, a PreTrainedModel, an "
            "nnsight model, or the name or folder of one"
        )
    return DenseModel(model.__dict__.get("original", model), tokenizer)


def tiny() -> DenseModel:
    """Return the built-in dense model: a small trained GPT-2 with its own tokenizer."""
    return DenseModel.from_pretrained("tiny")
