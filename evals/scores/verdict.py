"""A claim: what was said of a circuit, the conditions that could have refuted it, one verdict.

    one condition fails                   negative
    else one condition is open            cannot tell
    else all hold                         positive

A condition compares one number of the claim with a threshold, with the draws of an empty control,
or with a rival measured on the same pairs. Nothing is corrected within a claim, because every
condition must hold (docs/method.md#claims).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from sparse.storage.records import checked

from .clusters import FEWEST, Resampled
from .score import LEVEL, Better, Unit

Kind = Literal["sufficient", "necessary", "carries", "needed"]
Test = Literal["threshold", "premise", "rank", "interval"]
State = Literal["holds", "fails", "open"]
Verdict = Literal["positive", "negative", "cannot tell"]
STATEMENTS: dict[Kind, str] = {
    "sufficient": "in the sparse model the circuit alone does the task, as the model does it",
    "necessary": "the sparse model needs the circuit for the task",
    "carries": "in the dense model the circuit carries what the task is about, and little else",
    "needed": "the dense model needs the circuit, for this task more than for others",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One thing that must hold for a claim, computed from its numbers.

    - "threshold": the value is at least (`better` "higher") or at most ("lower") `against`.
    - "premise": a threshold without which the claim means nothing; missed, it is open.
    - "rank": p = (1 + number of draws at least as good as the value) / (k + 1) is at most 0.05.
    - "interval": the 95 % interval of value minus `against` lies wholly on the better side. It is
      open where the interval holds 0, or where clusters are too few for an interval.

    Make one with `threshold`, `premise`, `outranks` or `favours`.
    """

    key: str
    """For programs, such as "rival.embedding". It stays the same when the wording changes."""
    name: str
    """What must hold, in words for a reader."""
    test: Test
    unit: Unit
    value: float
    against: float
    """The threshold, the largest of the draws, or the rival's number."""
    better: Better
    draws: tuple[float, ...] = ()
    """The empty control's value in every draw, for a rank."""
    interval: tuple[float, float] | None = None
    """95 % interval of value minus `against`, for an interval; None: too few clusters."""
    factor: str = ""
    """The factor whose clusters the interval comes from."""
    n_clusters: int = 0
    detail: dict[str, Any] = field(default_factory=dict)
    """Further facts, as plain JSON."""
    p: float | None = field(init=False)
    """The p of a rank; None for another test."""
    state: State = field(init=False)
    reason: str = field(init=False)
    """Why it fails or is open, in words; "" where it holds."""

    def __post_init__(self) -> None:
        given = [self.value, self.against, *self.draws, *(self.interval or ())]
        if not all(math.isfinite(x) for x in given):
            raise ValueError(f"condition {self.key!r} holds NaN or infinity; find where it broke")
        for name, allowed in (("test", Test), ("unit", Unit), ("better", Better)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"condition {self.key!r}: {name} is {getattr(self, name)!r}; one of "
                    f"{get_args(allowed)}"
                )
        if (self.test == "rank") != bool(self.draws):
            raise ValueError(
                f"condition {self.key!r}: draws belong to a rank, and a rank needs some"
            )
        json.dumps(self.detail, allow_nan=False)
        set_ = object.__setattr__
        set_(self, "p", self._p())
        set_(self, "state", self._state())
        set_(self, "reason", "" if self.state == "holds" else self._reason())

    @property
    def margin(self) -> float:
        """How far the value is on the better side of `against`, in `unit`; negative if worse."""
        gap = self.value - self.against
        return gap if self.better == "higher" else -gap

    def _p(self) -> float | None:
        if self.test != "rank":
            return None
        sign = 1 if self.better == "higher" else -1
        as_good = sum(sign * draw >= sign * self.value for draw in self.draws)
        return (1 + as_good) / (len(self.draws) + 1)

    def _state(self) -> State:
        if self.test in ("threshold", "premise"):
            missed: State = "fails" if self.test == "threshold" else "open"
            return "holds" if self.margin >= 0 else missed
        if self.p is not None:
            if self.p <= 1 - LEVEL + 1e-12:
                return "holds"
            return "open" if len(self.draws) < math.ceil(1 / (1 - LEVEL) - 1e-9) - 1 else "fails"
        if self.interval is None:
            return "open"
        low, high = self.interval
        if self.better == "lower":
            low, high = -high, -low
        return "holds" if low > 0 else "fails" if high < 0 else "open"

    def _reason(self) -> str:
        shown = f"{self.name}: {self.value:.4g} beside {self.against:.4g} {self.unit}"
        if self.p is not None:
            few = ", too few draws to tell" if self.state == "open" else ""
            return f"{self.name}: p = {self.p:.3g} of {len(self.draws)} draws{few}"
        if self.test != "interval":
            return shown
        if self.interval is None:
            return (
                f"{shown}; {self.n_clusters} clusters ({self.factor}) give no interval, at least "
                f"{FEWEST} are needed"
            )
        low, high = self.interval
        return f"{shown}; 95 % interval of the difference {low:+.3g} to {high:+.3g}{self._needs()}"

    def _needs(self) -> str:
        """Return how many clusters would be needed to tell, as words, where that can be said."""
        if self.state != "open" or self.interval is None or self.margin <= 0:
            return ""
        low, high = self.interval
        worst = low if self.better == "higher" else -high
        n = math.ceil(self.n_clusters * ((self.margin - worst) / self.margin) ** 2)
        return f"; about {n} clusters ({self.factor}) would tell, here are {self.n_clusters}"

    def to_dict(self) -> dict[str, Any]:
        """Return the condition as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Condition:
        """Return the condition that `to_dict` wrote, checked against its own numbers."""
        values = checked(cls, values, "condition", complete=True)
        given = {f.name: values[f.name] for f in fields(cls) if f.init}
        given["draws"] = tuple(given["draws"])
        given["interval"] = given["interval"] and tuple(given["interval"])
        made = cls(**given)
        _agree(made, values, ("p", "state", "reason"), f"condition {made.key!r}")
        return made


def threshold(
    key: str, name: str, value: float, against: float, unit: Unit, better: Better, **detail: Any
) -> Condition:
    """Return the condition that a value reaches a threshold."""
    return Condition(
        key=key, name=name, test="threshold", unit=unit, value=value, against=against,
        better=better, detail=detail,
    )  # fmt: skip


def premise(
    key: str, name: str, value: float, against: float, unit: Unit, better: Better, **detail: Any
) -> Condition:
    """Return the condition without which the claim means nothing: missed, one cannot tell."""
    return replace(threshold(key, name, value, against, unit, better, **detail), test="premise")


def outranks(
    key: str,
    name: str,
    value: float,
    draws: Sequence[float],
    unit: Unit,
    better: Better,
    **detail: Any,
) -> Condition:
    """Return the condition that a value outranks the draws of an empty control, p <= 0.05."""
    if not draws:
        raise ValueError(
            f"condition {key!r}: a rank needs draws of an empty control; draw at least 1"
        )
    best = max(draws) if better == "higher" else min(draws)
    return Condition(
        key=key, name=name, test="rank", unit=unit, value=value, against=best, better=better,
        draws=tuple(draws), detail=detail,
    )  # fmt: skip


def favours(
    key: str,
    name: str,
    difference: Resampled,
    against: float,
    unit: Unit,
    better: Better,
    **detail: Any,
) -> Condition:
    """Return the condition that a difference from a rival lies on the better side of 0.

    `difference` is the claim's number minus the rival's, `against` the rival's.
    """
    ends = difference.interval()
    return Condition(
        key=key, name=name, test="interval", unit=unit, value=against + difference.value,
        against=against, better=better, interval=ends and (ends.low, ends.high),
        factor=difference.factor, n_clusters=difference.n_clusters, detail=detail,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What was said of a circuit for one task, its conditions, and the one verdict they give."""

    kind: Kind
    task: str
    value: float
    """The number that the claim is about: a loss, a harm or a share."""
    unit: Unit
    conditions: tuple[Condition, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    """What a reader needs beside the verdict, as plain JSON: sites, sizes, references."""
    outcome: Verdict = field(init=False)
    reason: str = field(init=False)
    """The conditions that fail, or else those that are open, in words; "" if it is positive."""

    def __post_init__(self) -> None:
        if self.kind not in STATEMENTS or not self.conditions:
            raise ValueError(
                f"claim {self.kind!r} for {self.task!r}: the kind must be one of "
                f"{tuple(STATEMENTS)}, and it needs conditions that could refute it"
            )
        keys = [condition.key for condition in self.conditions]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"claim {self.key!r} has the conditions {twice} twice; rename one")
        if not math.isfinite(self.value):
            raise ValueError(f"claim {self.key!r} holds NaN or infinity; find where it broke")
        json.dumps(self.facts, allow_nan=False)
        states = [condition.state for condition in self.conditions]
        outcome = "cannot tell" if "open" in states else "positive"
        outcome = "negative" if "fails" in states else outcome
        worst = {"negative": "fails", "cannot tell": "open", "positive": ""}[outcome]
        reasons = [c.reason for c in self.conditions if c.state == worst]
        object.__setattr__(self, "outcome", outcome)
        object.__setattr__(self, "reason", "; and ".join(reasons))

    @property
    def key(self) -> str:
        """The claim as an identifier, such as "carries/single_double_quote"."""
        return f"{self.kind}/{self.task}"

    @property
    def statement(self) -> str:
        """What was claimed, in words."""
        return STATEMENTS[self.kind]

    @property
    def p(self) -> float | None:
        """The largest p of its ranks; None where it has none."""
        return max((c.p for c in self.conditions if c.p is not None), default=None)

    @property
    def hardest(self) -> Condition:
        """The condition that decides: the first that fails, else is open, else the closest rival.

        A rival is close where its margin is small beside the half width of its interval.
        """
        for state in ("fails", "open"):
            for condition in self.conditions:
                if condition.state == state:
                    return condition
        with_rival = [c for c in self.conditions if c.interval is not None]
        return min(with_rival or self.conditions, key=_closeness)

    def __getitem__(self, key: str) -> Condition:
        """Return the condition of this key."""
        for condition in self.conditions:
            if condition.key == key:
                return condition
        raise KeyError(f"claim {self.key} has no condition {key!r}; it has "
                       f"{[c.key for c in self.conditions]}")  # fmt: skip

    def __str__(self) -> str:
        head = f"{self.key}: {self.outcome} ({self.value:.3g} {self.unit})"
        return f"{head}: {self.reason}" if self.reason else head

    def to_dict(self) -> dict[str, Any]:
        """Return the claim as plain JSON values; `from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"conditions": [condition.to_dict() for condition in self.conditions]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Claim:
        """Return the claim that `to_dict` wrote, checked against its own conditions."""
        values = checked(cls, values, "claim", complete=True)
        given = {f.name: values[f.name] for f in fields(cls) if f.init}
        given["conditions"] = tuple(Condition.from_dict(c) for c in given["conditions"])
        made = cls(**given)
        _agree(made, values, ("outcome", "reason"), f"claim {made.key!r}")
        return made


def _closeness(condition: Condition) -> float:
    if condition.interval is None:
        return math.inf
    half = (condition.interval[1] - condition.interval[0]) / 2
    return condition.margin / max(half, 1e-12)


def _agree(made: Any, values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if values[name] != getattr(made, name):
            raise ValueError(
                f"{where}: the file says {name} {values[name]!r}, its numbers say "
                f"{getattr(made, name)!r}; the file was edited, so run the evaluation again"
            )


def false_positives(claims: Sequence[Claim]) -> float:
    """Return how many of the claims would be positive by chance at most, were all of them empty.

    Every claim has a rank that an empty one passes with a probability of at most 0.05.
    """
    return (1 - LEVEL) * sum(claim.p is not None for claim in claims)


def q_values(claims: Sequence[Claim]) -> dict[str, float]:
    """Return {claim's key: q}, p adjusted for the number of claims (Benjamini and Hochberg 1995).

        q of the i-th smallest p = min over j >= i of  p_j n / j

    Of the claims with q <= 0.05, one in twenty at most is expected to be empty.
    """
    ranked = sorted((c.p, c.key) for c in claims if c.p is not None)
    found, smallest = {}, 1.0
    for j in range(len(ranked), 0, -1):
        p, key = ranked[j - 1]
        smallest = min(smallest, p * len(ranked) / j)
        found[key] = smallest
    return found
