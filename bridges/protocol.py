"""What a model must offer to be bridged, whichever package it is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class ResidualModel(Protocol):
    """A language model whose residual stream can be read at every site and taken up again.

    `DenseModel` and `SparseGPT` are two; their docstrings say what each method returns.
    """

    @property
    def n_sites(self) -> int: ...

    @property
    def d_resid(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def residuals(
        self, ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None
    ) -> list[Tensor]: ...

    def resume(
        self,
        site: int,
        h: Float[Tensor, "batch pos d_resid"],
        ids: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos vocab"]: ...

    def joined(
        self,
        entries: Mapping[int, Float[Tensor, "_ _ d_resid"]],
        ids: Mapping[int, Int[Tensor, "_ _"]],
    ) -> dict[int, Float[Tensor, "_ _ d_resid"]]: ...

    def unembed(
        self, h: Float[Tensor, "*any d_resid"], ids: Int[Tensor, "*any"]
    ) -> Float[Tensor, "*any vocab"]: ...


@runtime_checkable
class FrozenModel(ResidualModel, Protocol):
    """A `ResidualModel` beside the training: `DenseModel`."""

    model: Any
    """The module inside, which can be moved to a device."""

    @property
    def fingerprint(self) -> str: ...


def fingerprint(model: ResidualModel) -> str:
    """Return a model's own fingerprint, whether it offers it as a method or a property."""
    mark: Any = model.fingerprint  # pyright: ignore[reportAttributeAccessIssue]
    return str(mark() if callable(mark) else mark)
