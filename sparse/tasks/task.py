"""Tasks: pairs of contexts that differ in one property, and the two tokens that show it.

pair      self.width = "red     self.width = 'red       scored at the last position
targets   "                     '                       each the other's foil
loss      softplus(foil - target) in nats, mean over the 2 contexts of every pair; chance is ln 2
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sparse.storage.records import checked

from .batch import Targets, TaskBatch

SPLITS = ("train", "validation", "test")

LEAST_PAIRS = 16
"""Fewer pairs than this in a split are refused: their mean says little."""
UNRELATED: tuple[Targets, ...] = ((" is", " when"), (" is", " but"), ("+", "*"), (";", "#"))
"""Targets of a nonsense twin, in order of preference: nothing in the contexts tells them apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two contexts that differ in one property, each with the text that should follow it.

    A tokenizer must make equally many tokens of both contexts and one token of each target;
    `Task.batch` checks that.
    """

    context_1: str
    context_2: str
    target_1: str
    target_2: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Contrasting pairs in three splits.

    Masks are learned on train, sizes of circuits are chosen on validation, and test is only
    reported. A context may be in one split only.
    """

    name: str
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...] = ()
    test: tuple[Pair, ...] = ()
    meaning: str = ""
    """What a model must know to do the task, in one line."""
    alternatives: tuple[Targets, ...] = ()
    """Targets that replace those of every pair where the tokenizer does not have these as single
    tokens; tried in order."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError(f"task {self.name}: the train split is empty; it needs pairs")
        owner: dict[str, str] = {}
        for split in SPLITS:
            for pair in self.pairs(split):
                for context in (pair.context_1, pair.context_2):
                    if owner.setdefault(context, split) != split:
                        raise ValueError(
                            f"task {self.name}: {context!r} is in {owner[context]} and in {split}; "
                            "a context may be in one split only, or the held-out loss means nothing"
                        )

    def __repr__(self) -> str:
        parts = [repr(self.name), self._sizes(), self._targets(), repr(shorten(self.meaning, 80))]
        return f"Task({', '.join(parts)})"

    def __str__(self) -> str:
        first = self.train[0]
        meaning = f": {self.meaning}" if self.meaning else ""
        return (
            f"task {self.name}{meaning}\n"
            f"  {self._sizes()}, {self._targets()}\n"
            f"  {first.context_1!r} -> {first.target_1!r}\n"
            f"  {first.context_2!r} -> {first.target_2!r}"
        )

    def _sizes(self) -> str:
        return " + ".join(f"{len(self.pairs(split))} {split}" for split in SPLITS) + " pairs"

    def _targets(self) -> str:
        pairs = dict.fromkeys((p.target_1, p.target_2) for s in SPLITS for p in self.pairs(s))
        (a, b), *more = pairs
        return f"targets {a!r} and {b!r}" + (f" and {len(more)} more" if more else "")

    def pairs(self, split: str) -> tuple[Pair, ...]:
        """Return the pairs of a split."""
        if split not in SPLITS:
            raise ValueError(f"task {self.name} has no split {split!r}; it has {SPLITS}")
        return getattr(self, split)

    def nonsense(self) -> Task:
        """Return the nonsense twin: the same contexts and splits, with two unrelated targets.

        It is the control of a task. Nothing in the contexts tells its targets apart, so a method
        that finds small circuits of low loss for it too is too expressive.
        """
        first, *rest = UNRELATED
        twin = _with_targets(self, first)
        return replace(twin, name=f"{self.name}:nonsense", meaning="none", alternatives=tuple(rest))

    def batch(self, tokenizer: PreTrainedTokenizerBase, split: str) -> TaskBatch:
        """Return the pairs of `split` as tokens, with the first targets that fit every split.

        Targets fit when each is one token and, in every split that has pairs, at least LEAST_PAIRS
        pairs remain. A pair is dropped, and counted under its reason in `TaskBatch.dropped`,

        - when its contexts differ in their number of tokens;
        - when its two targets, or its two contexts, are the same tokens;
        - when the tokenizer would not produce the target after its context: encode(context +
          target) must be encode(context) + [target].

        The pairs' own targets are tried first, then `alternatives`. Raises ValueError where none
        fit, or where the split is empty.
        """
        if not self.pairs(split):
            raise ValueError(f"task {self.name}: the {split} split is empty")
        refusals: list[str] = []
        for choice in (None, *self.alternatives):
            task = self if choice is None else _with_targets(self, choice)
            filled = [s for s in SPLITS if task.pairs(s)]
            try:
                fitted = {s: _fit(task, tokenizer, s) for s in filled}
            except ValueError as refusal:
                refusals.append(str(refusal))
            else:
                return fitted[split]
        raise ValueError(
            f"task {self.name} does not fit this tokenizer ({len(tokenizer)} entries):\n  "
            + "\n  ".join(refusals)
            + "\nuse another tokenizer, or a Task whose targets are single tokens of this one"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain values; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """Return the task that `to_dict` wrote; an unknown key is a ValueError."""
        values = checked(cls, values, "task")
        for split in SPLITS:
            values[split] = tuple(_pair(p, f"task {split}") for p in values.get(split, ()))
        values["alternatives"] = tuple((a, b) for a, b in values.get("alternatives", ()))
        return cls(**values)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Task:
        """Return the task in a .jsonl file: one pair per line, and the file's name as its name.

        A line is an object with context_1, context_2, target_1, target_2, and optionally split. Of
        the pairs without a split, in order, the first three of every five go to train, the fourth
        to validation, the fifth to test. Raises ValueError naming the line that cannot be read.
        """
        path = Path(path)
        found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
        n_free = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); one object per line") from error
            if not isinstance(values, dict):
                raise ValueError(f"{where}: a {type(values).__name__}; must be an object")
            n_free += "split" not in values
            split = values.pop("split", _turn(n_free - 1))
            if split not in SPLITS:
                raise ValueError(f"{where}: split {split!r} must be one of {SPLITS}")
            found[split].append(_pair(values, where))
        if not found["train"]:
            raise ValueError(f"{path}: no train pair in it; give at least {LEAST_PAIRS}")
        train, validation, test = (tuple(found[split]) for split in SPLITS)
        return cls(name=path.stem, train=train, validation=validation, test=test)


def _with_targets(task: Task, targets: Targets) -> Task:
    """Return the task with these two targets in every pair."""
    new = {"target_1": targets[0], "target_2": targets[1]}
    return replace(task, **{s: tuple(replace(p, **new) for p in task.pairs(s)) for s in SPLITS})


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # pyright: ignore


def _single(tokenizer: PreTrainedTokenizerBase, targets: set[str]) -> dict[str, int]:
    """Return the one token of each target; raise ValueError for a target of several tokens."""
    ordered = sorted(targets)
    found: dict[str, int] = {}
    for text, ids in zip(ordered, _encode(tokenizer, ordered), strict=True):
        if len(ids) != 1:
            starts = [text[:i] for i in range(len(text) - 1, 0, -1)]
            whole = [s for s in starts if len(_encode(tokenizer, [s])[0]) == 1]
            hint = f"; single tokens it begins with: {whole}" if whole else ""
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"target {text!r} is {len(ids)} tokens (ids {ids}, pieces {pieces}) "
                f"but must be exactly 1{hint}"
            )
        found[text] = ids[0]
    return found


def _fit(task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> TaskBatch:
    """Return one split as tokens, without the pairs that do not fit (`Task.batch`).

    Raises ValueError when too few remain.
    """
    pairs = task.pairs(split)
    token = _single(tokenizer, {t for p in pairs for t in (p.target_1, p.target_2)})
    first = _encode(tokenizer, (p.context_1 for p in pairs))
    second = _encode(tokenizer, (p.context_2 for p in pairs))
    after_first = _encode(tokenizer, (p.context_1 + p.target_1 for p in pairs))
    after_second = _encode(tokenizer, (p.context_2 + p.target_2 for p in pairs))
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for i, p in enumerate(pairs):
        if len(first[i]) != len(second[i]):
            dropped["contexts of unequal length"] += 1
        elif token[p.target_1] == token[p.target_2] or first[i] == second[i]:
            dropped["equal targets or contexts"] += 1
        elif [*first[i], token[p.target_1]] != after_first[i] or (
            [*second[i], token[p.target_2]] != after_second[i]
        ):
            dropped["target merges with its context"] += 1
        else:
            kept.append(i)
    if len(kept) < LEAST_PAIRS:
        sample = sorted({(p.target_1, p.target_2) for p in pairs})[:3]
        raise ValueError(
            f"with targets {sample}, {len(kept)} of {len(pairs)} {split} pairs remain, at least "
            f"{LEAST_PAIRS} must; dropped: {dict(dropped)}"
        )
    prompts = [first[i] for i in kept] + [second[i] for i in kept]
    wanted = [token[pairs[i].target_1] for i in kept]
    other = [token[pairs[i].target_2] for i in kept]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    width = int(last.max()) + 1
    return TaskBatch(
        task=task.name,
        split=split,
        ids=torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]),
        real=torch.arange(width) <= last[:, None],
        last=last,
        target=torch.tensor(wanted + other),
        foil=torch.tensor(other + wanted),
        targets=tuple(sorted({(pairs[i].target_1, pairs[i].target_2) for i in kept})),
        dropped=dict(dropped),
    )


def _pair(values: dict[str, Any], where: str) -> Pair:
    values = checked(Pair, values, where)
    for f in fields(Pair):
        text = values.get(f.name)
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: {f.name} is {text!r}; it must be a non-empty string")
    return Pair(**values)


def _turn(i: int) -> str:
    """Return the split of item i: of every five, three train, one validation, one test."""
    return "train" if i % 5 < 3 else "validation" if i % 5 == 3 else "test"
