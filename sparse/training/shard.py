"""Parameters split among the processes of a run: each holds its rows of every tensor, with their
gradients and moments, and all are gathered for a pass and let go after it.

This is torch's `fully_shard` (FSDP2) at the root of the one trainable module. Its inner modules are
called by other methods than forward, so they are no roots of their own. What is written, logged or
projected is of whole tensors, gathered one at a time: a sharded run is the unsharded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class AllStop(Exception):
    """Raised by every process at the same place: what was sharded becomes whole again."""


class _Root(nn.Module):
    """What `fully_shard` takes, so that the trained module stays of its class."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up in each process; `Accelerator.no_sync` asks for this."""
        assert isinstance(self, FSDPModule)
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)


@contextmanager
def prepared(module: nn.Module, accelerator: Accelerator, shard: bool) -> Iterator[nn.Module]:
    """Yield what to call instead of `module` where several processes train it together.

    With `shard`, or an accelerator that was launched with FSDP2, its parameters are sharded while
    the context is open; all start from those of process 0. When it closes they are plain tensors
    again, whole in every process; after an exception that is no AllStop, which one process may have
    met alone, they stay sharded. Raises ValueError for the first version of FSDP, its offloading,
    and fp16.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type == DistributedType.FSDP and plugin is not None:
        if plugin.fsdp_version != 2 or isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError(
                "of FSDP only version 2 without offloading is done here; launch with "
                "`--fsdp_version 2 --fsdp_offload_params false`"
            )
        shard = True
    if not shard or not dist.is_initialized():
        yield accelerator.prepare_model(module)
        return
    if accelerator.scaler is not None:
        raise ValueError(
            "sharded parameters are not trained in fp16, whose loss scaling would see one shard's "
            "overflow; take mixed_precision='bf16'"
        )
    hooks = [(m, name, dict(getattr(m, name))) for m in module.modules() for name in HOOKS]
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    root = _Root(module)
    as_fsdp = fully_shard(root, mesh=mesh, reshard_after_forward=False)
    stopped = None
    try:
        yield root
    except AllStop as stop:
        stopped = stop
    as_fsdp.reshard()
    _make_plain(module)
    for m, name, before in hooks:  # those of `fully_shard` would keep the shards alive
        getattr(m, name).clear()
        getattr(m, name).update(before)
    if stopped:
        raise stopped


@torch.no_grad()
def _make_plain(module: nn.Module) -> None:
    """Put whole tensors where the shards are; tied parameters stay tied."""
    plain: dict[DTensor, nn.Parameter] = {}
    for m in module.modules():
        for name, p in list(m._parameters.items()):
            if isinstance(p, DTensor):
                if p not in plain:
                    plain[p] = nn.Parameter(p.full_tensor(), p.requires_grad)
                setattr(m, name, plain[p])


@contextmanager
def gathered(wrapped: nn.Module) -> Iterator[None]:
    """Hold the whole parameters while the context is open; their module can be called anyhow.

    Every process enters it. Changes to the parameters are lost.
    """
    if not isinstance(wrapped, FSDPModule):
        yield
        return
    wrapped.unshard()
    try:
        yield
    finally:
        wrapped.reshard()


@contextmanager
def whole_(weight: Tensor) -> Iterator[Tensor]:
    """Yield the whole of `weight`, and afterwards write its own rows back into every shard."""
    if not isinstance(weight, DTensor):
        yield weight
        return
    with torch.no_grad():
        full = weight.full_tensor()
    yield full
    with torch.no_grad():
        weight.copy_(split_like(full, weight))


def split_like(full: Tensor, like: Tensor) -> Tensor:
    """Return `full` on the device of `like`, and as this process's shard where `like` is one."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    copies = DTensor.from_local(full, like.device_mesh, [Replicate()], run_check=False)
    return torch.empty_like(like).copy_(copies.redistribute(placements=like.placements))


def whole(named: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the CPU, or, where not to `keep`, none. Every process calls this.

    Tied tensors come as copies, each under its name, as a file of safetensors wants them.
    """
    kept, seen = {}, set()
    for name, tensor in named.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            full = full.detach().cpu()
            kept[name] = full.clone() if full.data_ptr() in seen else full
            seen.add(full.data_ptr())
    return kept


def own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's part of every tensor: a view of its shard, or the tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def sum_over_shards(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of x over the processes among which `tensors` are split."""
    if tensors and isinstance(tensors[0], DTensor):
        dist.all_reduce(x, group=tensors[0].device_mesh.get_group())
    return x
