"""Tasks about numbers and facts."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit, Recipe

from .settings import AFTER, FILLER

GREATER_THAN = Recipe(
    meaning="which of two numbers is the greater one",
    differs={
        "a": ("larger", "smaller"),
        "b": ("higher", "lower"),
        "c": ("greater", "lesser"),
        "d": ("highest", "lowest"),
        "e": ("maximum", "minimum"),
    },
    targets=(("$more", "$less"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "of $$$less and $$$more, the $a amount is $$",
            "of $$$more and $$$less, the $a amount is $$",
            "the bids were $$$less and $$$more. The $b one was $$",
            "the bids were $$$more and $$$less. The $b one was $$",
        ),
        validation=(
            "one $thing costs $$$less, the other $$$more. The $c price is $$",
            "one $thing costs $$$more, the other $$$less. The $c price is $$",
        ),
        test=(
            "prices went from $$$less to $$$more. The $d was $$",
            "prices went from $$$more to $$$less. The $d was $$",
            "with $$$less and $$$more on offer, the $e is $$",
            "with $$$more and $$$less on offer, the $e is $$",
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
        validation=(
            "the government of $land1 sits in its capital,",
            "what people call the capital of $land1 is",
        ),
        test=(
            "as the capital of $land1, they chose",
            "the seat of government of $land1 is the city of",
        ),
    ),
    ending=". ",
    filler=FILLER,
)
