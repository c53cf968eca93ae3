"""Many passes through one model at once: rows may enter at any site and run on together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class JoinedPasses:
    """What SparseGPT can run jointly. Rows do not see each other: joined means in one kernel."""

    @property
    def vocab_size(self: Any) -> int:
        """Number of logits per position."""
        return self.config.vocab_size

    @vocab_size.setter
    def vocab_size(self: Any, n: int) -> None:  # transformers sets it after a resize
        self.config.vocab_size = n

    def joined(
        self: Any,
        entries: Mapping[int, Float[Tensor, "_ _ d_resid"]],
        ids: Mapping[int, Int[Tensor, "_ _"]],
    ) -> dict[int, Float[Tensor, "_ _ d_resid"]]:
        """Return, for every site s of `entries`, the residual z_2L of its rows run on from s.

            unembed(joined({s: z_s, ..})[s], ids_s) = resume(s, z_s, ids_s)    for every site s

        One pass serves all sites: the rows of site s, (rows_s, pos, d_resid), enter there and stay
        to the end. Sites may differ in sequences and in number of rows, not in pos. Gradients flow
        to every entry. Raises ValueError for entries that do not fit.
        """
        if not entries:
            return {}
        _check(entries, ids, self.n_sites, self.config.hidden_size)
        first = entries[min(entries)]
        call = self.model.context(first[:1])  # a mask of one row serves them all
        return self._grow(first[:0], call, entries)[1]

    def residuals_and_joined(
        self: Any,
        ids: Int[Tensor, "batch pos"],
        entries: Mapping[int, Float[Tensor, "_ _ d_resid"]],
        entry_ids: Mapping[int, Int[Tensor, "_ _"]],
    ) -> tuple[list[Float[Tensor, "batch pos d_resid"]], dict[int, Float[Tensor, "_ _ d_resid"]]]:
        """Return `residuals(ids)` and `joined(entries, entry_ids)` from one pass."""
        _check(entries, entry_ids, self.n_sites, self.config.hidden_size, ids.shape[1])
        z, _ = self.model.prepare(self.model.wte(ids))
        return self._grow(z, self.model.context(z[:1]), entries)

    def unembed(
        self: Any, h: Float[Tensor, "*any d_resid"], ids: Int[Tensor, "*any"]
    ) -> Float[Tensor, "*any vocab"]:
        """Return the logits of residuals `h` at the last site, of any tokens in any shape."""
        one = h.reshape(1, -1, h.shape[-1])  # one token d_resid
        return self._head(self.model.finish(one), ids.reshape(1, -1)).reshape(*ids.shape, -1)

    def _grow(
        self: Any, z: Tensor, call: dict, entries: Mapping[int, Tensor]
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Run `z` from site 0, letting entries in; the residuals of its rows, and where all end."""
        n, sites = len(z), sorted(entries)
        seen = []
        for s in range(self.n_sites):
            if s and len(z):
                z = self._step(s - 1, z, call)
            if s in entries:
                first, z = _Joined.apply(z, n, entries[s])  # pyright: ignore
            else:
                first = z if len(z) == n else z[:n].clone()
            seen.append(first)
        ends = z.split([n, *(len(entries[s]) for s in sites)])
        return seen, dict(zip(sites, ends[1:], strict=True))


class _Joined(torch.autograd.Function):
    """[z; entry], and the first n rows of z copied: a view of them would keep all of z alive."""

    @staticmethod
    def forward(ctx, z: Tensor, n: int, entry: Tensor) -> tuple[Tensor, Tensor]:
        ctx.sizes = n, len(z), len(entry)
        ctx.set_materialize_grads(False)
        return z[:n].clone(), torch.cat([z, entry])

    @staticmethod
    def backward(ctx, first, joined):  # pyright: ignore[reportIncompatibleMethodOverride]
        n, n_z, n_entry = ctx.sizes
        if joined is None:
            assert first is not None
            joined = first.new_zeros(n_z + n_entry, *first.shape[1:])
        z, entry = joined.split([n_z, n_entry])
        if first is not None:
            z = torch.cat([z[:n] + first, z[n:]])
        return z, None, entry


def _check(
    entries: Mapping[int, Tensor],
    ids: Mapping[int, Tensor],
    n_sites: int,
    width: int,
    n_pos: int | None = None,
) -> None:
    for s, h in entries.items():
        if not 0 <= s < n_sites:
            raise ValueError(f"SparseGPT.joined: site {s} is outside 0..{n_sites - 1}")
        want = (*ids[s].shape, width) if s in ids else None
        if h.shape != want:
            raise ValueError(
                f"SparseGPT.joined: the rows of site {s} are {tuple(h.shape)}, but their ids and "
                f"width {width} need {want}"
            )
    lengths = {h.shape[1] for h in entries.values()} | (set() if n_pos is None else {n_pos})
    if len(lengths) > 1:
        raise ValueError(
            f"SparseGPT.joined: rows of one pass have {sorted(lengths)} positions; cut them to one "
            "number or run them apart"
        )
