"""Parameters split among the processes of a run, by torch's `fully_shard` (FSDP2).

Each process holds some rows (its *shard*) of every tensor, with their gradients and Adam's moments.
The whole tensors are gathered for a forward and backward pass, and freed after it.

`fully_shard` gathers the parameters of a module when the module's `forward` is called. Here it is
applied to the outermost trainable module alone, and all parameters are gathered together: the
modules inside are called by methods other than `forward` (such as `Block.attend`), which would not
gather anything.

The projection and the checkpoints need whole tensors and gather them one at a time; the size of a
gradient is summed over the shards. So a sharded run computes what the unsharded one does, up to
rounding.
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
    """An exception that every process raises at the same place.

    `prepared` can then gather the shards before it passes the exception on. Gathering needs all
    processes, so after an exception of one process alone it would wait for ever.
    """


class _Root(nn.Module):
    """A wrapper for `fully_shard`, which changes the class of the module that it is given.

    Wrapped, the trained module keeps its own class.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up in each process without exchanging them while the context is open.

        `Accelerator.no_sync` calls this method.
        """
        assert isinstance(self, FSDPModule)
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)


@contextmanager
def prepared(module: nn.Module, accelerator: Accelerator, shard: bool) -> Iterator[nn.Module]:
    """Yield the module to call in place of `module` while processes train it together.

    With `shard`, or with an accelerator that was launched with FSDP2, the parameters are sharded
    while the context is open; those of process 0 are the start. When the context closes they are
    plain tensors again, whole in every process. They stay sharded after an exception other than
    AllStop, because one process may have met it alone, and gathering needs all.

    Without sharding, the accelerator prepares the module. Raises ValueError for the first version
    of FSDP, for its offloading to the CPU, and for sharding in fp16.
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
    for m, name, before in hooks:  # the hooks that `fully_shard` added would keep the shards alive
        getattr(m, name).clear()
        getattr(m, name).update(before)
    if stopped:
        raise stopped


@torch.no_grad()
def _make_plain(module: nn.Module) -> None:
    """Replace every sharded parameter of `module` by its whole tensor; tied ones stay tied."""
    plain: dict[DTensor, nn.Parameter] = {}
    for m in module.modules():
        for name, p in list(m._parameters.items()):
            if isinstance(p, DTensor):
                if p not in plain:
                    plain[p] = nn.Parameter(p.full_tensor(), p.requires_grad)
                setattr(m, name, plain[p])


@contextmanager
def gathered(wrapped: nn.Module) -> Iterator[None]:
    """Keep the parameters whole while the context is open, so that any method can be called.

    Every process must enter it. Changes made to the parameters inside are lost. Without sharding
    it does nothing.
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
    """Yield the whole tensor of `weight` for changes in place, which its shards get afterwards.

    Every process must enter it and make the same changes. A tensor that is not sharded is yielded
    as it is.
    """
    if not isinstance(weight, DTensor):
        yield weight
        return
    with torch.no_grad():
        full = weight.full_tensor()
    yield full
    with torch.no_grad():
        weight.copy_(split_like(full, weight))


def split_like(full: Tensor, like: Tensor) -> Tensor:
    """Return `full` on the device of `like`, and sharded as `like` is, if it is."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    copies = DTensor.from_local(full, like.device_mesh, [Replicate()], run_check=False)
    return torch.empty_like(like).copy_(copies.redistribute(placements=like.placements))


def whole(named: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return the whole tensors on the CPU; without `keep`, return an empty dict.

    Every process must call this, since each gives its shards; only the one that writes them needs
    to `keep` them. Tied tensors are copied, one for each name, because a safetensors file does not
    take two names of the same memory.
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
    """Return this process's part of every tensor: a view of its shard, or the tensor itself."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def sum_over_shards(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return x summed over the processes that share `tensors`, or x if they are not sharded."""
    if tensors and isinstance(tensors[0], DTensor):
        dist.all_reduce(x, group=tensors[0].device_mesh.get_group())
    return x
