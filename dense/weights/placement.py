"""Where accelerate places the weights of a model, and how to read them there.

`device_map` spreads a model over devices, and offloading keeps weights in CPU memory or in files.
Then a hook on a module (`_hf_hook`) brings its weights and its arguments to one device before the
module runs, and puts offloaded weights away after it. Between two runs an offloaded weight is on
torch's device "meta": it has a shape and a dtype, and no numbers.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def is_placed(model: nn.Module) -> bool:
    """Return whether accelerate decides on which devices the weights of a model are."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module that holds a `weight` computes."""
    weight: Any = module.weight
    if not weight.is_meta:
        return weight.device
    return next(torch.device(hook.execution_device) for hook in _offloading(module))


def stored(model: nn.Module, name: str, t: Tensor) -> Tensor:
    """Return `t`, the parameter or buffer of `model` called `name`, with its numbers.

    Those of an offloaded one are read from where they are kept, in CPU memory or in a file. The
    hook of the module that has it knows them, or that of a module around this one.
    """
    if not t.is_meta:
        return t
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        for hook in _offloading(model.get_submodule(".".join(parts[:depth]))):
            with suppress(KeyError):  # each hook knows the weights of its own module
                return hook.weights_map[".".join(parts[depth:])].to(t.dtype)
    raise ValueError(
        f"{name} is on the device meta, and no hook of accelerate knows its numbers; load the "
        "model's weights, with from_pretrained"
    )


def copies(model: Any) -> set[str]:
    """Return the names of parameters of a placed model that are another parameter by other names.

    An unembedding tied to the embedding is one parameter with two names, until the model is placed:
    then each name has its own.
    """
    return set(model.all_tied_weights_keys) if is_placed(model) else set()


def _offloading(module: nn.Module) -> list[Any]:
    """Return the hooks of a module, several where accelerate chained them, that offload weights."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)]
