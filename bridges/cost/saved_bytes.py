"""What the forward pass of a training step keeps for its backward pass, in bytes.

They are counted by running the models' own code on fake tensors, which have a shape but no
contents. So nothing is computed, and no family of models needs a formula of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import mse_loss

from bridges.maps.bridge import BridgeSet
from sparse.model.gpt import SparseGPT


class SavedBytes(NamedTuple):
    """Bytes that the forward pass keeps for the backward pass."""

    of_row: float
    """Bytes per row; a row is a sequence of the planned length."""
    once: float
    """Bytes that do not depend on the number of rows: the 16-bit copies of parameters that
    autocast makes. The parameters themselves are not counted."""


def twin_saved(
    sparse: SparseGPT, length: int, mixed_precision: str
) -> tuple[SavedBytes, SavedBytes]:
    """Return what one attention sublayer of the twin keeps, and what one MLP sublayer keeps."""
    d = sparse.d_resid

    def sublayer(name: str) -> SavedBytes:
        def run(block: Any, rows: int) -> None:
            z = torch.empty(rows, length, d, requires_grad=True)
            beside = sparse.config.position_channels
            positions = torch.empty(1, length, beside) if beside else None
            getattr(type(block), name)(block, z, positions)  # not what `compiled` put on the twin

        return saved_bytes(sparse.model.blocks[0], run, mixed_precision)

    return sublayer("attend"), sublayer("think")


def dense_saved(model: nn.Module, length: int, mixed_precision: str) -> SavedBytes:
    """Return what all layers of the dense model together keep."""
    width = model.get_input_embeddings().weight.shape[1]  # pyright: ignore

    def run(copied: Any, rows: int) -> None:
        h = torch.empty(rows, length, width, requires_grad=True)
        copied.requires_grad_(False).eval()(inputs_embeds=h, use_cache=False, logits_to_keep=1)

    return saved_bytes(model, run, mixed_precision)


def site_saved(bridges: BridgeSet, length: int, mixed_precision: str) -> SavedBytes:
    """Return what one bridged site keeps: h, the outputs of encoder and decoder, their errors.

    z is left out, since the twin's own layers keep it.
    """
    c = bridges.config

    def run(copied: Any, rows: int) -> Any:
        h = torch.empty(rows, length, c.d_dense)
        z = torch.empty(rows, length, c.d_sparse, requires_grad=True)
        up, down = copied.encode(c.sites[0], h), copied.decode(c.sites[0], z)
        return mse_loss(up.float(), z.detach()), mse_loss(down, h), up, down, h

    found = saved_bytes(bridges, run, mixed_precision)
    return SavedBytes(found.of_row - 4 * length * c.d_sparse, found.once)


def saved_bytes(
    module: nn.Module, run: Callable[[Any, int], Any], mixed_precision: str
) -> SavedBytes:
    """Return what `run(module, rows)` keeps for the backward pass, without computing anything.

    It is run for one row and for two, on a fake copy of the module; the difference is what a row
    takes.
    """
    with FakeTensorMode():
        fake = _without_contents(module)
        mine = {_storage(t) for t in (*fake.parameters(), *fake.buffers())}
        dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
        sizes = []
        for rows in (1, 2):
            with torch.autocast("cpu", dtype, enabled=mixed_precision != "no"):
                found, _ = saved(lambda n=rows: run(fake, n))
            sizes.append(sum(n for key, n in found.items() if key not in mine))
    return SavedBytes(sizes[1] - sizes[0], 2 * sizes[0] - sizes[1])


def saved(run: Callable[[], Any]) -> tuple[dict[int, int], Any]:
    """Return the bytes of every storage that autograd keeps of `run()`, and what `run` returns."""
    sizes: dict[int, int] = {}
    alive = []  # holds every tensor, so that no new storage gets the address of a freed one

    def note(t: Tensor) -> Tensor:
        alive.append(t)
        sizes[_storage(t)] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        return sizes, (run(), alive)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _without_contents(module: nn.Module) -> Any:
    """Return a copy whose tensors have a shape and a dtype but no contents.

    Call it under a FakeTensorMode. Hooks by which accelerate would bring contents do nothing on it.
    """
    memo: dict[int, Any] = {
        id(m._hf_hook): ModelHook() for m in module.modules() if hasattr(m, "_hf_hook")
    }
    for p in module.parameters():
        empty = torch.empty(p.shape, dtype=p.dtype)
        memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype)
    return copy.deepcopy(module, memo)
