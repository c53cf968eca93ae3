"""Fixed dense directions of sparse nodes, and the dense sites at which they are added.

A node reads from or writes to the sparse stream at some sparse site. An edit is made at a dense
site, and only bridged sites have a decoder. So the dense site of the edit is chosen like this:

    writes   at sparse site t     edited at the first bridge at or after t
    reads    at sparse site t     edited at the bridge of t itself, taken out again after it

sigma D e is the dense direction that a change e of the sparse stream writes (`BridgeSet`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bridges.maps.bridge import BridgeConfig, BridgeSet
from dense import Edit
from dense.edit import check_amount
from sparse.circuits.graph import Node
from sparse.model.gpt import SparseGPT

from .stream_change import Chosen, reads_at, writes


def node_edits(sparse: SparseGPT, bridges: BridgeSet, node: Node) -> list[Edit]:
    """Return the edits that add one unit of a node's value to the dense stream.

    `DenseCircuit.edits` lists the direction and the site of every kind of node.
    """
    location, i = node
    site, gain = reads_at(sparse, location)
    if location.endswith("act_in"):
        unit = torch.zeros_like(gain)
        unit[i] = 1 / gain[i]
        return read_edits(bridges, site, unit, 1.0, prompt_only=False)
    unit = writes(sparse, location, i)
    at = written_at(bridges.config, site + 1)
    return [Edit(site=at, direction=bridges.transport(at, unit), limit=bridges.limits()[at])]


def read_edits(
    bridges: BridgeSet, site: int, dz: Tensor, strength: float | Tensor, prompt_only: bool = True
) -> list[Edit]:
    """Return two edits that show `dz` to one stretch of the dense model and to nothing else.

        h <- h + strength * sigma D dz     at the dense site bridged to sparse `site`
        h <- h - strength * sigma D dz     at the dense site where that stretch ends

    The stretch is the dense sublayers that correspond to the sparse sublayer after `site`
    (`read_at`). They see the change; what comes later sees only what they made of it. It is shown
    at outlying tokens too: what is added there is taken out again.
    """
    check_amount(strength, "strength")
    into, out = read_at(bridges.config, site)
    direction = bridges.transport(into, dz)
    given: dict[str, Any] = {"direction": direction, "prompt_only": prompt_only}
    return [Edit(site=into, amount=strength, **given), Edit(site=out, amount=-strength, **given)]


def written_at(config: BridgeConfig, site: int) -> int:
    """Return the first bridged dense site whose sparse site is `site` or a later one.

    The sparse stream carries a write along, so what was written at `site` is still in the stream at
    a later site, together with what the sublayers in between added in response. At an earlier site
    it is not there yet. Raises ValueError where no bridge is late enough.
    """
    later = [d for d, t in config.pairs.items() if t >= site]
    if not later:
        raise ValueError(
            f"the node writes at sparse site {site}, after the last bridged one, "
            f"{config.sparse_sites[-1]}; bridge a later site"
        )
    return later[0]


def read_at(config: BridgeConfig, site: int) -> tuple[int, int]:
    """Return the first and last dense site of what corresponds to the sublayer at sparse `site`.

        into = the dense site bridged to `site`
        out  = into + max(1, round((d - into) / (t - site)))     (d, t): the next bridge

    The sparse sublayer leads from `site` to `site + 1`. `out` is where the map of sites, continued
    linearly from one bridge to the next, puts `site + 1`; after the last bridge it is continued to
    the last sites of both models. There is always at least one dense sublayer between the two. With
    equal depths and the identity map it is exactly sublayer `site`.

    Raises ValueError where `site` is not bridged, because at no other site does the stream hold
    what the sublayer reads, and where it is bridged to the last dense site.
    """
    dense_site = {t: d for d, t in config.pairs.items()}
    if site not in dense_site:
        raise ValueError(
            f"the node reads sparse site {site}, and site {site} is not bridged; the bridged sites "
            f"of the sparse model are {list(config.sparse_sites)}: bridge it, or use steer or "
            "ablate, whose differences are read at any later site"
        )
    into, last = dense_site[site], config.n_dense_sites - 1
    if into == last:
        raise ValueError(
            f"sparse site {site} is bridged to dense site {into}, the last, which no dense "
            "sublayer reads; bridge it to an earlier one"
        )
    ends = [*config.pairs.items(), (last, config.n_sparse_sites - 1)]
    d, t = next((d, t) for d, t in ends if t > site)
    return into, into + max(1, round((d - into) / (t - site)))


def first_moved(chosen: Chosen, sparse: SparseGPT) -> int:
    """Return the first sparse site at which moving the chosen nodes changes the stream.

    Where no node is chosen it is 1, the site after the first sublayer.
    """
    return min((reads_at(sparse, at)[0] + 1 for at in chosen), default=1)
