"""Tasks about strings: quotes, prefixes and the type of a variable."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit, Recipe

from .settings import ANYWHERE, FILLER, INSIDE

SINGLE_DOUBLE_QUOTE = Recipe(
    meaning="a string closes with the kind of quote that opened it",
    differs={"q": ('"', "'")},
    targets=(('"\n', "'\n"), ('"', "'"), ('")', "')")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=("self.$name = $q$word", "$name = $q$word", "return $q$word", "$name += $q$word"),
        validation=("self.$name += $q$word", "yield $q$word"),
        test=("$v.$name = $q$word", "assert $name == $q$word", "$name = $v or $q$word"),
    ),
    filler=FILLER,
)

KINDS = {  # set and string initialised in equally many tokens; which do depends on the tokenizer
    "i": ("set()", '""'),
    "j": ("set()", 'u""'),
    "k": ("set()", "str()"),
}
SET_OR_STRING = Recipe(
    meaning="a set grows by its method add, a string by +=",
    differs=KINDS,
    targets=((".add", " +="), (".", " +=")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=tuple(
            f"$v = ${kind}\n{between}$v"
            for kind in KINDS
            for between in ("for $v2 in $v3:\n    ", "$v2 = $v3\n", "for $v2 in self.$v3:\n    ")
        ),
        validation=tuple(
            f"$v = ${kind}\n{between}$v"
            for kind in KINDS
            for between in ("for $v2, $v3 in $list:\n    ", "$v2 = 0\n")
        ),
        test=tuple(
            f"$v = ${kind}\n{between}$v"
            for kind in KINDS
            for between in ("for $v2 in range($n):\n    ", "$f($v2)\n", "with $v2:\n    ")
        ),
    ),
    kinds=2,
    filler=FILLER,
)

SEARCH = "$name.$f($name2)\nfor $name3 in $name4:\n    "  # words of names: `current` is a variable
SET_OR_STRING_FIXEDVARNAME = Recipe(
    meaning="a set grows by its method add, a string by +=; the variable is always `current`",
    family="set_or_string",
    differs=KINDS,
    targets=((".add", " +="), (".", " +=")),
    settings=INSIDE,
    forms=PerSplit(
        train=tuple(
            f"current = ${kind}\n{between}current"
            for kind in KINDS
            for between in (SEARCH, "heappush($name, $name2)\nfor $name3 in $list:\n    ")
        ),
        validation=tuple(
            f"current = ${kind}\n{between}current"
            for kind in KINDS
            for between in ("for $name2 in $list:\n    heappush($name, $name2)\n    ",)
        ),
        test=tuple(
            f"current = ${kind}\n{between}current"
            for kind in KINDS
            for between in (
                "$name = $name2\nfor $name3 in graph:\n    ",
                "for $name in $f($name2):\n    ",
            )
        ),
    ),
    filler=FILLER,
    kinds=2,
)

PREFIXES = {"p": ("f", "b"), "r": ("f", "u"), "s": ("f", "")}
FSTRING_BRACE = Recipe(
    meaning="a formatted string has a brace where another one has none",
    differs=PREFIXES,
    targets=((" {", None), ("{", None)),
    settings=ANYWHERE,
    forms=PerSplit(
        train=tuple(
            form.replace("$p", f"${kind}")
            for kind in PREFIXES
            for form in ('$name = $p"$word:', 'self.$name = $p"$word is', 'return $p"$word:')
        ),
        validation=tuple(
            form.replace("$p", f"${kind}")
            for kind in PREFIXES
            for form in ('$name += $p"$word:', 'yield $p"The $word is')
        ),
        test=tuple(
            form.replace("$p", f"${kind}")
            for kind in PREFIXES
            for form in ('$v.$name = $p"No $word:', '$name = $v + $p"$word:', 'assert $v, $p"$word')
        ),
    ),
    kinds=2,
    filler=FILLER,
)
