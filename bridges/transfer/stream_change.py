"""What moving nodes of the sparse model changes in its residual stream.

    dz_s = z'_s - z_s    at every sparse site s: z clean, z' with the nodes held or replaced

Here s is a sparse site. One clean run and one changed run give dz at every site. Replacing nodes by
their values on other prompts costs a third run, on those prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sparse.circuits.mask import masked
from sparse.circuits.taps import edited, recorded
from sparse.model.gpt import SparseGPT

Chosen = Mapping[str, Bool[Tensor, " _"]]
"""Which nodes are moved: location to a mask over its nodes."""
Ids = Int[Tensor, "batch pos"]
Mask = Shaped[Tensor, "batch pos"] | None
Change = Float[Tensor, "batch pos d_sparse"]


@torch.no_grad()
def ablated(
    sparse: SparseGPT,
    ids: Ids,
    chosen: Chosen,
    values: Mapping[str, Tensor],
    attention_mask: Mask = None,
    *,
    clean: list[Tensor] | None = None,
) -> list[Change]:
    """Return dz at every site when the chosen nodes are held at `values`; 0 at padding.

    `clean` are the residuals of `ids` without any change, if they are known already.
    """
    with masked(sparse, {at: ~held for at, held in chosen.items()}, values):
        after = sparse.residuals(ids, attention_mask)
    before = sparse.residuals(ids, attention_mask) if clean is None else clean
    return _differences(after, before, attention_mask)


@torch.no_grad()
def replaced(
    sparse: SparseGPT,
    ids: Ids,
    source_ids: Ids,
    chosen: Chosen,
    attention_mask: Mask = None,
    *,
    there: Mapping[str, Tensor] | None = None,
    clean: list[Tensor] | None = None,
) -> list[Change]:
    """Return dz at every site when the chosen nodes get their values from a run on `source_ids`.

    `ids` and `source_ids` have the same shape and the same padding. `there` are the values of the
    nodes in that run, and `clean` the residuals of `ids` without any change, if they are known.
    """
    if there is None:
        with recorded(sparse, list(chosen)) as there:
            sparse.residuals(source_ids, attention_mask)
    found = there

    def swap(at: str):
        return lambda x: torch.where(chosen[at], found[at], x)

    with edited(sparse, {at: swap(at) for at in chosen}):
        after = sparse.residuals(ids, attention_mask)
    before = sparse.residuals(ids, attention_mask) if clean is None else clean
    return _differences(after, before, attention_mask)


@torch.no_grad()
def read(
    sparse: SparseGPT,
    ids: Ids,
    source_ids: Ids,
    chosen: Chosen,
    attention_mask: Mask = None,
) -> dict[int, Change]:
    """Return, by site, the change of the stream that gives its read nodes their other values.

        dz_s = e_j (rms(z_s) / gamma_j) (n'_j - n_j)                per token, summed over j

    The chosen nodes j are channels that the sublayer after site s reads. n_j is the value of such a
    node on `ids` and n'_j that on `source_ids`, both after norm and AbsTopK; gamma_j is the gain of
    the norm, whose root mean square is taken from the clean run (Gao et al. 2025, Appendix A.4;
    docs/method.md#read-nodes).
    """
    with recorded(sparse, list(chosen)) as there:
        sparse.residuals(source_ids, attention_mask)
    with recorded(sparse, list(chosen)) as here:
        z = sparse.residuals(ids, attention_mask)
    changes = {}
    for at, mask in chosen.items():
        s, gain = reads_at(sparse, at)
        rms = z[s].square().mean(-1, keepdim=True).sqrt()
        changes[s] = _real(mask * (there[at] - here[at]) * rms / gain, attention_mask)
    return changes


def reads_at(sparse: SparseGPT, location: str) -> tuple[int, Float[Tensor, " d_sparse"]]:
    """Return the site that the sublayer of a node's location reads, and the gains of its norm."""
    layer, _, name = location.partition(".")
    block = sparse.model.blocks[int(layer)]
    in_mlp = name.startswith("mlp")
    norm = block.norm_2 if in_mlp else block.norm_1  # pyright: ignore
    return 2 * int(layer) + in_mlp, norm.weight  # pyright: ignore


def writes(sparse: SparseGPT, location: str, i: int) -> Float[Tensor, " d_sparse"]:
    """Return what one unit of a node's value adds to the stream after its sublayer.

    AbsTopK, which may drop some of it, is not taken into account; for a v channel it is what one
    unit of attention adds. Raises ValueError for reads, which write nothing themselves, and for q
    and k channels, which act through attention scores.
    """
    layer, _, name = location.partition(".")
    block = sparse.model.blocks[int(layer)]
    if name.endswith("resid_delta"):
        unit = torch.zeros(sparse.d_resid).to(block.mlp.proj.weight)  # pyright: ignore
        unit[i] = 1.0
        return unit
    if name == "mlp.post_act":
        return block.mlp.proj.weight[:, i]  # pyright: ignore
    if name == "attn.v":
        return block.attn.out.weight[:, i]  # pyright: ignore
    raise ValueError(
        f"{location}.{i} has no fixed direction: q and k channels act through attention "
        "scores; use steer or ablate with nodes=[it], which run the sparse model twice"
    )


def _differences(after: list[Tensor], before: list[Tensor], mask: Mask) -> list[Tensor]:
    return [_real(a - b, mask) for a, b in zip(after, before, strict=True)]


def _real(change: Tensor, mask: Mask) -> Tensor:
    return change if mask is None else torch.where(mask[..., None] != 0, change, 0.0)
