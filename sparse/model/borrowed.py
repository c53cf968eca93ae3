"""Embeddings that are another model's, frozen, behind learned maps.

    z_0 = M_in T_id          logits = T M_out x         T = (E - mean(E)) / |E - mean(E)|

E is the other model's embedding or unembedding, one row a token, and |X| the root mean square of
the lengths of X's rows. So a row of T has a length of about 1, whatever model it is from. Without
its mean nothing is lost: in z_0 it is a constant, and in the logits it adds the same number to all.
The maps are trained and projected as embeddings are; T is neither. M_in starts at N(0, 0.3^2), and
so do the entries of z_0: the bridges' encoders start at that size too. With a start at 0.02, as of
other weights, a twin learned much more slowly (NOTES.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import SparseGPTConfig


class MapIn(nn.Linear):
    """M_in: a class of its own because its entries start larger than those of other matrices."""

    START = 0.3
    """Standard deviation of its entries at the start."""


class BorrowedEmbedding(nn.Module):
    """z_0 = M_in T_id, in place of an `nn.Embedding`."""

    table: Tensor

    def __init__(self, config: SparseGPTConfig) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(config.vocab_size, config.embedding_width))
        self.map = MapIn(config.embedding_width, config.hidden_size, bias=False)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_resid"]:
        return self.map(F.embedding(ids, self.table))

    @property
    def weight(self) -> Float[Tensor, "vocab d_resid"]:
        """The embedding that table and map amount to."""
        return self.map(self.table)


class BorrowedUnembedding(nn.Module):
    """logits = T M_out x, in place of an `nn.Linear`; T is `other`'s if there is one."""

    def __init__(self, config: SparseGPTConfig, other: BorrowedEmbedding | None) -> None:
        super().__init__()
        self.map = nn.Linear(config.hidden_size, config.embedding_width, bias=False)
        self.other = [] if other is None else [other]  # in a list, so that it is not a submodule
        if other is None:
            self.register_buffer("own", torch.zeros(config.vocab_size, config.embedding_width))

    @property
    def table(self) -> Float[Tensor, "vocab embedding"]:
        return self.other[0].table if self.other else self.get_buffer("own")

    def forward(self, x: Float[Tensor, "*batch d_resid"]) -> Float[Tensor, "*batch vocab"]:
        return F.linear(self.map(x), self.table)

    @property
    def weight(self) -> Float[Tensor, "vocab d_resid"]:
        """The unembedding that table and map amount to."""
        return self.table @ self.map.weight


@torch.no_grad()
def normed_table(rows: Float[Tensor, "vocab embedding"]) -> Float[Tensor, "vocab embedding"]:
    """Return T = (E - mean(E)) / |E - mean(E)| in float32, for the rows E."""
    centred = rows.float() - rows.float().mean(0)
    return centred / centred.square().sum(-1).mean().sqrt()
