"""The contexts of the built-in tasks, written out by rule from lists of names, words and numbers.

Splits share no content: every list is dealt out in turn, of every five entries three to train, one
to validation and one to test, and no word stands in two lists. What all splits share is the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Contexts = tuple[str, str]

NAMES = """name path mode title label prefix suffix color kind style author version status domain
host user group format encoding header footer message command target source method action event
state level theme locale region country city street owner client server driver engine backend
device channel topic queue folder module package branch""".split()
WORDS = """red green blue small large open closed left right north south east west hello world
apple banana cherry orange lemon paper stone water fire earth wind summer winter spring autumn
monday friday sunday january march april silver gold copper iron wood glass music dance night
morning table chair window garden river mountain forest island ocean desert valley bridge castle
""".split()
FUNCTIONS = """run start stop load save read write check update reset open_file close_all find
search parse build make_list clean sort_items merge split_text join_parts count_lines filter_rows
send receive connect wait_for is_ready has_next can_write validate""".split()
VARIABLES = """data value result items count index total line text buffer block chunk token node
parent child left_side key entry record field row column offset length position current previous
pending done found""".split()
LISTS = """values numbers sizes points scores weights widths heights limits ranges bounds steps
ports codes rows_seen cells pairs_used shape grid matrix table_rows counts offsets levels ages
times prices totals marks ids""".split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one built-in task is made."""

    meaning: str
    targets: tuple[tuple[str, str], ...]
    """Candidate targets in order of preference; the first that a tokenizer can express is used."""
    contexts: Callable[[int], list[Contexts]]
    """The pairs of contexts of split 0 (train), 1 (validation) or 2 (test)."""


def deal(entries: Sequence[str], split: int) -> list[str]:
    """Return the entries of a split: of every five three to split 0, one to 1, one to 2."""
    return [entry for i, entry in enumerate(entries) if max(i % 5 - 2, 0) == split]


def quotes(split: int) -> list[Contexts]:
    """An attribute set to a string that is still open, in double and in single quotes."""
    names, words = deal(NAMES, split), deal(WORDS, split)
    frame = "    self.{name} = {quote}{word}"
    return [
        (frame.format(name=n, quote='"', word=w), frame.format(name=n, quote="'", word=w))
        for n, w in _meetings(names, words, 360 if split == 0 else 100)
    ]


def brackets(split: int) -> list[Contexts]:
    """A list of numbers that is still open, one bracket deep and two.

    Which forms are equally long differs between tokenizers, so three are offered:
    `[1, 2, 3, 4` and `[[1, 2], [3, 4`; the same with one more number in the flat one and two inner
    breaks; and `[ 1, 2, 3` and `[[1], [2], [3`, where a space stands in for the bracket.
    """
    names = deal(LISTS, split)
    numbers = deal([str(n) for n in range(1, 100)], split)
    pairs: list[Contexts] = []
    for i in range(480 if split == 0 else 120):
        n = [numbers[(7 * i + 3 * j + i // len(names)) % len(numbers)] for j in range(7)]
        if i % 4 == 0:
            flat, nested = ", ".join(n[:4]), _nested(n[:4])
        elif i % 4 == 1:
            flat, nested = ", ".join(n), _nested(n[:6])
        else:
            k = 3 if i % 4 == 2 else 4
            flat, nested = " " + ", ".join(n[:k]), _nested(n[:k], group=k - 2)
        start = f"    {names[i % len(names)]} = ["
        pairs.append((start + flat, start + nested))
    return list(dict.fromkeys(pairs))


def loops(split: int) -> list[Contexts]:
    """A method whose last line opens a loop, or returns."""
    frames = (
        "    def {f}(self, {v}):\n        self.{v} = {v}\n        ",
        "    def {f}(self):\n        {v} = self.{v}\n        ",
        "def {f}({v}):\n    if not {v}:\n        return None\n    ",
        "def {f}({v}):\n    {v} = {v} + 1\n    ",
    )
    couples = _meetings(deal(FUNCTIONS, split), deal(VARIABLES, split), 80 if split == 0 else 25)
    starts = [frame.format(f=f, v=v) for f, v in couples for frame in frames]
    return [(start + "while True", start + "return True") for start in starts]


SUITE = {
    "single_double_quote": Recipe(
        meaning="a string closes with the kind of quote that opened it",
        targets=(('"\n', "'\n"), ('"', "'"), ('")', "')")),
        contexts=quotes,
    ),
    "bracket_counting": Recipe(
        meaning="a nested list needs two closing brackets, a flat one needs one",
        targets=(("]\n", "]]\n"), ("]", "]]"), ("]\n", "],"), ("]\n", "]")),
        contexts=brackets,
    ),
    "while_return_true": Recipe(
        meaning="after `while True` comes a colon, after `return True` the line ends",
        targets=((":\n", "\n"), (":", "\n")),
        contexts=loops,
    ),
}


def _nested(numbers: list[str], group: int = 2) -> str:
    inner = [", ".join(numbers[i : i + group]) for i in range(0, len(numbers), group)]
    return "[" + "], [".join(inner)


def _meetings(first: list[str], second: list[str], n: int) -> list[tuple[str, str]]:
    """Return n distinct couples, all entries about equally often."""
    every = [
        (a, second[(i + j) % len(second)]) for j in range(len(second)) for i, a in enumerate(first)
    ]
    return every[:n]
