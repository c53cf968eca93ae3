"""Tasks: pairs of contexts that differ in one property, and the two answers that show it.

pair      self.width = "red     self.width = 'red       scored at the last position
targets   "                     '                       each the other's foil
loss      softplus(foil - target) in nats, mean over the 2 contexts of every pair; chance is ln 2
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from textwrap import shorten
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse.ops.seeds import seed_of
from sparse.storage.records import checked

from .batch import TaskBatch, check_vocabulary
from .fit import LEAST_PAIRS, LEAST_TRAIN_PAIRS, fit, least_pairs
from .own import SPLITS, deal_out, read_jsonl, read_pairs
from .pair import Pair, Targets, pair_of
from .score import TaskScore, positions_of, score_batch, tokenizer_of, vocabulary_of

UNRELATED: tuple[Targets, ...] = (
    (" The", " This"),
    (" the", " this"),
    (" is", " when"),
    ("+", "*"),
    (";", "#"),
)
"""Targets of a nonsense twin, in order of preference. The first are words that follow a context of
either kind equally badly. (" is" and " when" are not such words: code has `if x is`.)"""
VARIANTS = ("longer", "distractors")
"""What `Task.variant` makes."""
N_FILLERS = 3
"""Texts that the variant "longer" puts before a context."""


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
    family: str = ""
    """The name that a task shares with its siblings: its variants, and tasks that ask the same of
    other contexts. Results within a family are not independent. By default the task's own name."""
    ending: str = "\n"
    """What completes a solved prompt (context and target) that stands before another context, in
    the variant "distractors"; a target that ends in a newline needs none."""
    filler: tuple[str, ...] = ()
    """Texts that may stand before any context and say nothing of the answer, for the variant
    "longer"."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.family:
            object.__setattr__(self, "family", self.name.partition(":")[0])
        if not self.train:
            raise ValueError(f"task {self.name}: the train split is empty; it needs pairs")
        for pair in self.alternatives:
            if len(pair) != 2 or not pair[0] or pair[1] == "":
                raise ValueError(f"task {self.name}: {pair!r} are no alternatives; give two texts")
        owner: dict[str, str] = {}
        for split in SPLITS:
            for pair in self.pairs(split):
                for context in (pair.context_1, pair.context_2):
                    if owner.setdefault(context, split) != split:
                        raise ValueError(
                            f"task {self.name}: {context!r} is in {owner[context]} and in {split}; "
                            "a context may be in one split only, or the held-out loss means "
                            "nothing: give these pairs one `split`, or deal them out by a group "
                            "that they share (split_by)"
                        )

    def __repr__(self) -> str:
        parts = [repr(self.name), self._sizes(), self._targets(), repr(shorten(self.meaning, 80))]
        return f"Task({', '.join(parts)})"

    def __str__(self) -> str:
        first = self.train[0]
        meaning = f": {self.meaning}" if self.meaning else ""
        second = "anything else" if first.target_2 is None else repr(first.target_2)
        return (
            f"task {self.name}{meaning}\n"
            f"  {self._sizes()}, {self._targets()}\n"
            f"  {first.context_1!r} -> {first.target_1!r}\n"
            f"  {first.context_2!r} -> {second}"
        )

    def _sizes(self) -> str:
        return " + ".join(f"{len(self.pairs(split))} {split}" for split in SPLITS) + " pairs"

    def _targets(self) -> str:
        pairs = dict.fromkeys((p.target_1, p.target_2) for s in SPLITS for p in self.pairs(s))
        (a, b), *more = pairs
        second = "anything else" if b is None else repr(b)
        return f"targets {a!r} and {second}" + (f" and {len(more)} more" if more else "")

    def pairs(self, split: str) -> tuple[Pair, ...]:
        """Return the pairs of a split."""
        if split not in SPLITS:
            raise ValueError(f"task {self.name} has no split {split!r}; it has {SPLITS}")
        return getattr(self, split)

    def levels(self, split: str) -> dict[str, int]:
        """Return {factor: number of its levels} among the pairs of a split (`Pair.groups`).

        >>> from sparse import get_task
        >>> get_task("while_return_true").levels("test")["frame"] >= 8
        True
        """
        seen: dict[str, set[str]] = {}
        for pair in self.pairs(split):
            for factor, level in pair.groups.items():
                seen.setdefault(factor, set()).add(level)
        return {factor: len(levels) for factor, levels in seen.items()}

    def with_targets(self, targets: Targets) -> Task:
        """Return the task with these two targets in every pair."""
        new = {"target_1": targets[0], "target_2": targets[1]}
        return replace(self, **{s: tuple(replace(p, **new) for p in self.pairs(s)) for s in SPLITS})

    def nonsense(self) -> Task:
        """Return the nonsense twin: the same contexts and splits, with two unrelated targets.

        It is the control of a task. Both targets follow either context about equally badly, so a
        method that finds small circuits of low loss for it too is too expressive. A model may still
        like one of them more after one kind of context, which makes one assignment of targets to
        contexts easier than the other. Try both before you rely on it: exchanged, they are
        `task.nonsense().with_targets((second, first))`, and `TaskScore.paired` tells the way.
        """
        own = {t for s in SPLITS for p in self.pairs(s) for t in (p.target_1, p.target_2)}
        own |= {t for pair in self.alternatives for t in pair}
        free = [pair for pair in UNRELATED if not own & set(pair)]
        if ":nonsense" in self.name:
            raise ValueError(f"task {self.name} has no nonsense twin: it is one itself")
        if not free:
            raise ValueError(
                f"task {self.name} has no nonsense twin: its targets hold words of each of "
                f"{UNRELATED}; give other alternatives"
            )
        first, *rest = free
        twin = self.with_targets(first)
        return replace(twin, name=f"{self.name}:nonsense", meaning="none", alternatives=tuple(rest))

    def variant(self, kind: str) -> Task:
        """Return the same pairs with the same text before both contexts, called `<name>:<kind>`.

        - "longer": three texts of `filler`, which say nothing of the answer;
        - "distractors": a solved prompt of another pair, that is its context, its target and
          `ending`. Whether it is a first or a second context is drawn by a seed of the task's name;
          so it agrees with the right answer for one of the two contexts and disagrees for the
          other. Where the second target is "anything else" it is always a first context. Where
          pairs have targets of their own, it is of a pair with other targets.

        Both contexts of a pair still have equally many tokens, and only they differ. Raises
        ValueError for another kind, and for "longer" without `filler`.

        >>> from sparse import get_task
        >>> get_task("single_double_quote").variant("distractors").name
        'single_double_quote:distractors'
        """
        if kind not in VARIANTS:
            raise ValueError(f"task {self.name} has no variant {kind!r}; there are {VARIANTS}")
        if kind == "longer" and len(self.filler) < N_FILLERS * len(SPLITS):
            raise ValueError(
                f"task {self.name} has {len(self.filler)} texts of filler, and its variant "
                f"'longer' needs {N_FILLERS * len(SPLITS)}; give Task.from_pairs(..., filler=...), "
                "texts that may stand before any context"
            )
        before = _fillers if kind == "longer" else _solved
        changed = {
            s: tuple(
                replace(p, context_1=text + p.context_1, context_2=text + p.context_2)
                for p, text in zip(self.pairs(s), before(self, s), strict=True)
            )
            for s in SPLITS
        }
        return replace(self, name=f"{self.name}:{kind}", **changed)

    def batch(
        self, tokenizer: PreTrainedTokenizerBase, split: str, longest: int | None = None
    ) -> TaskBatch:
        """Return the pairs of `split` as tokens, with the first targets that fit every split.

        Every prompt begins with what the tokenizer puts before a text by default, such as a
        begin-of-text token (docs/method.md#text). Targets fit when enough pairs remain in
        every split that has pairs: LEAST_PAIRS, and in train, where there is a validation split,
        LEAST_TRAIN_PAIRS. A pair is dropped, and counted under its reason in `TaskBatch.dropped`,

        - when its contexts differ in their number of tokens;
        - when its two targets, or its two contexts, are the same tokens;
        - when the tokenizer would not produce the target as one token after its context:
          encode(context + target) must be encode(context) + [token];
        - when its prompts have more than `longest` tokens, if that is given.

        The pairs' own targets are tried first, then `alternatives`. Raises ValueError where none
        fit, with every reason and its remedy, or where the split is empty.
        """
        if not self.pairs(split):
            raise ValueError(
                f"task {self.name}: the {split} split is empty; give it {LEAST_PAIRS} pairs or more"
            )
        return self.batches(tokenizer, longest)[split]

    def batches(
        self, tokenizer: PreTrainedTokenizerBase, longest: int | None = None
    ) -> dict[str, TaskBatch]:
        """Return {split: its batch} for every split that has pairs; `batch` says what fits."""
        refusals: list[str] = []
        for choice in (None, *self.alternatives):
            task = self if choice is None else self.with_targets(choice)
            filled = [s for s in SPLITS if task.pairs(s)]
            try:
                return {
                    s: fit(
                        self.name,
                        task.pairs(s),
                        tokenizer,
                        s,
                        least_pairs(s, bool(self.validation)),
                        longest,
                    )
                    for s in filled
                }
            except ValueError as refusal:
                refusals.append(str(refusal))
        raise ValueError(
            f"task {self.name} has too few pairs that this tokenizer ({len(tokenizer)} entries) "
            "can express:\n  " + "\n  ".join(refusals)
        )

    def score(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        split: str = "validation",
    ) -> TaskScore:
        """Return how well a model does the task: nats and accuracy beside chance, by group.

        `model` is a DenseModel, a SparseGPT or any Hugging Face causal language model; the
        tokenizer is by default its own, or that in the folder it was read from. Raises ValueError
        where the tokenizer cannot express the task (`batch`) or is not the model's.

        >>> from dense import tiny
        >>> from sparse import get_task
        >>> score = get_task("single_double_quote").score(tiny())
        >>> score.does, score.nats < score.chance
        (True, True)
        """
        tokenizer = tokenizer or tokenizer_of(model, "Task.score")
        check_vocabulary(tokenizer, vocabulary_of(model))
        return score_batch(model, self.batch(tokenizer, split, positions_of(model)))

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain values; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """Return the task that `to_dict` wrote; an unknown key is a ValueError."""
        values = checked(cls, values, "task")
        for split in SPLITS:
            values[split] = tuple(pair_of(p, f"task {split}") for p in values.get(split, ()))
        values["alternatives"] = tuple((a, b) for a, b in values.get("alternatives", ()))
        values["filler"] = tuple(values.get("filler", ()))
        return cls(**values)

    @classmethod
    def from_pairs(
        cls, name: str, pairs: Iterable[Any], *, split_by: str | None = None, **fields: Any
    ) -> Task:
        """Return the task with these pairs.

        A pair is a tuple (context_1, context_2, target_1, target_2), a dict with these keys and
        perhaps `split` and `groups`, or a `Pair`. Of the pairs without a split, in order, the first
        three of every five go to train, one to validation and one to test, after a shuffle of fixed
        seed; with `split_by`, a factor of their `groups`, its levels are dealt out so, in their
        order, and not the pairs.
        `fields` are further fields of a Task. 80 pairs fill all three splits (LEAST_PAIRS); where
        the splits are given, 8 train, 16 validation and 16 test pairs are the least.

        >>> from sparse import Task
        >>> words = ["red", "blue", "big", "old", "new"]
        >>> task = Task.from_pairs("mine", [(f'x = "{w}', f"x = '{w}", '"', "'") for w in words])
        >>> len(task.train), len(task.validation), len(task.test)
        (3, 1, 1)
        """
        return cls(name=name, **deal_out(read_pairs(pairs), split_by), **fields)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, split_by: str | None = None) -> Task:
        """Return the task in a .jsonl file: one pair per line, and the file's name as its name.

        A line is an object with context_1, context_2, target_1, target_2, and optionally split and
        groups; target_2 may be null (anything but target_1). Splits are dealt out as in
        `from_pairs`. Raises ValueError naming the line that cannot be read.
        """
        path = Path(path)
        splits = deal_out(read_jsonl(path), split_by)
        if not splits["train"]:
            raise ValueError(
                f"{path}: no train pair in it; give at least 80 pairs, or with `split` "
                f"{LEAST_TRAIN_PAIRS} of train and {LEAST_PAIRS} each of validation and test"
            )
        train, validation, test = (splits[split] for split in SPLITS)
        return cls(name=path.stem, train=train, validation=validation, test=test)


def check_name(name: Any) -> None:
    """Raise ValueError unless `name` can name a task: circuits are kept in folders of this name."""
    allowed = isinstance(name, str) and re.fullmatch(r"[^\W_][\w. +-]{0,99}(:\w+)*", name)
    if not allowed or re.search("-(nonsense|longer|distractors)$", name):
        raise ValueError(
            f"{name!r:.200} is no name of a task; it may have 100 letters, digits, spaces and any "
            "of . _ + -, must begin with a letter or digit, and must not end like the folder of a "
            "variant (-nonsense, -longer, -distractors)"
        )


def _fillers(task: Task, split: str) -> list[str]:
    """Return three texts of filler for every pair; no text is in two splits."""
    own = task.filler[SPLITS.index(split) :: len(SPLITS)]
    n = range(len(task.pairs(split)))
    return ["".join(own[(i + i // len(own) + j) % len(own)] for j in range(N_FILLERS)) for i in n]


def _solved(task: Task, split: str) -> list[str]:
    """Return, for every pair, a solved prompt of another pair of the split."""
    pairs = task.pairs(split)
    rng = Random(seed_of("distractors", task.name, split))
    one_answer = len({(p.target_1, p.target_2) for p in pairs}) == 1
    texts = []
    for pair in pairs:
        others = [
            p
            for p in pairs
            if p is not pair
            and (one_answer or not {p.target_1, p.target_2} & {pair.target_1, pair.target_2})
        ]
        if not others:
            raise ValueError(
                f"task {task.name}: no other {split} pair can distract from {pair.context_1!r}; "
                "give more pairs, with other targets"
            )
        other = rng.choice(others)
        text = other.context_1 + other.target_1
        if other.target_2 is not None and rng.random() < 0.5:
            text = other.context_2 + other.target_2
        texts.append(text if text.endswith("\n") else text + task.ending)
    return texts
