"""Tasks about people in a sentence: who is meant."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit, Recipe

from .settings import AFTER, FILLER

PRONOUN = Recipe(
    meaning="a man is `he`, a woman is `she`",
    differs={"who": ("$man", "$woman")},
    targets=((" he", " she"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "$who went to the $place because",
            "$who was happy, and",
            "when $who came to the $place,",
            "$who lost the $thing, so",
            "$who said that",
        ),
        validation=("$who left the $place when", "if $who has the $thing,"),
        test=("$who stayed at the $place until", "while $who held the $thing,", "$who knows what"),
    ),
    ending=" was right. ",
    filler=FILLER,
)

POSSESSIVE = Recipe(
    meaning="what a man owns is `his`, what a woman owns is `her`",
    differs={"who": ("$man", "$woman")},
    targets=((" his", " her"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "$who lost",
            "$who went to the $place with",
            "$who could not find",
            "$who sold the $thing and",
        ),
        validation=("$who came back with", "$who took the $thing out of"),
        test=("$who put the $thing into", "$who left the $place with", "$who forgot"),
    ),
    ending=" things. ",
    filler=FILLER,
)

IOI_SIMPLE = Recipe(
    meaning="of two people, the one who does not give is given to",
    family="ioi",
    differs={"giver": ("$man", "$woman")},
    targets=((" $woman", " $man"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "$man and $woman went to the $place, and $giver gave a $thing to",
            "$woman and $man went to the $place, and $giver gave a $thing to",
            "$man and $woman were at the $place. $giver showed the $thing to",
            "$woman and $man were at the $place. $giver showed the $thing to",
        ),
        validation=(
            "when $man and $woman met at the $place, $giver handed the $thing to",
            "when $woman and $man met at the $place, $giver handed the $thing to",
        ),
        test=(
            "$man and $woman had fun at the $place, so $giver sent a $thing to",
            "$woman and $man had fun at the $place, so $giver sent a $thing to",
        ),
    ),
    ending=". ",
    filler=FILLER,
)

IOI_RELAXED = Recipe(
    meaning="of two people, the pronoun means the one who is done to",
    family="ioi",
    differs={"one": ("$man", "$woman"), "two": ("$woman", "$man")},
    targets=((" him", " her"),),
    settings=AFTER,
    forms=PerSplit(
        train=(
            "when $one looked lost, $two helped",
            "$one came to the $place, and $two greeted",
            "$one needed a $thing, and $two gave it to",
            "because $one was sad, $two talked to",
        ),
        validation=("when $one was late, $two called", "$one was at the $place, and $two met"),
        test=(
            "while $one was waiting, $two watched",
            "$one asked for the $thing, and $two brought it to",
            "as $one left the $place, $two followed",
        ),
    ),
    ending=". ",
    filler=FILLER,
)
