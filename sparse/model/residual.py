"""The residual stream of a weight-sparse GPT: read it at every site, run the model on from any.

    residuals(ids)                  [z_0 .. z_2L]
    resume(s, z_s, ids)             the logits of the model run on from z_s, at all positions or
                                    at some
    joined({s: z_s, ..}, {s: ids})  the last residuals of rows that enter at several sites, in one
                                    pass
    last_logits(ids, t)             the logits at one position of every row, and no others
    unembed(z_2L, ids)              the logits of last residuals

z_s is the residual at site s: site 0 is after the embeddings, 2i+1 after attention i, 2i+2 after
MLP i (docs/method.md#sites). trunk.py computes the stream; gpt.py adds the head, which turns last
residuals into logits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .blocks import Block, picked
from .trunk import SparseGPTModel, SparseGPTPreTrainedModel

Entry = Tensor | Callable[[Tensor], Tensor]
"""Rows that enter a pass at a site, or a function of the residuals there that returns them."""


class ResidualAccess(SparseGPTPreTrainedModel):
    """A trunk `model` and a head that a subclass gives, with access to the residual stream.

    A row is one sequence. Rows that are joined in one pass share its kernels, but do not see each
    other.
    """

    model: SparseGPTModel

    @abstractmethod
    def _head(
        self, normed: Tensor, ids: Tensor | None, keep: slice | Tensor = slice(None)
    ) -> Tensor:
        """Return the logits for `normed`, which `SparseGPTModel.finish` returned.

        `ids` are the tokens at its positions; with `keep`, those at all positions, of which `keep`
        chooses the ones of `normed`.
        """

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        return self.config.vocab_size

    @vocab_size.setter
    def vocab_size(self, n: int) -> None:  # transformers sets it after a resize
        self.config.vocab_size = n

    @property
    def n_sites(self) -> int:
        """Number of residual sites, 2L+1."""
        return 2 * self.config.num_hidden_layers + 1

    @property
    def d_resid(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    def residuals(
        self, ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None
    ) -> list[Float[Tensor, "batch pos d_resid"]]:
        """Return the residual stream at every site, [z_0 .. z_2L]."""
        return self._run(0, *self.model.prepare(self.model.wte(ids), attention_mask))

    def resume(
        self,
        site: int,
        h: Float[Tensor, "batch pos d_resid"],
        ids: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        positions: Int[Tensor, "batch wanted"] | None = None,
    ) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch wanted vocab"]:
        """Return the logits of the model when it runs on from residual `h` at `site`.

            resume(s, residuals(ids)[s], ids) = the logits of ids    for every site s

        `ids` are the tokens that `h` belongs to; the bigram table needs them. Nothing before the
        site is computed. With `positions`, which are columns of `ids` in any order, only the logits
        there are computed, at position positions[b, i] of every row b, and of the last layer only
        what they need (`last_logits`). Raises ValueError for a site or a position that is not
        there, or where the shape of `h` does not fit `ids` and the model's width.
        """
        if not 0 <= site < self.n_sites:
            raise ValueError(f"SparseGPT.resume: site {site} is outside 0..{self.n_sites - 1}")
        if h.shape != (*ids.shape, self.d_resid):
            raise ValueError(
                f"SparseGPT.resume: h is {tuple(h.shape)}, but ids {tuple(ids.shape)} and width "
                f"{self.d_resid} need {(*ids.shape, self.d_resid)}"
            )
        call = self.model.context(h, attention_mask)
        if positions is not None:
            return self._logits_at(positions, site, h, call, ids)
        return self._head(self.model.finish(self._run(site, h, call)[-1]), ids)

    def unembed(
        self, h: Float[Tensor, "*any d_resid"], ids: Int[Tensor, "*any"]
    ) -> Float[Tensor, "*any vocab"]:
        """Return the logits of residuals `h` at the last site.

        `ids` are their tokens; both may have any leading shape, since no token sees another here.
        """
        one = h.reshape(1, -1, h.shape[-1])  # one token d_resid
        return self._head(self.model.finish(one), ids.reshape(1, -1)).reshape(*ids.shape, -1)

    def last_logits(
        self, ids: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return the logits at position last[b] of every row b.

        In the last layer, the query of attention and all that follows it are run at those positions
        only, and so is the unembedding. In that layer node values are (batch, 1, width), except at
        attn.act_in, attn.k and attn.v, which are needed at every position before. Padding after
        position last[b] needs no mask, since that position does not see it. Raises ValueError for a
        position that is not there.
        """
        z, call = self.model.prepare(self.model.wte(ids))
        return self._logits_at(last[:, None], 0, z, call, ids).squeeze(1)

    def joined(
        self,
        entries: Mapping[int, Float[Tensor, "_ _ d_resid"]],
        ids: Mapping[int, Int[Tensor, "_ _"]],
    ) -> dict[int, Float[Tensor, "_ _ d_resid"]]:
        """Return {s: last residuals z_2L of the rows that enter at site s} for s in `entries`.

            unembed(joined({s: z_s, ..}, {s: ids_s, ..})[s], ids_s) = resume(s, z_s, ids_s)

        for every site s. One pass serves all sites: the rows entries[s], (rows_s, pos, d_resid),
        enter it at site s and stay to the end. Sites may differ in their sequences and in the
        number of rows, but not in pos. Gradients flow to every entry. Raises ValueError for a site
        that is not there and for shapes that do not fit.
        """
        if not entries:
            return {}
        self._check_entries(entries, ids)
        first = entries[min(entries)]
        call = self.model.context(first[:1])  # the mask of one row serves all rows
        return self._grow(first[:0], call, entries)[1]

    def residuals_and_joined(
        self,
        ids: Int[Tensor, "batch pos"],
        entries: Mapping[int, Entry],
        entry_ids: Mapping[int, Int[Tensor, "_ _"]],
    ) -> tuple[list[Float[Tensor, "batch pos d_resid"]], dict[int, Float[Tensor, "_ _ d_resid"]]]:
        """Return `residuals(ids)` and `joined(entries, entry_ids)` from one pass.

        An entry may also be a function that gets z_s, the residuals of `ids` at its site, and
        returns the rows that enter there.
        """
        self._check_entries(entries, entry_ids, ids.shape[1])
        z, _ = self.model.prepare(self.model.wte(ids))
        return self._grow(z, self.model.context(z[:1]), entries)

    def _block(self, layer: int) -> Block:
        block = self.model.blocks[layer]
        assert isinstance(block, Block)
        return block

    def _run(self, site: int, z: Tensor, call: dict) -> list[Tensor]:
        """Return the residuals from `site` to the last, starting at `z`."""
        sites = [z]
        for s in range(site, self.n_sites - 1):
            z = self._step(s, z, call)
            sites.append(z)
        return sites

    def _logits_at(
        self, at: Tensor, site: int, z: Tensor, call: dict, ids: Tensor
    ) -> Float[Tensor, "batch wanted vocab"]:
        """Return the logits at positions `at` of the model run on from `z` at `site`.

        The last sublayers, as many as are left, are run at these positions only.
        """
        _check_positions(at, ids)
        at = at.long()
        final, attends = self._block(-1), self.n_sites - 3  # the site that its attention reads
        for s in range(site, attends):
            z = self._step(s, z, call)
        beside = call["positions"]
        if site <= attends:
            z = final.attend(z, beside, at, attention_mask=_seen_from(at, call, z))
        else:
            z = picked(z, at)
        if site <= attends + 1:
            beside = None if beside is None else picked(beside.expand(len(ids), -1, -1), at)
            z = final.think(z, beside)
        return self.unembed(z, ids.gather(1, at))

    def _step(self, s: int, z: Tensor, call: dict) -> Tensor:
        """Return the residual at site s + 1 from that at site s."""
        block = self._block(s // 2)
        return block.think(z, call["positions"]) if s % 2 else block.attend(z, **call)

    def _grow(
        self, z: Tensor, call: dict, entries: Mapping[int, Entry]
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Run `z` on from site 0, and let the rows of `entries` in at their sites.

        Returns the residuals of the rows of `z` at every site, and {s: last residuals of the rows
        that entered at s}.
        """
        n, sizes = len(z), {}
        seen = []
        for s in range(self.n_sites):
            if s and len(z):
                z = self._step(s - 1, z, call)
            if s in entries:
                given = entries[s]
                entry = given if isinstance(given, Tensor) else given(z[:n])
                sizes[s] = len(entry)
                first, z = _Joined.apply(z, n, entry)  # pyright: ignore
            else:
                first = z if len(z) == n else z[:n].clone()
            seen.append(first)
        ends = z.split([n, *sizes.values()])
        return seen, dict(zip(sizes, ends[1:], strict=True))

    def _check_entries(
        self, entries: Mapping[int, Entry], ids: Mapping[int, Tensor], n_pos: int | None = None
    ) -> None:
        """Raise ValueError unless every entry has a site of the model, ids of its shape, and as
        many positions as the others (and as `n_pos`, where given).

        The shape of an entry that is a function is not known yet.
        """
        for s in entries:
            if not 0 <= s < self.n_sites:
                raise ValueError(f"SparseGPT.joined: site {s} is outside 0..{self.n_sites - 1}")
        given = {s: h for s, h in entries.items() if isinstance(h, Tensor)}
        for s, h in given.items():
            want = (*ids[s].shape, self.d_resid) if s in ids else None
            if h.shape != want:
                raise ValueError(
                    f"SparseGPT.joined: the rows of site {s} are {tuple(h.shape)}, but their ids "
                    f"and width {self.d_resid} need {want}"
                )
        lengths = {h.shape[1] for h in given.values()}
        if n_pos is not None:
            lengths.add(n_pos)
        if len(lengths) > 1:
            raise ValueError(
                f"SparseGPT.joined: rows of one pass have {sorted(lengths)} positions; cut them to "
                "one number or run them apart"
            )


def _seen_from(at: Int[Tensor, "batch wanted"], call: dict, z: Tensor) -> Tensor:
    """Return the attention mask of the queries at positions `at`, (batch 1 wanted pos)."""
    mask, n_pos = call["attention_mask"], z.shape[1]
    if mask is None:  # causal, nothing padded
        return (torch.arange(n_pos, device=z.device) <= at[..., None])[:, None]
    rows = at[:, None, :, None].expand(-1, mask.shape[1], -1, n_pos)
    return mask.expand(len(at), -1, -1, -1).gather(2, rows)


def _check_positions(at: Tensor, ids: Tensor) -> None:
    """Raise ValueError unless `at` is (batch, wanted) and holds positions that `ids` have.

    On an accelerator the range is checked there, without waiting for the result; a wrong position
    then stops the program.
    """
    n_rows, n_pos = ids.shape
    whole = not (at.is_floating_point() or at.dtype == torch.bool)
    if at.ndim != 2 or len(at) != n_rows or not at.numel() or not whole:
        raise ValueError(
            f"SparseGPT: positions are {at.dtype} {tuple(at.shape)}, but {n_rows} rows need whole "
            f"numbers of shape ({n_rows}, 1 or more); for one position a row, last, give "
            "last[:, None]"
        )
    inside = ((at >= 0) & (at < n_pos)).all()
    if at.device.type != "cpu":
        says = f"SparseGPT: there are positions outside 0..{n_pos - 1}"
        torch._assert_async(inside, says)  # pyright: ignore[reportPrivateImportUsage]
    elif not inside:
        raise ValueError(
            f"SparseGPT: positions range over {int(at.min())}..{int(at.max())}, but the ids have "
            f"0..{n_pos - 1}; count from the first column, padding included"
        )


class _Joined(torch.autograd.Function):
    """Return a copy of the first n rows of z, and [z; entry].

    The rows are copied because a view of them would keep all of z in memory.
    """

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
