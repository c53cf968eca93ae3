"""A number beside its control: the record every result of this library is made of.

gap       value - control,                 control = mean over its draws
stderr    of the gap, over the n prompts (or blocks), the draws held fixed
interval  95 % of the gap under resampling of the prompts, value and control together
rank      how many draws the value beats, in the direction `better`
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from sparse.storage.records import checked

Unit = Literal[
    "nats",
    "nats per token",
    "fraction",
    "probability",
    "logits",
    "cosine",
    "ratio",
    "nodes",
    "edges",
]
Better = Literal["higher", "lower"]
Outcome = Literal["beats", "worse", "indistinguishable"]
"""What a score allows one to say: better than its control, worse, or neither."""
LEVEL = 0.95
"""Share of draws to beat, and coverage of the interval."""
RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One line of a report: what was measured, beside what it would be without the cause.

    Give `draws`, or `control` alone when there is one draw. `rank`, `outcome` and, in words,
    `verdict` follow.

    >>> score = Score(key="steering", name="P(other)", unit="probability", value=0.7, n=64,
    ...               stderr=0.01, draws=tuple(i / 1000 for i in range(100)),
    ...               control_name="random rotations")
    >>> score.outcome, score.rank, score.verdict
    ('beats', 100, 'beats 100 of 100 random rotations')
    """

    name: str
    """What was measured, for a reader."""
    key: str = ""
    """What was measured, for a program: the same in every report, whatever the wording; parts are
    joined by points. By default made of the name."""
    unit: Unit
    value: float
    """Mean over the n prompts or blocks."""
    control: float = math.nan
    """The same measurement with the cause removed: the mean of `draws`."""
    control_name: str = "its control"
    """What was drawn, in the plural when there are several: "random directions"."""
    draws: tuple[float, ...] = ()
    """The control's value in every draw."""
    stderr: float
    """Standard error of `value - control` over the n prompts."""
    interval: tuple[float, float] = (math.nan, math.nan)
    """95 % interval of `value - control`; without one, plus and minus 1.96 stderr."""
    n: int
    """Independent prompts (pairs) or blocks averaged over; 1 for a count."""
    better: Better = "higher"
    detail: dict[str, Any] = field(default_factory=dict)
    """Further facts for the report, as plain JSON."""
    rank: int = field(init=False)
    """How many draws the value beats."""
    outcome: Outcome = field(init=False)
    verdict: str = field(init=False)
    """The outcome in words."""

    def __post_init__(self) -> None:
        draws = tuple(self.draws) or (() if math.isnan(self.control) else (self.control,))
        if not draws:
            raise ValueError(
                f"score {self.name!r} has no control; a number is reported only beside the same "
                "measurement without its cause: give control= or draws="
            )
        mean = math.fsum(draws) / len(draws)
        control = mean if math.isnan(self.control) else self.control
        interval = tuple(self.interval)
        if all(math.isnan(end) for end in interval):
            half = 1.96 * self.stderr
            interval = (self.value - control - half, self.value - control + half)
        set_ = object.__setattr__
        set_(self, "key", self.key or key_of(self.name))
        set_(self, "draws", draws)
        set_(self, "control", control)
        set_(self, "interval", interval)
        self._check(mean)
        set_(self, "rank", sum(self._beats(draw) for draw in draws))
        set_(self, "outcome", self._outcome())
        set_(self, "verdict", self._verdict())

    def _check(self, mean: float) -> None:
        for name, allowed in (("unit", get_args(Unit)), ("better", get_args(Better))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"score {self.name!r}: {name} is {getattr(self, name)!r}; one of {allowed}"
                )
        numbers = {"value": [self.value], "draws": self.draws, "stderr": [self.stderr]}
        numbers |= {"control": [self.control], "interval": self.interval}
        for name, values in numbers.items():
            if bad := [x for x in values if not math.isfinite(x)]:
                raise ValueError(
                    f"score {self.name!r}: {name} holds {bad[0]}; every number must be finite, so "
                    "find where the measurement broke down"
                )
        if not math.isclose(self.control, mean, rel_tol=1e-9, abs_tol=1e-12):
            raise ValueError(
                f"score {self.name!r}: control {self.control} is not the mean of its draws, {mean}"
            )
        if self.n < 1 or self.stderr < 0 or self.interval[0] > self.interval[1]:
            raise ValueError(
                f"score {self.name!r}: n={self.n} must be at least 1, stderr={self.stderr} at "
                f"least 0, and interval {self.interval} in order"
            )
        json.dumps(self.detail, allow_nan=False)  # a ValueError if it is not plain and finite

    def _beats(self, draw: float) -> bool:
        return self.value > draw if self.better == "higher" else self.value < draw

    @property
    def n_draws(self) -> int:
        """Number of draws of the control."""
        return len(self.draws)

    @property
    def gap(self) -> float:
        """Return `value - control`, in `unit`."""
        return self.value - self.control

    @property
    def beaten_by(self) -> int:
        """How many draws beat the value; ties count for neither."""
        ties = sum(draw == self.value for draw in self.draws)
        return self.n_draws - self.rank - ties

    def _outcome(self) -> Outcome:
        """Return what `interval` and `rank` together allow (docs/method.md#scores).

        Among k exchangeable draws the value beats ceil(0.95 (k + 1)) or more with probability at
        most 5 %; with fewer than 19 draws it must beat all. And the interval must leave out 0.
        """
        k = self.n_draws
        enough = min(k, math.ceil(LEVEL * (k + 1)))
        low, high = self.interval if self.better == "higher" else [-x for x in self.interval[::-1]]
        if low > 0 and self.rank >= enough:
            return "beats"
        if high < 0 and self.beaten_by >= enough:
            return "worse"
        return "indistinguishable"

    def _verdict(self) -> str:
        """Say the outcome in plain words, with the count of draws where there are several."""
        k, name = self.n_draws, self.control_name
        if self.outcome == "beats":
            return f"beats {self.rank} of {k} {name}" if k > 1 else f"better than {name}"
        if self.outcome == "worse":
            count = f"{self.beaten_by} of {k} " if k > 1 else ""
            return f"worse than its control ({count}{name})"
        count = f"beats {self.rank} of {k} " if k > 1 else ""
        return f"not distinguishable from its control ({count}{name})"

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain values; `from_dict` is its inverse."""
        values = asdict(self)
        return values | {"draws": list(self.draws), "interval": list(self.interval)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], lacking: Collection[str] = ()) -> Score:
        """Read what `to_dict` wrote; a missing, unknown or contradictory entry is an error.

        `lacking` are fields that the file is too old to have.
        """
        values = checked(cls, values, "score", complete=True, besides=lacking)
        given = {f.name: values[f.name] for f in fields(cls) if f.init}
        given |= {"draws": tuple(values["draws"]), "interval": tuple(values["interval"])}
        score = cls(**given)
        for name in ("rank", "outcome", "verdict"):
            if name not in lacking and values[name] != getattr(score, name):
                raise ValueError(
                    f"score {score.name!r}: the file says {name} {values[name]!r}, its numbers say "
                    f"{getattr(score, name)!r}; the file was edited, so run the evaluation again"
                )
        return score


def key_of(name: str) -> str:
    """Return a key made of a name: its words in lower case, joined by underscores.

    >>> key_of("site 0: KL, dense to sparse")
    'site_0_kl_dense_to_sparse'
    """
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))
