"""A measurement along an axis, beside every draw of its controls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparse.storage.records import checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A measurement at several places along an axis, beside every draw of its controls there."""

    name: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    value: tuple[float, ...]
    controls: dict[str, tuple[tuple[float, ...], ...]]
    """By name of the control: for each draw, one number for every place in x."""
    references: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Lines to compare with, such as the full activation patch."""

    def __post_init__(self) -> None:
        lines = [self.value, *self.references.values()]
        lines += [draw for draws in self.controls.values() for draw in draws]
        if not self.controls or any(len(line) != len(self.x) for line in lines):
            raise ValueError(
                f"curve {self.name!r}: every line must have one number for each of its "
                f"{len(self.x)} places, and there must be a control"
            )
        if not all(math.isfinite(y) for line in [self.x, *lines] for y in line):
            raise ValueError(f"curve {self.name!r} holds NaN or infinity; find where it broke")

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain JSON values; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curve:
        """Return the curve that `to_dict` wrote; raise ValueError for unknown or missing keys."""
        values = checked(cls, values, "curve", complete=True)
        controls = {k: tuple(map(tuple, v)) for k, v in values["controls"].items()}
        references = {k: tuple(v) for k, v in values["references"].items()}
        lines = {key: tuple(values[key]) for key in ("x", "value")}
        return cls(**{**values, **lines, "controls": controls, "references": references})
