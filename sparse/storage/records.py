"""The strict reader of saved records: the keys of a file must be the fields of its class."""

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
    """Return `values` as a dict, after checking that its keys are fields of the dataclass `cls`.

    An unknown key is a ValueError, because a setting that was misspelt and ignored would make
    another experiment. With `complete` a missing key is a ValueError too. `besides` names keys that
    belong in `values` although they are not fields, and fields that do not belong there. `where`
    names the record in the error.
    """
    known = {f.name for f in fields(cls)} ^ set(besides)
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown keys {unknown}; it may have {sorted(known)}")
    if complete and (missing := sorted(known - values.keys())):
        raise ValueError(f"{where}: keys {missing} are missing; it needs {sorted(known)}")
    return dict(values)
