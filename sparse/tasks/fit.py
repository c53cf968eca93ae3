"""Pairs as tokens: which pairs a tokenizer can express, and why it cannot express the others.

A context is encoded as c, and target t fits it if encode(context + t) = [*c, token].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from sparse.ops.prefix import prefix_ids

from .batch import REST, TaskBatch
from .pair import Pair

LEAST_PAIRS = 16
"""Fewer pairs than this are refused in a split that is measured: their mean says little."""
LEAST_TRAIN_PAIRS = 8
"""The same for the train split where there is a validation split. Then train only ranks nodes."""

UNEQUAL = "contexts of unequal length"
SAME = "equal targets or contexts"
SEVERAL = "target is several tokens"
MERGES = "target merges with its context"
LONG = "prompt longer than the model"
REMEDIES = {
    UNEQUAL: "take words that are equally many tokens in both contexts",
    SAME: "give two targets, and two contexts, that are different tokens",
    SEVERAL: "take targets that are one token of this tokenizer, or add alternatives",
    MERGES: "move the boundary: end the context earlier, or begin the target with the space",
    LONG: "shorten the contexts, or take a model with more positions",
}


class _Fit(NamedTuple):
    """A pair that the tokenizer expresses."""

    pair: Pair
    first: list[int]
    second: list[int]
    target_1: int
    target_2: int


def least_pairs(split: str, has_validation: bool) -> int:
    """Return the least number of pairs that a split may have."""
    return LEAST_TRAIN_PAIRS if split == "train" and has_validation else LEAST_PAIRS


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of every text, without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # pyright: ignore


def fit(
    name: str,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    least: int,
    longest: int | None = None,
) -> TaskBatch:
    """Return one split as tokens, without the pairs that do not fit (`Task.batch`).

    `longest` is the number of positions of the model, if the prompts must not exceed it. Raises
    ValueError when fewer than `least` pairs remain, with every reason, how often, one example and
    the remedy.
    """
    prefix = list(prefix_ids(tokenizer))
    first = encode(tokenizer, [p.context_1 for p in pairs])
    second = encode(tokenizer, [p.context_2 for p in pairs])
    after_first = encode(tokenizer, [p.context_1 + p.target_1 for p in pairs])
    after_second = encode(tokenizer, [p.context_2 + (p.target_2 or "") for p in pairs])
    kept: list[_Fit] = []
    dropped: Counter[str] = Counter()
    example: dict[str, str] = {}

    def drop(why: str, what: str) -> None:
        dropped[why] += 1
        example.setdefault(why, what)

    for i, p in enumerate(pairs):
        a, b = first[i], second[i]
        one = after_first[i][len(a) :]
        two = [REST] if p.target_2 is None else after_second[i][len(b) :]
        whole = after_first[i][: len(a)] == a and after_second[i][: len(b)] == b
        if len(a) != len(b):
            drop(UNEQUAL, f"{p.context_1!r} is {len(a)} tokens, {p.context_2!r} is {len(b)}")
        elif not whole or not one or not two:
            drop(MERGES, _merged(tokenizer, p, first=after_first[i][: len(a)] != a or not one))
        elif len(one) > 1 or len(two) > 1:
            drop(SEVERAL, _several(tokenizer, p.target_1 if len(one) > 1 else str(p.target_2)))
        elif a == b or one == two:
            drop(SAME, f"{p.context_1!r} -> {p.target_1!r}, {p.context_2!r} -> {p.target_2!r}")
        elif longest is not None and len(prefix) + len(a) > longest:
            drop(LONG, f"{len(prefix) + len(a)} tokens, the model has {longest} positions")
        else:
            kept.append(_Fit(p, prefix + a, prefix + b, one[0], two[0]))
    if len(kept) < least:
        raise ValueError(_refusal(pairs, split, len(kept), least, dropped, example))
    return _batch(name, split, kept, dict(dropped))


def _batch(name: str, split: str, kept: list[_Fit], dropped: dict[str, int]) -> TaskBatch:
    prompts = [f.first for f in kept] + [f.second for f in kept]
    wanted, other = [f.target_1 for f in kept], [f.target_2 for f in kept]
    # in a one-sided pair the foil of the second context is the first target, and REST is right
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    width = int(last.max()) + 1
    factors = dict.fromkeys(factor for f in kept for factor in f.pair.groups)
    return TaskBatch(
        task=name,
        split=split,
        ids=torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]),
        real=torch.arange(width) <= last[:, None],
        last=last,
        target=torch.tensor(wanted + other),
        foil=torch.tensor(other + wanted),
        targets=tuple(
            sorted(
                {(f.pair.target_1, f.pair.target_2) for f in kept},
                key=lambda t: (t[0], t[1] or ""),
            )
        ),
        dropped=dropped,
        groups={at: tuple(f.pair.groups.get(at, "") for f in kept) for at in factors},
    )


def _refusal(
    pairs: Sequence[Pair],
    split: str,
    n_kept: int,
    least: int,
    dropped: Counter[str],
    example: dict[str, str],
) -> str:
    """Return the message for a split of which too few pairs remain."""
    sample = list(dict.fromkeys((p.target_1, p.target_2) for p in pairs))[:3]
    lines = [
        f"with targets {sample}, {n_kept} of {len(pairs)} {split} pairs remain, at least {least} "
        "must"
    ]
    for why, n in dropped.most_common():
        lines.append(f"    {n} dropped, {why}: {example[why]}; {REMEDIES[why]}")
    if not dropped:
        lines.append("    none was dropped: give more pairs (80 fill all three splits)")
    return "\n".join(lines)


def _several(tokenizer: PreTrainedTokenizerBase, target: str) -> str:
    """Return what a target of several tokens consists of, and what it could be cut to."""
    ids = encode(tokenizer, [target])[0]
    starts = [target[:i] for i in range(len(target) - 1, 0, -1)]
    whole = [s for s in starts if len(encode(tokenizer, [s])[0]) == 1]
    hint = f", single tokens it begins with: {whole}" if whole else ""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return f"target {target!r} is {len(ids)} tokens (ids {ids}, pieces {pieces}){hint}"


def _merged(tokenizer: PreTrainedTokenizerBase, pair: Pair, first: bool) -> str:
    """Return the tokens that a context and its target become together."""
    context, target = (
        (pair.context_1, pair.target_1) if first else (pair.context_2, str(pair.target_2))
    )
    ids = encode(tokenizer, [context + target])[0]
    pieces = tokenizer.convert_ids_to_tokens(ids[-4:])
    return f"{context!r} + {target!r} ends in the tokens {pieces}"
