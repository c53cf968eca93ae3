"""What the figures of a report are drawn from: numbers and names, no drawing.

A scatter has effect against collateral damage, a matrix says for which task a circuit is needed, an
example shows what three models answer to one prompt, and a curve (curve.py) follows an axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from sparse.storage.records import checked

from .curve import Curve
from .score import Unit

PointKind = Literal["claim", "rival", "namesake", "control", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One way to change a model: how much it moves the answer, and what else it moves.

    >>> from evals.scores.pictures import Point
    >>> Point(label="the circuit", kind="claim", effect=0.68, collateral=0.235).detail
    {}
    """

    label: str
    kind: PointKind
    effect: float
    collateral: float
    detail: dict[str, Any] = field(default_factory=dict)
    """Further facts, as plain JSON: site, scale, draw."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(PointKind):
            raise ValueError(
                f"point {self.label!r}: kind is {self.kind!r}; one of {get_args(PointKind)}"
            )
        _finite(f"point {self.label!r}", self.effect, self.collateral)
        json.dumps(self.detail, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the point as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """Return the point that `to_dict` wrote; raise ValueError for unknown or missing keys."""
        return cls(**checked(cls, values, "point", complete=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Effect against collateral damage of a claim and of everything it is compared with.

    Raises ValueError without exactly one point of the kind "claim".
    """

    name: str
    """The task, a colon, and what is shown."""
    effect_label: str
    collateral_label: str
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        claims = sum(point.kind == "claim" for point in self.points)
        if claims != 1:
            raise ValueError(
                f"scatter {self.name!r} has {claims} points of the kind 'claim'; it is about one"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the scatter as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scatter:
        """Return the scatter that `to_dict` wrote; raise ValueError for unknown or missing keys."""
        values = checked(cls, values, "scatter", complete=True)
        return cls(**{**values, "points": tuple(map(Point.from_dict, values["points"]))})


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Harm to the task of the column when the circuit of the row is ablated.

    Raises ValueError where a row has not one value for every column.
    """

    name: str
    unit: Unit
    rows: tuple[str, ...]
    """The tasks whose circuits are ablated."""
    columns: tuple[str, ...]
    """The tasks that the model is then asked to do."""
    values: tuple[tuple[float | None, ...], ...]
    """By row, then column; None where it was not measured."""

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(
                f"matrix {self.name!r}: unit is {self.unit!r}; one of {get_args(Unit)}"
            )
        shape = [len(row) for row in self.values]
        if not self.rows or not self.columns or shape != [len(self.columns)] * len(self.rows):
            raise ValueError(
                f"matrix {self.name!r}: it has {len(self.rows)} rows and {len(self.columns)} "
                f"columns, but the rows of its values have {shape} entries"
            )
        _finite(f"matrix {self.name!r}", *(x for row in self.values for x in row if x is not None))

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Matrix:
        """Return the matrix that `to_dict` wrote; raise ValueError for unknown or missing keys."""
        values = checked(cls, values, "matrix", complete=True)
        names = {key: tuple(values[key]) for key in ("rows", "columns")}
        return cls(**{**values, **names, "values": tuple(map(tuple, values["values"]))})


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What three models answer to one prompt: P of the right one of its two answers.

    Raises ValueError for a probability outside 0 to 1.
    """

    task: str
    prompt: str
    answer: str
    """The right answer, as text."""
    other: str
    """The wrong one, which the other context of the pair asks for."""
    dense: float
    """P of `answer` in the softmax over the two, in the dense model."""
    twin: float
    """The same in the whole sparse twin."""
    circuit: float
    """The same in the circuit alone, in the twin."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("dense", "twin", "circuit")}
        for name, p in given.items():
            if not 0 <= p <= 1:
                raise ValueError(
                    f"example of {self.task!r}: P in the {name} is {p}; it must be between 0 and 1"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the example as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Example:
        """Return the example that `to_dict` wrote; raise ValueError for unknown or missing keys."""
        return cls(**checked(cls, values, "example", complete=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Everything that a report draws."""

    scatters: tuple[Scatter, ...] = ()
    curves: tuple[Curve, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    examples: tuple[Example, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, (self.scatters, self.curves, self.matrices, self.examples)))

    def to_dict(self) -> dict[str, Any]:
        """Return the pictures as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Pictures:
        """Return the pictures that `to_dict` wrote; ValueError for unknown or missing keys."""
        values = checked(cls, values, "pictures", complete=True)
        return cls(
            scatters=tuple(map(Scatter.from_dict, values["scatters"])),
            curves=tuple(map(Curve.from_dict, values["curves"])),
            matrices=tuple(map(Matrix.from_dict, values["matrices"])),
            examples=tuple(map(Example.from_dict, values["examples"])),
        )


def _finite(where: str, *numbers: float) -> None:
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where} holds NaN or infinity; find where it broke")
