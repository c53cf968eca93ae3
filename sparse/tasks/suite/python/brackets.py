"""Tasks about brackets, arguments and names that come twice."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit, Recipe

from .settings import ANYWHERE, FILLER

LISTS = {  # flat and nested lists in equally many tokens; which do depends on the tokenizer
    "i": ("[$n, $n2, $n3, $n4", "[[$n, $n2], [$n3, $n4"),
    "j": ("[$n, $n2, $n3, $n4, $n5, $n6, $n7", "[[$n, $n2], [$n3, $n4], [$n5, $n6"),
    "k": ("[ $n, $n2, $n3", "[[$n], [$n2], [$n3"),
    "l": ("[ $n, $n2, $n3, $n4", "[[$n, $n2], [$n3, $n4"),
}
BRACKET_COUNTING = Recipe(
    meaning="a nested list needs two closing brackets, a flat one needs one",
    differs=LISTS,
    targets=(("]\n", "]]\n"), ("]", "]]"), ("]\n", "],"), ("]\n", "]")),
    settings=ANYWHERE,
    forms=PerSplit(
        train=tuple(
            f"{start} = ${kind}"
            for kind in LISTS
            for start in ("$list", "self.$list", "self._$list")
        ),
        validation=tuple(
            f"{start} += ${kind}" for kind in LISTS for start in ("$list", "self.$list")
        ),
        test=tuple(
            form.replace("$i", f"${kind}")
            for kind in LISTS
            for form in ("$v.$list = $i", "yield $i", "$list = $v = $i")
        ),
    ),
    kinds=2,
    filler=FILLER,
)

BRACKET_BRACE = Recipe(
    meaning="in braces a string is a key and a colon follows, in brackets a comma",
    differs={"open": ("{", "["), "after": (":", ",")},
    targets=(('":', '",'), ('"', '",')),
    settings=ANYWHERE,
    forms=PerSplit(
        train=(
            '$list = $open"$word"$after $n, "$word2',
            'self.$list = $open"$word"$after $n, "$word2',
            'return $open"$word"$after $n, "$word2',
            '$list = $open"$word"$after $v, "$word2',
        ),
        validation=(
            'yield $open"$word"$after $n, "$word2',
            '$list += $open"$word"$after None, "$word2',
        ),
        test=(
            '$v.$list = $open"$word"$after $n, "$word2',
            'assert $v == $open"$word"$after $n, "$word2',
            '$v, $list = $v2, $open"$word"$after $n, "$word2',
        ),
    ),
    filler=FILLER,
)

ARGUMENTS = {  # with and without defaults, in equally many tokens
    "i": ("$v=None, $v2=None, $v3", "$v, $v2, $v4, $v3"),
    "j": ("$v=None, $v3", "$v, $v2, $v3"),
    "k": ("$v=None, $v2=None, $v3", "$v, $v2, $v4, $v5, $v3"),
}
FINAL_KWARG = Recipe(
    meaning="after arguments with defaults comes one with a default",
    differs=ARGUMENTS,
    targets=(("=None", "):\n"), ("=None", "):"), ("=", "):"), ("=", ")")),
    forms=PerSplit(
        train=tuple(
            form.replace("$i", f"${kind}")
            for kind in ARGUMENTS
            for form in (
                "def $f($i",
                "    def $f(self, $i",
                "    @$name\n    def $f(self, $i",
                "import $mod\n\ndef $f($i",
                "class $cls:\n    def $f(self, $i",
            )
        ),
        validation=tuple(
            form.replace("$i", f"${kind}")
            for kind in ARGUMENTS
            for form in (
                "    @classmethod\n    def $f(cls, $i",
                "    pass\n\ndef $f($i",
                "# $name\ndef $f($i",
            )
        ),
        test=tuple(
            form.replace("$i", f"${kind}")
            for kind in ARGUMENTS
            for form in (
                "    @staticmethod\n    def $f($i",
                "async def $f($i",
                "class $cls($cls2):\n    def $f(self, $i",
                "from $mod import $name\n\ndef $f($i",
                "$name = None\n\ndef $f($i",
                "    $name = $n\n\n    def $f(self, $i",
                "def $f2():\n    def $f($i",
                "    # $name\n    def $f(self, $i",
            )
        ),
    ),
    kinds=2,
    filler=FILLER,
)

CLASS_INIT = Recipe(
    meaning="a constructor stores the argument of the attribute's name",
    differs={"x": ("$v", "$v2")},
    targets=((" $v", " $v2"),),
    ending="\n",
    forms=PerSplit(
        train=(
            "class $cls:\n    def __init__(self, $v, $v2):\n        self.$x =",
            "    def __init__(self, $v, $v2):\n        self.$x =",
            "    def __init__(self, $v, $v2, $v3):\n        self.$v3 = $v3\n        self.$x =",
            "    def __init__(self, $v, $v2=None):\n        self.$x =",
            "class $cls($cls2):\n    def __init__(self, $v, $v2):\n        self.$x =",
            "    def __init__(self, $v3, $v, $v2):\n        self.$v3 = $v3\n        self.$x =",
            "    def __init__(self, $v, $v2):\n        $cls.__init__(self)\n        self.$x =",
            "    def __init__(self, $v, $v2, *args):\n        self.$x =",
        ),
        validation=(
            "class $cls(object):\n    def __init__(self, $v, $v2):\n        self.$x =",
            "    def __init__(self, $v, $v2=None, $v3=None):\n        self.$x =",
            "    def __init__(self, *, $v, $v2):\n        self.$x =",
            "    def __init__(self, $v, $v2):\n        # $name\n        self.$x =",
        ),
        test=(
            "class $cls:\n\n    def __init__(self, $v, $v2, $v3):\n        self.$x =",
            "    def __init__(self, $v, $v2, **kw):\n        self.$x =",
            "    def __init__(self, $v, $v2):\n        super().__init__()\n        self.$x =",
            "    def __init__(self, $v, $v2):\n        self.$name = None\n        self.$x =",
            "    def __init__(self, $v3, $v, $v2):\n        self.$f($v3)\n        self.$x =",
            "    def __init__(self, $v, $v2, $name=0):\n        self.$x =",
            "    def setup(self, $v, $v2):\n        self.$x =",
            "    def __init__(self, /, $v, $v2):\n        self.$x =",
        ),
    ),
    filler=FILLER,
)

VAR_SWAP = Recipe(
    meaning="a swap ends with the variable that it began with",
    differs={"x": ("$v", "$v2"), "y": ("$v2", "$v")},
    targets=((" $v", " $v2"),),
    settings=ANYWHERE,
    forms=PerSplit(
        train=("$x, $y = $y,", "if $v > $v2:\n    $x, $y = $y,", "$f()\n$x, $y = $y,"),
        validation=("$v = $v2 = 1\n$x, $y = $y,",),
        test=("assert $v and $v2\n$x, $y = $y,", "for $v3 in $list:\n    $x, $y = $y,"),
    ),
    filler=FILLER,
)
