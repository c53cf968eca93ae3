"""Tasks about blocks and statements: what follows a head, and how a line goes on."""

from __future__ import annotations

from sparse.tasks.recipe import Form, PerSplit, Recipe

from .settings import ANYWHERE, FILLER, INDENTED

WHILE_RETURN_TRUE = Recipe(
    meaning="after `while True` comes a colon, after `return True` the line ends",
    differs={"kw": ("while", "return")},
    targets=((":\n", "\n"), (":", "\n")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            "$kw True",
            "self.$v = $v\n$kw True",
            "$v = self.$v\n$kw True",
            "if not $v:\n    $v = None\n$kw True",
        ),
        validation=("$v.$f()\n$kw True", "$v = []\n$kw True"),
        test=("$v = $v2 + 1\n$kw True", "print($v)\n$kw True", "$v, $v2 = $v3\n$kw True"),
    ),
    filler=FILLER,
)

WITH_AS = Recipe(
    meaning="what a with statement opens gets its name by `as`, elsewhere the line ends",
    targets=((" as", "\n"),),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            ("with $v.$name", "return $v.$name"),
            ("with open($v)", "return open($v)"),
            ("with open($v", "return open($v", ")", ")\n"),
            ("with self.$f.$name", "return self.$f.$name"),
            ("with $v.open($v2", "$v = open($v2", ")", ")\n"),
        ),
        validation=(
            ("with $cls.$name", "yield $cls.$name"),
            ("with $v[$n].$name", "return $v[$n].$name"),
            ("with $v.$f($v2", "yield $v.$f($v2", ")", ")\n"),
        ),
        test=(
            ("with $v.$f.$name", "yield $v.$f.$name"),
            ("with cls.$name", "return cls.$name"),
            ("with open(self.$name)", "yield open(self.$name)"),
            ("with open(self.$name", "yield open(self.$name", ")", ")\n"),
        ),
    ),
    filler=FILLER,
)

WITH_OPEN = Recipe(
    meaning="a file that is an output is opened for writing, an input for reading",
    differs={
        "a": ("output", "input"),
        "b": ("writer", "reader"),
        "c": ("outfile", "infile"),
        "d": ("target", "source"),
        "e": ("dst", "src"),
        "g": ("write", "read"),
    },
    targets=(("w", "r"), ("wb", "rb")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            "with open($v + $a, '",
            "$v2 = open($v + $a, '",
            "with open(${a}_file, '",
            "self.$v2 = open(self.$a, '",
        ),
        validation=(
            "with open($v / $b, '",
            "return open($v * $b, '",
            "with open($v / $c, '",
            "$v2 = open(self.$c, '",
        ),
        test=(
            "with self.open($v - $d, '",
            "$v2, $v3 = None, open($v + $e, '",
            "with $v.open($name + $g, '",
            "yield open($v % $d, '",
        ),
    ),
    filler=FILLER,
)

FOR_WHILE = Recipe(
    meaning="after the variable of a for loop comes `in`, after a condition the colon",
    differs={"kw": ("for", "while")},
    targets=((" in", ":\n"), (" in", ":")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=("$kw $v", "$v2 = $v3\n$kw $v", "if $v2:\n    $kw $v", "self.$f()\n$kw $v"),
        validation=("$v2 = []\n$kw $v", "print($v2)\n$kw $v"),
        test=("$v2, $v3 = 0, 1\n$kw $v", "with $v2:\n    $kw $v", "$f($v2)\n$kw $v"),
    ),
    filler=FILLER,
)

BODY = "if $v:\n    "
ELSE_ELIF = Recipe(
    meaning="else is followed by a colon, elif by a condition",
    differs={"kw": ("else", "elif")},
    targets=((":\n", None), (":", None)),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            BODY + "$v2 = $v3\n$kw",
            BODY + "self.$v2 = $v3\n$kw",
            BODY + "return $v2\n$kw",
            "if not $v:\n    $f($v2)\n$kw",
        ),
        validation=(BODY + "$v2 += 1\n$kw", "if $v == $n:\n    pass\n$kw"),
        test=(BODY + "del $v2\n$kw", "if $v in $v2:\n    $v3 = None\n$kw", BODY + "$v2.$f()\n$kw"),
    ),
    filler=FILLER,
)

IF_TERNARY = Recipe(
    meaning="after its condition an if statement has a colon, a conditional expression has else",
    targets=((":\n", " else"), (":", " else")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            ("$v = $v2\nif $v3", "$v = not $v2 if $v3"),
            ("$v = $v2\nif $v3", "$v = $v2 or $v4 if $v3"),
            ("$v = $v2\nif $v3 > $n", "$v = not $v2 if $v3 > $n"),
            ("$v = $v2\nif $v3 > $n", "$v = $v2 or $v4 if $v3 > $n"),
        ),
        validation=(
            ("$v = $v2\nif $v3 is None", "$v = not $v2 if $v3 is None"),
            ("$v = $v2\nif $v3 is None", "$v = $v2 + $v4 if $v3 is None"),
        ),
        test=(
            ("self.$v = $v2\nif $v3 < $n", "self.$v = not $v2 if $v3 < $n"),
            ("self.$v = $v2\nif $v3 < $n", "self.$v = $v2 + $v4 if $v3 < $n"),
            ("$v += $v2\nif not $v3", "$v += not $v2 if not $v3"),
            ("$v += $v2\nif not $v3", "$v += $v2 * $v4 if not $v3"),
        ),
    ),
    filler=FILLER,
)

DEEP = (
    "def $f(self):",
    "def $f(self, $v):",
    "if $v:",
    "if not $v:",
    "else:",
    "try:",
    "with $v:",
    "for $v in $v2:",
)
DEEP_VALIDATION = ("while $v:", "finally:", "elif $v:", "def $f():")
DEEP_TEST = (
    "def $f($v):",
    "if $v is None:",
    "except $cls:",
    "with self.$v:",
    "if $v in $v2:",
    "for $v in self.$v2:",
    "def $f(self, *$v):",
    "if $v > $n:",
)


def _deep(heads: tuple[str, ...], loop: str) -> tuple[Form, ...]:
    """Return forms that end in a loop of depth 1 and 2, before the newline and after it.

    Which form a tokenizer can express depends on whether it joins a newline with the spaces after
    it. Of these spaces it leaves one to the word that follows.
    """
    forms: list[Form] = []
    for head in heads:
        one, two = f"    {head}\n        {loop}", f"        {head}\n            {loop}"
        forms.append((one + "\n", two + "\n", " " * 11, " " * 15))
        forms.append((one, two, "\n" + " " * 11, "\n" + " " * 15))
    return tuple(forms)


INDENT_FOR = Recipe(
    meaning="the body of a deeper loop is indented further",
    targets=((" " * 11, " " * 15),),
    forms=PerSplit(
        train=_deep(DEEP, "for $v3 in $v4:"),
        validation=_deep(DEEP_VALIDATION, "for $v3 in $list:"),
        test=_deep(DEEP_TEST, "for $v3 in $f2($v4):"),
    ),
    filler=FILLER,
)

LAMBDA_FUNC = Recipe(
    meaning="the argument of a lambda is followed by a colon, the name of a function by a bracket",
    targets=((":", "("),),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            ("$v = lambda $name", "@$v\ndef $name"),
            ("return lambda $name", "async def $name"),
            ("$v = $v2\n$v3 = lambda $name", "$v = $v2\n@$v3\ndef $name"),
        ),
        validation=(("yield lambda $name", "async def $name"), ("$v = lambda $f", "@$v\ndef $f")),
        test=(
            ("$v = $n\nreturn lambda $name", "$v = $n\nasync def $name"),
            ("self.$v = lambda $name", "@self.$v\ndef $name"),
            ("$f()\n$v = lambda $name", "$f()\n@$v\ndef $name"),
        ),
    ),
    filler=FILLER,
)

IF_EQUALS = Recipe(
    meaning="in a condition a comparison follows, in a statement an assignment",
    targets=((" ==", " ="),),
    settings=INDENTED,
    forms=PerSplit(
        train=(
            ("$v2 = $v3\nif $v", "$v2 = not $v3\n$v"),
            ("if $v.$name", "self.$v.$name"),
            ("$v2 = $v3\nif $v[0]", "$v2 = not $v3\n$v[0]"),
        ),
        validation=(
            ("self.$v2 = $v3\nif $v", "self.$v2 = not $v3\n$v"),
            ("$v2 += $v3\nif $v.$name", "$v2 += not $v3\n$v.$name"),
        ),
        test=(
            ("$v2.$f($v3)\nif $v", "$v2.$f(not $v3)\n$v"),
            ("$f($v2)\nif $v.$name", "$f(not $v2)\n$v.$name"),
            ("assert $v2\nif $v[$n]", "assert not $v2\n$v[$n]"),
        ),
    ),
    filler=FILLER,
)

ENUMERATE_RANGE = Recipe(
    meaning="a loop over an index and an item enumerates, one over an index takes a range",
    targets=((" enumerate", " range"),),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            ("$v = $v2\nfor i, $v3 in", "$v = $v2 + $v4\nfor i in"),
            ("self.$v = $v2\nfor i, $v3 in", "self.$v = $v2 + $v4\nfor i in"),
        ),
        validation=(("$v = $v2\nfor j, $v3 in", "$v = $v2 - $v4\nfor j in"),),
        test=(
            ("$v += $v2\nfor n, $v3 in", "$v += $v2 * $v4\nfor n in"),
            ("$v.$name = $v2\nfor k, $v3 in", "$v.$name = $v2 or $v4\nfor k in"),
        ),
    ),
    filler=FILLER,
)

VAR_IF = Recipe(
    meaning="after a comparison with True comes a colon, after an assignment the line ends",
    targets=((":\n", "\n"), (":", "\n")),
    settings=INDENTED,
    forms=PerSplit(
        train=(
            ("$v2 = $v3\nif $v == True", "$v2 = not $v3\n$v = True"),
            ("if $v.$name == True", "self.$v.$name = True"),
            ("$v2 = $v3\nif $v == False", "$v2 = not $v3\n$v = False"),
        ),
        validation=(
            ("self.$v2 = $v3\nif $v == True", "self.$v2 = not $v3\n$v = True"),
            ("$v2 += $v3\nif $v.$name == True", "$v2 += not $v3\n$v.$name = True"),
        ),
        test=(
            ("$v2.$f($v3)\nif $v == True", "$v2.$f(not $v3)\n$v = True"),
            ("assert $v2\nif $v[$n] == True", "assert not $v2\n$v[$n] = True"),
            ("$f($v2)\nif $v == False", "$f(not $v2)\n$v = False"),
        ),
    ),
    filler=FILLER,
)
