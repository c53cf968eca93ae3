"""The one strict reader of saved records: what a file says must be what the class knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any


def checked(
    cls: type,
    values: Mapping[str, Any],
    where: str,
    *,
    complete: bool = False,
    besides: Collection[str] = (),
) -> dict[str, Any]:
    """Return `values` as a dict whose keys are fields of the dataclass `cls`.

    A misspelt key is a different experiment, so an unknown one is a ValueError; with `complete` a
    missing one is too. `besides` are keys that the file has and the class does not, or the other
    way round. `where` names the record in the error.
    """
    known = {f.name for f in fields(cls)} ^ set(besides)
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown keys {unknown}; it may have {sorted(known)}")
    if complete and (missing := sorted(known - values.keys())):
        raise ValueError(f"{where}: keys {missing} are missing; it needs {sorted(known)}")
    return dict(values)
