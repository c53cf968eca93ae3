"""How a built-in task is made: a recipe of contexts and candidate targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Contexts = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one built-in task is made."""

    meaning: str
    targets: tuple[tuple[str, str], ...]
    """Candidate targets in order of preference; the first that a tokenizer can express is used."""
    contexts: Callable[[int], list[Contexts]]
    """The pairs of contexts of split 0 (train), 1 (validation) or 2 (test)."""
