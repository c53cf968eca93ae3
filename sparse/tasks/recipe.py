"""How a built-in task is made: forms in settings, filled with words.

    setting   "    def $f(self):\\n        $form"            where a line of code may stand
    form      "self.$name = $quote$word"                    the line itself, with its slots
    frame     the setting with the form in it               the text that pairs share
    differs   quote: '"' in context_1, "'" in context_2     all that a pair differs in

A slot is `$v`, or `$v2`, `$v3` and so on for other words of the same list (words.py). Forms,
settings and words are given per split, so that no split sees a frame or a word of another one. A
recipe is plain data; copy one to make a task of your own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from string import Template
from typing import NamedTuple

from sparse.ops.seeds import seed_of
from sparse.tasks.own import SPLITS
from sparse.tasks.pair import Pair, Targets
from sparse.tasks.task import Task

from .words import NUMERIC, POOLS, Pool, deal

Form = str | tuple[str, str] | tuple[str, str, str, str]
"""A template for both contexts, or one for each, perhaps with the two targets that belong to it."""
SIZES = {"train": 240, "validation": 96, "test": 96}
"""Pairs made for a split, times `Recipe.kinds`; a tokenizer may drop some."""


class PerSplit(NamedTuple):
    """Something for every split."""

    train: tuple[Form, ...]
    validation: tuple[Form, ...]
    test: tuple[Form, ...]


BARE = PerSplit(("$form",), ("$form",), ("$form",))
"""No setting: the forms are the frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one built-in task is made."""

    meaning: str
    """What a model must know to do the task, in one line."""
    forms: PerSplit
    """Templates of the contexts, different ones in every split."""
    targets: tuple[Targets, ...]
    """Candidate targets in order of preference, as templates; the first that a tokenizer can
    express are used. Those after the first may have no slots. None: anything but the first."""
    differs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Slots that stand for one text in context_1 and for another in context_2."""
    settings: PerSplit = BARE
    """Templates around the forms; `$form` is indented as it stands there."""
    kinds: int = 1
    """How many times as many pairs to make, because a tokenizer can express only some forms."""
    family: str = ""
    """`Task.family`."""
    ending: str = "\n"
    """`Task.ending`."""
    filler: tuple[str, ...] = ()
    """`Task.filler`."""

    def __post_init__(self) -> None:
        for what, per_split in (("forms", self.forms), ("settings", self.settings)):
            if any(isinstance(of, str) or not of for of in per_split):
                raise ValueError(f"Recipe.{what}: every split needs a tuple of templates")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.targets):
            raise ValueError(
                f"Recipe.targets={self.targets!r} must hold pairs: ((target_1, target_2), ...)"
            )
        of_split = [set(of) for of in self.forms]
        shared = of_split[0] & of_split[1] | of_split[0] & of_split[2] | of_split[1] & of_split[2]
        if shared and self.settings is BARE:
            raise ValueError(
                f"Recipe.forms: {sorted(map(str, shared))} in several splits; a frame may be in one"
            )


def make(name: str, recipe: Recipe) -> Task:
    """Return the task of a recipe; the same recipe gives the same pairs everywhere."""
    pairs = {split: tuple(_pairs(name, recipe, i)) for i, split in enumerate(SPLITS)}
    return Task(
        name=name,
        meaning=recipe.meaning,
        alternatives=tuple(recipe.targets[1:]),
        family=recipe.family,
        ending=recipe.ending,
        filler=recipe.filler,
        **pairs,
    )


def slots_of(*templates: str | None) -> list[str]:
    """Return the names of the slots of some templates, each once, in order of appearance."""
    given = [text.replace("$$", "") for text in templates if text]
    found = (match for text in given for match in re.findall(r"\$\{?(\w+)", text))
    return list(dict.fromkeys(found))


def _pairs(name: str, recipe: Recipe, split: int) -> Iterator[Pair]:
    """Yield the pairs of a split, no two alike, each frame in about equally many."""
    forms, settings = recipe.forms[split], recipe.settings[split]
    words = _Words(Random(seed_of("task", name, SPLITS[split])), split)
    wanted, seen = SIZES[SPLITS[split]] * recipe.kinds, set()
    for i in range(8 * wanted):
        form, setting = forms[i % len(forms)], settings[(i // len(forms)) % len(settings)]
        pair = _pair(recipe, form, str(setting), words)
        if (key := (pair.context_1, pair.context_2)) not in seen:
            seen.add(key)
            yield pair
        if len(seen) == wanted:
            return


def _pair(recipe: Recipe, form: Form, setting: str, words: _Words) -> Pair:
    """Return one pair: the form in the setting, with words drawn for its slots."""
    both = (form, form) if isinstance(form, str) else form[:2]
    targets = form[2:] if len(form) == 4 and not isinstance(form, str) else recipe.targets[0]
    framed = [_framed(setting, one) for one in both]
    used = [slot for slot in recipe.differs if slot in slots_of(*both)]
    own = [*both, *(text for slot in used for text in recipe.differs[slot])]
    slots = slots_of(*framed, *own, *targets)
    word = words.draw([slot for slot in slots if slot not in recipe.differs and slot != "form"])
    contexts = []
    for k, frame in enumerate(framed):
        differing = {slot: Template(recipe.differs[slot][k]).substitute(word) for slot in used}
        contexts.append(Template(frame).substitute(word | differing))
    target_1, target_2 = (t and Template(t).substitute(word) for t in targets)
    frame = framed[0] if framed[0] == framed[1] else " | ".join(framed)
    groups = {"frame": frame}
    if setting != "$form":
        groups["form"] = both[0] if both[0] == both[1] else " | ".join(both)
    named = [s for s in slots_of(*both, *own) if s in word and _base(s) not in NUMERIC]
    groups |= {slot: word[slot] for slot in named}
    return Pair(
        context_1=contexts[0],
        context_2=contexts[1],
        target_1=str(target_1),
        target_2=target_2,
        groups=groups,
    )


def _framed(setting: str, form: str) -> str:
    """Return the setting with the form in it, every line of which is indented as the first."""
    before, _, after = setting.partition("$form")
    indent = re.search(r"[ \t]*$", before)
    assert indent is not None
    return before + form.replace("\n", "\n" + indent.group()) + after


def _base(slot: str) -> str:
    return slot.rstrip("0123456789")


class _Words:
    """Words for slots, from the share of every list that belongs to a split.

    Each list is dealt like a pack of cards: every word is drawn once before any is drawn again.
    """

    def __init__(self, rng: Random, split: int) -> None:
        self.rng, self.split = rng, split
        self.decks: dict[int, list[tuple[str, ...]]] = {}

    def draw(self, slots: Sequence[str]) -> dict[str, str]:
        """Return a word for every slot; slots of one list get different words."""
        drawn: dict[tuple[int, str], tuple[str, ...]] = {}
        result = {}
        for slot in slots:
            if _base(slot) not in POOLS:
                raise ValueError(
                    f"no list of words is called {_base(slot)!r}; there are {sorted(POOLS)} (add "
                    "yours to words.py), or name the slot in `differs`"
                )
            pool, place = POOLS[_base(slot)]
            number = slot[len(_base(slot)) :]
            key = (id(pool), number)
            if key not in drawn:
                taken = [entry for (at, _), entry in drawn.items() if at == id(pool)]
                drawn[key] = self._next(pool, taken)
            result[slot] = drawn[key][place]
        return result

    def _next(self, pool: Pool, taken: list[tuple[str, ...]]) -> tuple[str, ...]:
        """Return the next word of a list that is not among those taken."""
        deck = self.decks.setdefault(id(pool), [])
        if all(entry in taken for entry in deck):
            fresh = [entry for entry in deal(pool, self.split) if entry not in deck]
            self.rng.shuffle(fresh)
            deck.extend(fresh)
        free = next((entry for entry in deck if entry not in taken), None)
        if free is None:
            raise ValueError(
                f"a form asks for more than {len(taken)} different words of a list that has no "
                f"more for this split, such as {taken[0]}; give the list more words"
            )
        deck.remove(free)
        return free
