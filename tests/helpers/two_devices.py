"""Run a model whose blocks are on two devices in turn: python -m tests.helpers.two_devices NAMES

The devices "two:0" and "two:1" are names that fake tensors bear. Nothing is computed, but torch
refuses every operation on tensors of both. It is a program of its own because a process can name
its devices once.
"""

import sys

import pytest
import torch
import torch.utils.backend_registration as backends
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from dense import DenseModel
from tests.dense.conftest import build
from tests.helpers.placed import device_map

FIRST = "two:0"


def spread(model, blocks):
    """Replace all weights by fake ones, those of block k on device k % 2 and the rest on FIRST."""
    where = device_map(model, blocks, lambda k: f"two:{k % 2}", FIRST)
    for path, module in model.named_modules():
        at = next((d for p, d in where.items() if f"{path}.".startswith(f"{p}.")), FIRST)
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device=at)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=at)
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = torch.device(at)


def passes(dense, ids):
    """Yield what every kind of pass returns."""
    h, y = dense.residuals_and_logits(ids)
    yield from (*h, y, dense.logits(ids, positions=ids[:, :2]))
    yield from (dense.resume(site, x, ids) for site, x in enumerate(h))
    yield from dense.joined(dict(enumerate(h)), dict.fromkeys(range(len(h)), ids)).values()
    yield dense.hookable()(**dense.inputs(ids)).logits


def devices(family, hooks):
    """Return the devices on which a model with or without accelerate's hooks gives its results."""
    model = build(family)
    model.set_attn_implementation("eager")  # masks are made, whatever is in them
    blocks = DenseModel(model).layout.path
    if hooks:
        where = device_map(model, blocks, lambda k: "cpu", "cpu")
        model = dispatch_model(model, where, force_hooks=True)
    dense = DenseModel(model)
    with FakeTensorMode():
        spread(model, blocks)
        ids = torch.zeros(3, 10, dtype=torch.long, device=FIRST)
        return {x.device for x in passes(dense, ids)}


def main():
    backends._setup_privateuseone_for_python_backend("two")
    for family in sys.argv[1:]:
        assert devices(family, hooks=True) == {torch.device(FIRST)}
        with pytest.raises(FakeTensorDeviceMismatchError):  # control: mixing would be seen
            devices(family, hooks=False)


if __name__ == "__main__":
    main()
