"""Tasks about numbers and facts."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit, Recipe

from .settings import AFTER, FILLER

GREATER_THAN = Recipe(
    meaning="what rises ends above its start, what falls below it",
    differs={
        "rose": ("rose", "fell"),
        "up": ("up", "down"),
        "more": ("more", "less"),
        "grew": ("grew", "shrank"),
        "gained": ("gained", "lost"),
        "above": ("above", "below"),
        "higher": ("higher", "lower"),
    },
    targets=(("$high", "$low"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "the price of the $thing $rose from $$$middle to $$",
            "the $thing went $up from $$$middle to $$",
            "for the $thing he paid $more than $$$middle, namely $$",
        ),
        validation=(
            "the fund for the $thing $grew from $$$middle to $$",
            "the $thing $gained, from $$$middle to $$",
        ),
        test=(
            "the $thing stayed $above $$$middle, at $$",
            "the bid for the $thing was $higher than $$$middle: $$",
            "the $thing has a $higher price: it was $$$middle and is $$",
        ),
    ),
    ending=". ",
    filler=FILLER,
)

CAPITAL = Recipe(
    meaning="the capital of a country",
    differs={"land1": ("$land", "$land2")},
    targets=((" $city", " $city2"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "the capital of $land1 is",
            "the capital city of $land1 is called",
            "people in $land1 often visit their capital,",
            "$man works in the capital of $land1, in",
        ),
        validation=("the government of $land1 sits in", "the best known city in $land1 is"),
        test=("as the capital of $land1, they chose", "the largest city of $land1 is"),
    ),
    ending=". ",
    filler=FILLER,
)
