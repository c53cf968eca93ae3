"""The built-in tasks, all about Python code.

The contexts of a task have the same frame in all splits. The names, words and numbers that fill it
are in one split only (words.py).
"""

from __future__ import annotations

from .recipe import Contexts, Recipe
from .words import FUNCTIONS, LISTS, NAMES, VARIABLES, WORDS, _meetings, deal


def quotes(split: int) -> list[Contexts]:
    """Return pairs in which a string is still open, in double quotes and in single quotes.

    An example is `    self.name = "red` and `    self.name = 'red`.
    """
    names, words = deal(NAMES, split), deal(WORDS, split)
    frame = "    self.{name} = {quote}{word}"
    return [
        (frame.format(name=n, quote='"', word=w), frame.format(name=n, quote="'", word=w))
        for n, w in _meetings(names, words, 360 if split == 0 else 100)
    ]


def brackets(split: int) -> list[Contexts]:
    """Return pairs in which a list of numbers is still open, one bracket deep and two deep.

    The two contexts of a pair must have equally many tokens. Which forms do differs between
    tokenizers, so three kinds of pairs are offered, and `Task.batch` drops those that do not fit:

        [1, 2, 3, 4              [[1, 2], [3, 4
        [1, 2, 3, 4, 5, 6, 7     [[1, 2], [3, 4], [5, 6
        [ 1, 2, 3                [[1], [2], [3         or with 4 numbers, in twos; a space stands
                                                       in for the second bracket
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
    """Return pairs of functions whose last line begins a loop (`while True`) or returns `True`."""
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
