"""The methods that a model must have to be bridged, whichever package it is from.

They are written down as protocols, so that `dense` and `sparse` need not know each other: a model
fits because it has these methods, not because it inherits from a class here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class ResidualModel(Protocol):
    """A language model whose residual stream can be read at every site and run on from any site.

    A site is a place in the residual stream (`BridgeConfig` says how they are numbered).
    `DenseModel` and `SparseGPT` are two such models; their docstrings say what each method returns.
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
        *,
        positions: Int[Tensor, "batch wanted"] | None = None,
    ) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch wanted vocab"]: ...

    def last_logits(
        self, ids: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]: ...

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
    """A `ResidualModel` that is used in training but not itself trained, such as `DenseModel`."""

    model: Any
    """The torch module inside."""

    def to(self, device: torch.device | str) -> None: ...

    @property
    def fingerprint(self) -> str: ...


def fingerprint(model: ResidualModel) -> str:
    """Return a model's own fingerprint, a hash of its weights and shape.

    `SparseGPT.fingerprint` is a method and `DenseModel.fingerprint` a property; this reads both.
    """
    mark: Any = model.fingerprint  # pyright: ignore[reportAttributeAccessIssue]
    return str(mark() if callable(mark) else mark)
