"""A second device, in the memory of the CPU: its tensors refuse those of the CPU, as CUDA's do.

    with OtherDevice() as device:
        model.to("other")

Inside, "other" is a device of torch. Its tensors hold the numbers of a CPU tensor and compute on
it, so that results can be compared with the CPU's, but an operation on tensors of both devices is
the error that it would be on CUDA. `device.waits` counts where the host reads from the device or
copies to it and waits for that. What it cannot show: CUDA's own kernels, and what is written for
"cuda" by name. It changes torch for the rest of the process, so use it in one of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
TAKE_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
ALL_ALIKE = {aten.cat.default, aten.stack.default}  # take no number of the CPU either


class _Module(_DummyBackendModule):
    """What torch asks of a device beyond its operations."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        pass

    def manual_seed_all(self, *_: Any) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


class Other(Tensor):
    """A tensor of the second device; `inner` is the one of the CPU that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Other:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="other:0",
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("a tensor of the other device was used outside of its context")


class OtherDevice(TorchDispatchMode):
    """While it is open there is a second device, "other"."""

    def __init__(self) -> None:
        super().__init__()
        _register()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = any(isinstance(t, Other) for t in given)
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = "cpu"
            goes = torch.device(wanted).type == "other"
        else:
            goes = there
        if func in COPIES or "copy_from" in str(func):
            source = args[1] if func is aten.copy_.default else args[0]
            goes = isinstance(args[0], Other) if func is aten.copy_.default else goes
            if isinstance(source, Other) != goes and not kwargs.get("non_blocking"):
                self.waits[f"{func} {tuple(source.shape)}"] += 1
        elif there:
            self._check(func, given, args)
        if func in READS and there:
            self.waits[str(func)] += 1
        bare, kw = tree_map(lambda t: t.inner if isinstance(t, Other) else t, (args, kwargs))
        out = func(*bare, **kw)
        if func is aten._local_scalar_dense.default or not goes:
            return out
        known = {id(t.inner): t for t in given if isinstance(t, Other)}  # in place: the same tensor

        def wrapped(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return known[id(t)] if id(t) in known else Other(t)

        return tree_map(wrapped, out)

    def _check(self, func: Any, given: list[Tensor], args: tuple) -> None:
        strangers = [t for t in given if not isinstance(t, Other)]
        if func in TAKE_INDICES and isinstance(args[0], Other):
            if strangers:
                self.waits[f"{func}, indices on the CPU"] += 1
            strangers = [t for t in strangers if t is args[-1]] if len(args) > 2 else []
        if func not in ALL_ALIKE:
            strangers = [t for t in strangers if t.ndim]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got a tensor "
                f"{tuple(strangers[0].shape)} on cpu beside one on other:0"
            )


def _register() -> None:
    if not hasattr(torch, "other"):
        _setup_privateuseone_for_python_backend("other", backend_module=_Module())
        torch.__future__.set_swap_module_params_on_conversion(True)
        _LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
        _LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


# torch.tensor(..., device="other") goes below every mode, and needs these two
_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, dtype=None, **_: Any) -> Other:
    return Other(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    bare = [t.inner if isinstance(t, Other) else t for t in (source, target)]
    bare[1].copy_(bare[0])
    return target
