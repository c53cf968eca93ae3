"""What may come before a sentence of English, and sentences that say nothing of any task."""

from __future__ import annotations

from sparse.tasks.recipe import PerSplit

AFTER = PerSplit(
    train=(
        "$form",
        "In the end, $form",
        "On the first day, $form",
        "It was late, and $form",
        "In the city, $form",
        "As usual, $form",
        "Before dinner, $form",
        "In the morning, $form",
        "The sun was up, and $form",
        "In this case, $form",
        "At first, $form",
        "Of course, $form",
    ),
    validation=(
        "For example, $form",
        "At noon, $form",
        "It was cold, and $form",
        "By the way, $form",
        "In the summer, $form",
        "As we know, $form",
        "All was quiet, and $form",
        "With some luck, $form",
    ),
    test=(
        "In the evening, $form",
        "That is all: $form",
        "It rained again, and $form",
        "On the other hand, $form",
        "Not long ago, $form",
        "To be clear, $form",
        "At the same time, $form",
        "Here is the story: $form",
        "After a while, $form",
        "In other words, $form",
    ),
)
"""Settings for a sentence that begins with a name."""

FILLER = (
    "So much for that. ",
    "One more thing. ",
    "A few words first. ",
    "No doubt about it. ",
    "First things first. ",
    "Just a note. ",
    "Nothing new here. ",
    "A quick word. ",
    "More on this below. ",
    "Back to the story. ",
    "An example. ",
    "In short. ",
)
"""Texts for `Task.filler`: neither person nor number nor time."""
