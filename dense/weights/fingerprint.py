"""The fingerprint of a dense model: a hash of its weights and the config fields that shape it."""

import hashlib
from typing import Any

import torch

from .placement import copies, stored

_SHAPING = (  # config fields that, with the weights, decide what the model computes; else None
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim intermediate_size n_inner max_position_embeddings hidden_act activation_function "
    "layer_norm_epsilon layer_norm_eps rms_norm_eps sliding_window layer_types"
).split()


def fingerprint(model: Any) -> str:
    """Return the sha256 of the weights and of the config fields that decide what is computed.

    It covers name, dtype, shape and bytes of every parameter and of every buffer that is saved,
    such as quantised weights. Names and paths of files do not matter, nor does where the weights
    are: those that accelerate keeps in CPU memory or in files are read from there.
    """
    config = model.config.get_text_config()
    digest = hashlib.sha256()
    for field in _SHAPING:
        digest.update(f"{field}={getattr(config, field, None)}\n".encode())
    saved = model.state_dict(keep_vars=True).keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    tensors = dict(model.named_parameters()) | buffers
    for name in sorted(tensors.keys() - copies(model)):
        p: Any = stored(model, name, tensors[name])
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
