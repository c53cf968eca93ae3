"""Open a dense model from whatever it is given as."""

from pathlib import Path
from typing import Any

from torch import nn

from .model import DenseModel
from .opening.load import load_config, refuse_unsuitable


def as_dense(model: Any) -> DenseModel:
    """Return `model` as a DenseModel.

    `model` may be a DenseModel, a PreTrainedModel, an nnsight wrapper of one (whose tokenizer is
    kept), or a name or folder. Raises ValueError for anything else.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from dense import as_dense
    >>> shape = dict(n_layer=1, n_embd=32, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0)
    >>> as_dense(GPT2LMHeadModel(GPT2Config(**shape))).n_sites
    3
    """
    if isinstance(model, DenseModel):
        return model
    if isinstance(model, (str, Path)):
        return DenseModel.from_pretrained(model)
    return DenseModel(*_inside(model))


def config_of(model: Any) -> Any:
    """Return the Hugging Face config of what `as_dense` takes, without opening a model.

    >>> from dense import config_of
    >>> config_of("tiny").hidden_size
    128
    """
    if isinstance(model, DenseModel):
        return model.model.config
    if isinstance(model, (str, Path)):
        return load_config(model)
    module, _ = _inside(model)
    refuse_unsuitable(module)
    return module.config


def _inside(model: Any) -> tuple[Any, Any]:
    """Return the torch module that a model is or wraps, and a tokenizer that came with it."""
    tokenizer = None
    if type(model).__module__.partition(".")[0] == "nnsight":
        tokenizer = getattr(model, "tokenizer", None)
        model = model._module
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no dense model; pass a DenseModel, a PreTrainedModel, an "
            "nnsight model, or the name or folder of one"
        )
    return model.__dict__.get("original", model), tokenizer


def tiny() -> DenseModel:
    """Return the built-in dense model: a small trained GPT-2 with its own tokenizer.

    >>> from dense import tiny
    >>> print(tiny())  # doctest: +ELLIPSIS
    tiny (gpt2): 2 layers, 5 residual sites of width 128, after the embeddings, ...
    """
    return DenseModel.from_pretrained("tiny")
