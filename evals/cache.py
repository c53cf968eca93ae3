"""Keep parts of a report, so that an evaluation that was interrupted goes on where it was.

A part is kept under a hash of everything that it depends on: the weights of both models and the
bridges, the circuits with their tasks, the settings, and the version of the evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse.circuits.circuit import Circuit
from sparse.storage.atomic import replace_files

VERSION = 2
"""Raised whenever a measurement changes its meaning, so that nothing old is taken for it."""


def kept(folder: Path | None, about: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
    """Return the part about these things: from `folder` if it is there, else made and put there.

    Without a folder it is made. A file that cannot be read is made anew.
    """
    if folder is None:
        return make()
    name = f"{fingerprint({'version': VERSION, **about})}.json"
    path = folder / name
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            pass  # half a file of another disk: what it held is made anew below
    part = make()
    replace_files(folder, {name: json.dumps(part, allow_nan=False)})
    return part


def forget(folder: Path) -> None:
    """Remove all parts that are kept in a folder, so that they are made anew."""
    for path in folder.glob("*.json"):
        path.unlink()


def fingerprint(values: Any) -> str:
    """Return a hash of plain JSON values, the same in every process."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def circuit_mark(circuit: Circuit) -> str:
    """Return a hash of a circuit: nodes, task, settings, ablation values and ranking."""
    digest = hashlib.sha256(json.dumps(circuit.to_dict(), sort_keys=True).encode())
    for values in (circuit.ablation, circuit.ranking):
        for at, value in sorted(values.items()):
            digest.update(at.encode() + value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def bridges_mark(bridges: Any) -> str:
    """Return a hash of the weights of the bridges."""
    digest = hashlib.sha256()
    for name, value in sorted(bridges.state_dict().items()):
        digest.update(name.encode() + value.contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:24]
