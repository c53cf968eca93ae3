"""A number beside its control: the record every result of this library is made of.

gap       value - control,                 control = mean over its draws
stderr    of the gap, over the n prompts (or blocks), the draws held fixed
interval  95 % of the gap under resampling of the prompts, value and control together
rank      how many draws the value beats, in the direction `better`
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

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
LEVEL = 0.95
"""Share of draws to beat, and coverage of the interval."""
RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One line of a report: what was measured, beside what it would be without the cause.

    Give `draws`, or `control` alone when there is one draw. `rank` and `verdict` follow.
    """

    name: str
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
    verdict: str = field(init=False)

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
        set_(self, "draws", draws)
        set_(self, "control", control)
        set_(self, "interval", interval)
        self._check(mean)
        set_(self, "rank", sum(self._beats(draw) for draw in draws))
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

    def _verdict(self) -> str:
        """Say in plain words what `interval` and `rank` together allow.

        Among k exchangeable draws the value beats ceil(0.95 (k + 1)) or more with probability at
        most 5 %; with fewer than 19 draws it must beat all. And the interval must leave out 0.
        """
        k = self.n_draws
        enough = min(k, math.ceil(LEVEL * (k + 1)))
        ties = sum(draw == self.value for draw in self.draws)
        low, high = self.interval if self.better == "higher" else [-x for x in self.interval[::-1]]
        if low > 0 and self.rank >= enough:
            several = f"beats {self.rank} of {k} {self.control_name}"
            return several if k > 1 else f"better than {self.control_name}"
        if high < 0 and k - self.rank - ties >= enough:
            count = f"{k - self.rank - ties} of {k} " if k > 1 else ""
            return f"worse than its control ({count}{self.control_name})"
        count = f"beats {self.rank} of {k} " if k > 1 else ""
        return f"not distinguishable from its control ({count}{self.control_name})"

    def to_dict(self) -> dict[str, Any]:
        """Return the score as plain values; `from_dict` is its inverse."""
        values = asdict(self)
        return values | {"draws": list(self.draws), "interval": list(self.interval)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """Read what `to_dict` wrote; a missing, unknown or contradictory entry is an error."""
        names = {f.name for f in fields(cls)}
        if wrong := sorted(values.keys() ^ names):
            raise ValueError(f"score: keys {wrong} are missing or unknown; it has {sorted(names)}")
        given = {f.name: values[f.name] for f in fields(cls) if f.init}
        given |= {"draws": tuple(values["draws"]), "interval": tuple(values["interval"])}
        score = cls(**given)
        for name in ("rank", "verdict"):
            if values[name] != getattr(score, name):
                raise ValueError(
                    f"score {score.name!r}: the file says {name} {values[name]!r}, its numbers say "
                    f"{getattr(score, name)!r}; the file was edited, so run the evaluation again"
                )
        return score
