"""A number beside its control: every result of this library is such a record.

gap       value - control,                 control = mean over its draws
stderr    of the gap, over the n prompts (or blocks), the draws held fixed
interval  95 % of the gap under resampling of the prompts, value and control together
rank      how many draws the value beats, in the direction `better`
outcome   "beats", "worse" or "indistinguishable", from interval and rank

The control is the same measurement without the cause that the claim is about: bridges that were
never trained, random circuits, random directions. It is drawn once or several times.
"""

from __future__ import annotations

import json
import math
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
    "pairs",
    "circuits",
    "tasks",
    "levels",
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
    """One row of a report: a measurement beside the same measurement without its cause.

    Give `draws`, or `control` alone when there is one draw. `rank` and `outcome` are computed from
    the numbers (docs/method.md#scores); a verdict belongs to a `Claim`. Raises ValueError where
    there is no control, a number is not finite, or the numbers contradict each other.

    >>> score = Score(key="steering", name="P(other)", unit="probability", value=0.7, n=64,
    ...               stderr=0.01, draws=tuple(i / 1000 for i in range(100)),
    ...               control_name="random rotations")
    >>> score.outcome, score.rank, score.n_draws
    ('beats', 100, 100)
    """

    name: str
    """What was measured, in words for a reader."""
    key: str = ""
    """What was measured, as an identifier for a program, such as "transfer.ablation.nodes". It
    stays the same when the wording of `name` changes. By default it is the name."""
    unit: Unit
    value: float
    """Mean over the n prompts or blocks."""
    control: float = math.nan
    """The same measurement without the cause: the mean of `draws`."""
    control_name: str = "its control"
    """What the control is, in the plural when there are several draws: "random directions"."""
    draws: tuple[float, ...] = ()
    """The control's value in every draw."""
    stderr: float
    """Standard error of `value - control` over the n prompts."""
    interval: tuple[float, float] = (math.nan, math.nan)
    """95 % interval of `value - control`; without one, plus and minus 1.96 stderr."""
    n: int
    """Number of independent prompts, pairs or blocks that were averaged over; 1 for a count."""
    better: Better = "higher"
    detail: dict[str, Any] = field(default_factory=dict)
    """Further facts for the report, as plain JSON."""
    rank: int = field(init=False)
    """How many draws the value beats."""
    outcome: Outcome = field(init=False)
    """What interval and rank allow one to say, for a program to test."""

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
        set_(self, "key", self.key or self.name)
        set_(self, "draws", draws)
        set_(self, "control", control)
        set_(self, "interval", interval)
        self._check(mean)
        set_(self, "rank", sum(self._beats(draw) for draw in draws))
        set_(self, "outcome", self._outcome())

    def _check(self, mean: float) -> None:
        for name in ("name", "key"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"score {self.name!r}: {name} {getattr(self, name)!r} is no text")
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
        """Number of draws that beat the value; a tie counts neither here nor in `rank`."""
        ties = sum(draw == self.value for draw in self.draws)
        return self.n_draws - self.rank - ties

    def _outcome(self) -> Outcome:
        """Return the outcome that `interval` and `rank` together allow (docs/method.md#scores).

        "beats" needs two things. The interval of the gap must lie on the better side of 0. And the
        value must beat at least ceil(0.95 (k + 1)) of the k draws: one more draw of the control
        would do that with a probability of at most 5 %. With fewer than 19 draws, where this
        number is above k, it must beat all of them. "worse" needs the same on the other side.
        """
        k = self.n_draws
        enough = min(k, math.ceil(LEVEL * (k + 1)))
        low, high = self.interval if self.better == "higher" else [-x for x in self.interval[::-1]]
        if low > 0 and self.rank >= enough:
            return "beats"
        if high < 0 and self.beaten_by >= enough:
            return "worse"
        return "indistinguishable"

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain values; `from_dict` reads them back."""
        values = asdict(self)
        return values | {"draws": list(self.draws), "interval": list(self.interval)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], lacking: Collection[str] = ()) -> Score:
        """Return the score that `to_dict` wrote.

        `lacking` are computed fields that the file is too old to have. Raises ValueError for a
        missing or unknown entry, and where rank or outcome contradict the numbers.
        """
        values = checked(cls, values, "score", complete=True, besides=lacking)
        given = {f.name: values[f.name] for f in fields(cls) if f.init}
        given |= {"draws": tuple(values["draws"]), "interval": tuple(values["interval"])}
        score = cls(**given)
        for name in ("rank", "outcome"):
            if name not in lacking and values[name] != getattr(score, name):
                raise ValueError(
                    f"score {score.name!r}: the file says {name} {values[name]!r}, its numbers say "
                    f"{getattr(score, name)!r}; the file was edited, so run the evaluation again"
                )
        return score
