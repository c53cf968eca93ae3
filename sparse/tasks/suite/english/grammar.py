"""Tasks about grammar: tense, articles, agreement and the end of a sentence."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit, Recipe

from .settings import AFTER, FILLER

TENSE = Recipe(
    meaning="what happened yesterday stands in the past, what happens today in the present",
    differs={
        "a": ("Yesterday", "Today"),
        "b": ("Last year", "This year"),
        "c": ("Last week", "This week"),
        "d": ("In the past", "At the moment"),
        "e": ("Some time ago", "These days also"),
        "g": ("At that time", "At this time"),
        "h": ("Until last month", "Since last month"),
    },
    targets=((" was", " is"),),
    forms=PerSplit(
        train=tuple(
            f"${kind} the {what}"
            for kind in ("a", "b", "c")
            for what in ("$noun", "old $noun", "$noun of $man", "$noun in the $place")
        ),
        validation=tuple(
            f"${kind} the {what}"
            for kind in ("d", "e")
            for what in ("big $noun", "$noun from the $place", "$noun of $woman", "new $noun")
        ),
        test=tuple(
            f"${kind} the {what}"
            for kind in ("g", "h")
            for what in (
                "small $noun",
                "$noun near the $place",
                "$noun with the $thing",
                "first $noun",
            )
        ),
    ),
    ending=" here. ",
    filler=FILLER,
)

A_AN = Recipe(
    meaning="after `an` comes a word that begins with a vowel, after `a` another",
    differs={"a": ("an", "a")},
    targets=((" $vowel", " $consonant"),),
    settings=AFTER,
    forms=PerSplit(
        train=("$man saw $a", "there is $a", "this was $a", "$woman talked about $a"),
        validation=("$man found $a", "that is not $a"),
        test=("$woman wanted $a", "it must be $a", "they looked for $a"),
    ),
    ending=". ",
    filler=FILLER,
)

AGREEMENT = Recipe(
    meaning="one thing is, several things are",
    differs={"what": ("$noun", "$nouns")},
    targets=((" is", " are"), (" was", " were"), (" has", " have")),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "the $what",
            "the old $what",
            "the $what of $man",
            "the $what in the $place",
            "the $what that $woman likes",
        ),
        validation=("the new $what", "the $what from the $place"),
        test=("the other $what", "the $what near the $place", "the $what with the $thing"),
    ),
    ending=" here. ",
    filler=FILLER,
)

QUESTION_MARK = Recipe(
    meaning="a question ends with a question mark, a statement with a full stop",
    targets=(("?", "."),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            ("where is the $noun", "here is the $noun"),
            ("is $man at the $place", "$man is at the $place"),
            ("who has the $thing", "$woman has the $thing"),
            ("why did $man go to the $place", "then $man did go to the $place"),
        ),
        validation=(
            ("was $woman at the $place", "$woman was at the $place"),
            ("where are the $nouns", "there are the $nouns"),
        ),
        test=(
            ("can $man see the $noun", "$man can see the $noun"),
            ("what is in the $place", "it is in the $place"),
            ("does $woman like the $thing", "$woman does like the $thing"),
        ),
    ),
    ending=" ",
    filler=FILLER,
)
