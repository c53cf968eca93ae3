"""What an evaluation returns: claims with their verdicts, rows of facts, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evals.scores.pictures import Pictures
from evals.scores.score import Score
from evals.scores.verdict import Claim
from sparse.storage.records import checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The claims about a circuit, and the facts and pictures beside them."""

    claims: tuple[Claim, ...]
    rows: tuple[Score, ...] = ()
    """Raw numbers, each beside its control; no verdict rests on them."""
    pictures: Pictures = Pictures()

    def __str__(self) -> str:
        return "\n".join(map(str, self.claims))

    def __getitem__(self, kind: str) -> Claim:
        """Return the claim of a kind, such as "carries"."""
        for claim in self.claims:
            if claim.kind == kind:
                return claim
        raise KeyError(f"no claim {kind!r} here; there are {[c.kind for c in self.claims]}")

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values; `from_dict` reads them back."""
        return {
            "claims": [claim.to_dict() for claim in self.claims],
            "rows": [row.to_dict() for row in self.rows],
            "pictures": self.pictures.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that `to_dict` wrote."""
        values = checked(cls, values, "evaluation", complete=True)
        return cls(
            claims=tuple(map(Claim.from_dict, values["claims"])),
            rows=tuple(map(Score.from_dict, values["rows"])),
            pictures=Pictures.from_dict(values["pictures"]),
        )
