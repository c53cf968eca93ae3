"""Unrelated sources: for every prompt, a context of the other kind from another pair.

    prompt    self.width = "red           source    name.title = 'green
    kept      its number of tokens, its two targets
    changed   the kind of context, the words, and where possible the frame

An interchange with the pair's own counterfactual moves only what differs within the pair, so
whatever moves it seems to carry the variable. A source with other words brings all of its other
content along, and a circuit that carries the variable alone must leave that behind.
"""

from __future__ import annotations

from random import Random

import torch
from jaxtyping import Int
from torch import Tensor

from sparse.tasks.batch import TaskBatch

FRAMES = ("frame", "form")
"""Factors of `Pair.groups` that name how a context is built; the others name its words."""


def unrelated(
    batch: TaskBatch, pairs: Int[Tensor, " n"] | None = None, seed: int = 0
) -> tuple[Int[Tensor, " kept"], Int[Tensor, "prompt pos"]]:
    """Return the pairs that have unrelated sources for both prompts, and these sources' tokens.

    `pairs` are the pairs of `batch` that are wanted, by default all; sources come from the whole
    batch. Row r of the sources belongs to row r of `batch.take(kept)`. A source has as many tokens
    as the prompt, the prompt's foil as its target and the reverse, and shares no level of any
    factor that names words. Of these the ones with another frame are preferred, and among equals
    one is drawn.
    """
    n = batch.n_pairs
    wanted = range(n) if pairs is None else pairs.tolist()
    rows = list(zip(batch.last.tolist(), batch.target.tolist(), batch.foil.tolist(), strict=True))
    found: dict[int, tuple[int, int]] = {}
    for pair in wanted:
        of_kinds = [_source(batch, rows, pair, kind, seed) for kind in (0, 1)]
        if None not in of_kinds:
            found[pair] = (of_kinds[0], of_kinds[1])  # pyright: ignore[reportArgumentType]
    kept = torch.tensor(list(found), dtype=torch.long, device=batch.ids.device)
    sources = [s[kind] for kind in (0, 1) for s in found.values()]
    width = int(batch.last[torch.cat([kept, kept + n])].max()) + 1 if found else 0
    return kept, batch.ids[torch.tensor(sources, dtype=torch.long, device=kept.device), :width]


def _source(
    batch: TaskBatch, rows: list[tuple[int, int, int]], pair: int, kind: int, seed: int
) -> int | None:
    """Return the row of the source of one prompt, or None where there is none."""
    n = batch.n_pairs
    last, target, foil = rows[pair + kind * n]
    fitting = []
    for other in range(n):
        row = other + (1 - kind) * n
        if other == pair or rows[row] != (last, foil, target):
            continue
        shared = {f for f, of in batch.groups.items() if of[pair] and of[pair] == of[other]}
        if not shared - set(FRAMES):
            fitting.append((sum(f in shared for f in FRAMES), row))
    if not fitting:
        return None
    fewest = min(shared for shared, _ in fitting)
    choice = [row for shared, row in fitting if shared == fewest]
    return Random(f"{seed} {pair} {kind}").choice(choice)
