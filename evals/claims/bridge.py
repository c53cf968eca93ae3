"""How much of each model the bridges carry over, beside bridges that were never trained.

    encoder FVU  sum |encode(h) - z|^2 / sum |z - mean z|^2     fraction, 1 as bad as the mean
    decoder FVU  sum |decode(z) - h|^2 / sum |h - mean h|^2
    up           KL(dense || sparse resumed from encode(h))     nats per token
    down         KL(dense || dense resumed from decode(z))

Site s of a row is the dense site of a bridge: h is the dense residual there, z the sparse one at
the sparse site it is bridged to, and the two models are resumed at these (`BridgeConfig`).
Sums run over every position of the blocks; means over the blocks, the independent unit.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bridges.losses.quantities import ce_nats, kl_nats
from bridges.maps.bridge import BridgeSet
from evals.scores.paired import paired
from evals.scores.score import Score, Unit

UNTRAINED = "untrained bridges"
UNIGRAM = "unigram frequencies of the same text"
ROWS: dict[str, tuple[str, Unit]] = {  # key: (row name, unit)
    "encoder_fvu": ("encoder FVU", "fraction"),
    "decoder_fvu": ("decoder FVU", "fraction"),
    "up": ("KL, dense to sparse", "nats per token"),
    "down": ("KL, sparse to dense", "nats per token"),
}


@torch.no_grad()
def evaluate_bridge(
    run: Any,
    blocks: Int[Tensor, "batch pos"],
    *,
    draws: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[Score]:
    """Score the bridges of `run` (dense, sparse, bridges) on held-out blocks of text.

    Per bridged site the four measures above, each beside `draws` untrained bridges of the same
    config, centring and scale; then both models' cross entropy, KL(dense || sparse) and the loss
    the hybrids recover, beside the unigram frequencies of the same text; where the dense model is
    no better than these, there is no loss to recover and those rows are left out.
    """
    if len(blocks) < 2:
        raise ValueError(f"evaluate_bridge: {len(blocks)} block; an error needs at least 2")
    run.bridges.check(run.dense, run.sparse)
    sets: list[BridgeSet] = [run.bridges, *(untrained(run.bridges, seed + i) for i in range(draws))]
    unigram = _unigram(blocks, run.dense.vocab_size)
    seen: dict[Any, list[Tensor]] = defaultdict(list)
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="bridges", disable=not progress, leave=False):
        ids = blocks[start : start + batch_size].to(run.dense.device)
        for key, per_block in _measure(run, sets, ids, unigram).items():
            seen[key].append(per_block.cpu().double())
    data = {key: torch.cat(parts, dim=-1 if key[0] in ROWS else 0) for key, parts in seen.items()}
    sites = run.bridges.config.sites
    rows = [row for s in sites for row in _site_rows(data, s, blocks.shape[1], seed)]
    return rows + _model_rows(data, sites, seed)


def untrained(bridges: BridgeSet, seed: int) -> BridgeSet:
    """Return bridges of the same config, centring and scale (the buffers) with fresh weights."""
    fresh = BridgeSet(bridges.config, seed=seed)
    fresh.load_state_dict(dict(bridges.named_buffers()), strict=False)
    return fresh.to(bridges.mean.device).eval()


def _measure(run: Any, sets: list[BridgeSet], ids: Tensor, unigram: Tensor) -> dict[Any, Tensor]:
    """Return, per block, every sum and mean the rows need; bridge sets lead where there are any."""
    h, z = run.dense.residuals(ids), run.sparse.residuals(ids)
    y, own = run.dense.unembed(h[-1], ids), run.sparse.unembed(z[-1], ids)
    flat = unigram.to(y.device).expand_as(y)
    out: dict[Any, Tensor] = {
        ("ce", "dense"): ce_nats(y, ids).mean(-1),
        ("ce", "sparse"): ce_nats(own, ids).mean(-1),
        ("ce", "unigram"): ce_nats(flat, ids).mean(-1),
        ("kl", "sparse"): kl_nats(y, own).mean(-1),
        ("kl", "unigram"): kl_nats(y, flat).mean(-1),
    }
    for s, at in run.bridges.config.pairs.items():
        for key, x in (("h", h[s]), ("z", z[at])):
            x = x.double()
            moments = [x.square().sum((1, 2))[:, None], x.sum(1)]
            out[key, s] = torch.cat(moments, dim=1)  # batch 1+d
    parts = [_crossed(run, b, h, z, y, ids) for b in sets]
    out |= {key: torch.stack([part[key] for part in parts]) for key in parts[0] if key[0] in ROWS}
    return out | {key: value for key, value in parts[0].items() if key[0] not in ROWS}


def _crossed(
    run: Any, bridges: BridgeSet, h: list[Tensor], z: list[Tensor], y: Tensor, ids: Tensor
) -> dict[Any, Tensor]:
    """Return, per block, what crossing the bridges of one set costs, and the hybrids' nats.

    One joined pass through either model serves all sites.
    """
    pairs, out = bridges.config.pairs, {}
    up = {s: bridges.encode(s, h[s]) for s in pairs}
    down = {s: bridges.decode(s, z[t]) for s, t in pairs.items()}
    to_sparse = run.sparse.joined(
        {pairs[s]: x for s, x in up.items()}, dict.fromkeys(pairs.values(), ids)
    )
    to_dense = run.dense.joined(down, dict.fromkeys(pairs, ids))
    for s, t in pairs.items():
        out["encoder_fvu", s] = (up[s] - z[t]).square().sum((1, 2))
        out["decoder_fvu", s] = (down[s] - h[s]).square().sum((1, 2))
        for key, model, end in (
            ("up", run.sparse, to_sparse[t]),
            ("down", run.dense, to_dense[s]),
        ):
            x = model.unembed(end, ids)
            out[key, s], out[f"{key}_ce", s] = kl_nats(y, x).mean(-1), ce_nats(x, ids).mean(-1)
    return out


def _site_rows(data: dict[Any, Tensor], s: int, n_pos: int, seed: int) -> list[Score]:
    rows = []
    for key, (name, unit) in ROWS.items():
        values, weights = data[key, s], None
        if unit == "fraction":
            weights = _about_the_mean(data["z" if key == "encoder_fvu" else "h", s], n_pos)
            values = values / weights
        rows.append(
            paired(
                f"site {s}: {name}",
                values[0],
                values[1:],
                weights=weights,
                unit=unit,
                control_name=UNTRAINED,
                better="lower",
                seed=seed,
            )
        )
    return rows


def _about_the_mean(moments: Tensor, n_pos: int) -> Float[Tensor, " batch"]:
    """Return per block sum |x - mean|^2, the mean being over all blocks; moments hold |x|^2, x."""
    square, total, t = moments[:, 0], moments[:, 1:], n_pos
    mean = total.sum(0) / (t * len(total))
    return square - 2 * total @ mean + t * mean.square().sum()


def _model_rows(data: dict[Any, Tensor], sites: tuple[int, ...], seed: int) -> list[Score]:
    dense, sparse, unigram = (data["ce", who] for who in ("dense", "sparse", "unigram"))

    def row(name: str, values: Tensor, control: Tensor, **more: Any) -> Score:
        given = {"unit": "nats per token", "control_name": UNIGRAM, "better": "lower", "seed": seed}
        return paired(name, values, control[None], **{**given, **more})

    rows = [
        row("cross entropy, dense", dense, unigram),
        row("cross entropy, sparse", sparse, unigram),
        row("KL(dense || sparse)", data["kl", "sparse"], data["kl", "unigram"]),
    ]
    if (unigram - dense).sum() <= 0:
        return rows  # nothing between the two to recover, and no fraction of it
    room = (unigram - dense).clamp(min=1e-6)
    for key, name in (("up_ce", "dense to sparse"), ("down_ce", "sparse to dense")):
        each = {s: (unigram - data[key, s]) / room for s in sites}
        total = room.sum()
        detail = {f"site {s}": float((room * x).sum() / total) for s, x in each.items()}
        mean = torch.stack(list(each.values())).mean(0)
        more = {"unit": "fraction", "better": "higher", "weights": room, "detail": detail}
        rows.append(row(f"loss recovered, {name}", mean, torch.zeros_like(mean), **more))
    return rows


def _unigram(blocks: Int[Tensor, "batch pos"], vocab_size: int) -> Float[Tensor, " vocab"]:
    """Log frequencies of the tokens of the blocks, each counted once more than it occurs."""
    return (blocks.flatten().cpu().bincount(minlength=vocab_size) + 1).double().log().float()
