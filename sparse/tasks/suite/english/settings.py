"""What may come before a sentence of English, and sentences that say nothing of any task."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit

AFTER = PerSplit(
    train=(
        "$form",
        "In the end, $form",
        "On the first day, $form",
        "It was late. $form",
        "In the city, $form",
        "As usual, $form",
        "Before dinner, $form",
        "In the morning, $form",
        "The sun was up. $form",
        "In this case, $form",
        "At first, $form",
        "Of course, $form",
    ),
    validation=(
        "For example, $form",
        "At noon, $form",
        "It was cold. $form",
        "By the way, $form",
        "In the summer, $form",
        "As we know, $form",
        "All was quiet. $form",
        "With some luck, $form",
    ),
    test=(
        "In the evening, $form",
        "That is all: $form",
        "It rained again. $form",
        "On the other hand, $form",
        "Not long ago, $form",
        "To be clear, $form",
        "At the same time, $form",
        "Here is the story. $form",
        "After a while, $form",
        "In other words, $form",
    ),
)
"""Settings for a sentence that begins with a name."""

FILLER = (
    "The sky was blue. ",
    "It was a long day. ",
    "There was nothing to see. ",
    "The road was empty. ",
    "Time went by. ",
    "The wind was strong. ",
    "The lights were on. ",
    "It was half past nine. ",
    "Snow lay on the hills. ",
    "The windows were open. ",
    "The air was warm. ",
    "The street was wet. ",
)
"""Texts for `Task.filler`."""
