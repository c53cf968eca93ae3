"""A pair: two contexts that differ in one property, and the text that shows the property.

context_1   self.width = "red     ->  target_1   "        the prompt ends where the context ends,
context_2   self.width = 'red     ->  target_2   '        and its last token is the scored position
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sparse.storage.records import checked

Targets = tuple[str, str | None]
"""What follows context_1 and what follows context_2; None means "anything but the first"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two contexts that differ in one property, each with the text that should follow it.

    The scored position is that of the context's last token: there the model says what comes next.
    A tokenizer must make equally many tokens of both contexts and one token of each target;
    `Task.batch` checks that.
    """

    context_1: str
    """The first prompt, up to and with the token after which it is scored."""
    context_2: str
    """The second prompt."""
    target_1: str
    """What should follow context_1."""
    target_2: str | None
    """What should follow context_2. None means: anything but target_1 (a one-sided pair)."""
    groups: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What this pair shares with others: {factor: level}, for example {"frame": "x = {word}",
    "word": "red"}. Pairs of one level are not independent of each other."""


def pair_of(values: Mapping[str, Any], where: str) -> Pair:
    """Return the pair with these fields; `where` names the place in the errors.

    Contexts and target_1 must be non-empty texts, target_2 too or None, and groups a dict of texts.
    Raises ValueError, with the field and the remedy.
    """
    given = checked(Pair, values, where)
    needed = ("context_1", "context_2", "target_1", "target_2")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(
            f"{where}: {missing} missing; a pair has {list(needed)}, and may have split and groups"
        )
    for f in fields(Pair):
        if f.name == "groups":
            continue
        text = given.get(f.name)
        if not (isinstance(text, str) and text) and not (f.name == "target_2" and text is None):
            rest = ", or null for 'anything but target_1'" if f.name == "target_2" else ""
            raise ValueError(f"{where}: {f.name} is {text!r}; it must be a non-empty string{rest}")
    groups = given.get("groups", {})
    if not isinstance(groups, Mapping) or not all(
        isinstance(text, str) for item in groups.items() for text in item
    ):
        raise ValueError(
            f"{where}: groups is {groups!r}; it must be an object of texts, such as "
            '{"frame": "x = WORD", "word": "red"}'
        )
    return Pair(**{**given, "groups": dict(groups)})
