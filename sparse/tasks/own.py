"""Pairs of one's own: from Python values, or from a .jsonl file with one pair per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from .pair import Pair, pair_of

SPLITS = ("train", "validation", "test")
OF_FIVE = ("train", "train", "train", "validation", "test")
"""Where pairs without a split of their own go: of every five in turn, three, one and one."""


def read_pairs(given: Iterable[Any], where: str = "pair") -> list[tuple[Pair, str | None]]:
    """Return every pair with the split it names, or None where it names none.

    An item is a Pair, a tuple (context_1, context_2, target_1, target_2), or a dict of the fields
    of a Pair and perhaps `split`.

    Raises ValueError naming the item, counted from 1, that cannot be read.
    """
    return [_read(item, f"{where} {number}") for number, item in enumerate(given, start=1)]


def read_jsonl(path: Path) -> list[tuple[Pair, str | None]]:
    """Return the pairs of a .jsonl file with their splits; empty lines are passed over.

    Raises ValueError naming the line that cannot be read, and FileNotFoundError for no file.
    """
    found = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold U+2028
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); one object per line") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a {type(values).__name__}; must be an object")
        found.append(_read(values, where))
    return found


def deal_out(
    pairs: list[tuple[Pair, str | None]], split_by: str | None = None
) -> dict[str, tuple[Pair, ...]]:
    """Return the pairs by split: as they say themselves, and the others shuffled and dealt out.

    Of every five three go to train, one to validation and one to test (OF_FIVE). The shuffle has a
    fixed seed: the same pairs are always dealt out alike, and pairs made by nested loops are mixed.
    With `split_by`, a factor of `Pair.groups`, its levels are dealt out in turn instead of the
    pairs, in the order in which they first appear; so no level is in two splits. Raises ValueError
    for a pair without that factor.
    """
    seen: set[frozenset[str]] = set()
    for pair, _ in pairs:
        contexts = (pair.context_1, pair.context_2)
        if frozenset(contexts) in seen:
            raise ValueError(
                f"the pair {contexts} is there twice; leave one out, since a repeated pair is no "
                "further evidence"
            )
        seen.add(frozenset(contexts))
    free = [pair for pair, split in pairs if split is None]
    if split_by is not None and (without := [p for p in free if split_by not in p.groups]):
        raise ValueError(
            f"split_by={split_by!r}: {len(without)} of {len(free)} pairs have no such group, the "
            f"first is {without[0].context_1!r}; it has {sorted(without[0].groups)}"
        )
    keys = [i if split_by is None else p.groups[split_by] for i, p in enumerate(free)]
    levels = list(dict.fromkeys(keys))
    if split_by is not None and free and len(levels) < len(OF_FIVE):
        raise ValueError(
            f"split_by={split_by!r}: {len(levels)} levels cannot fill three splits, at least 5 "
            "can; take another group, or give each pair its `split`"
        )
    if split_by is None:
        Random(0).shuffle(levels)  # in turn as they stand, loops that made them would alias
    turn = {key: OF_FIVE[i % 5] for i, key in enumerate(levels)}
    splits = iter([turn[key] for key in keys])
    found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for pair, split in pairs:
        found[next(splits) if split is None else split].append(pair)
    return {split: tuple(of_split) for split, of_split in found.items()}


def _read(item: Any, where: str) -> tuple[Pair, str | None]:
    if isinstance(item, Pair):
        return item, None
    if isinstance(item, Mapping):
        values = dict(item)
        split = values.pop("split", None)
        if split is not None and split not in SPLITS:
            raise ValueError(f"{where}: split {split!r} must be one of {SPLITS}")
        return pair_of(values, where), split
    if not isinstance(item, tuple | list) or len(item) != 4:
        raise ValueError(
            f"{where}: {item!r:.80} is no pair; give (context_1, context_2, target_1, target_2), "
            "a dict or a Pair"
        )
    names = ("context_1", "context_2", "target_1", "target_2")
    return pair_of(dict(zip(names, item, strict=True)), where), None
