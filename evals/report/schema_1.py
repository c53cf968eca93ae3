"""Give keys to the rows of reports of schema 1, in which a score had no key and no outcome.

In schema 1 a row was identified by its name. This file lists the names that the claims used, with
the key that each row has now. Two rows of one section may compare a circuit with its nonsense twin;
then the first is of the twin's best nodes at the circuit's size, and the second of what `prune`
found for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = (  # the name of a row, the key it has now
    (r"site (\d+): encoder FVU", r"bridge.site.\1.encoder_fvu"),
    (r"site (\d+): decoder FVU", r"bridge.site.\1.decoder_fvu"),
    (r"site (\d+): KL, dense to sparse", r"bridge.site.\1.up"),
    (r"site (\d+): KL, sparse to dense", r"bridge.site.\1.down"),
    (r"cross entropy, (dense|sparse)", r"bridge.ce.\1"),
    (r"KL\(dense \|\| sparse\)", "bridge.kl"),
    (r"loss recovered, dense to sparse", "bridge.recovered.up"),
    (r"loss recovered, sparse to dense", "bridge.recovered.down"),
    (r"sufficiency, (mean|zero) ablation", r"circuit.sufficiency.\1"),
    (r"necessity", "circuit.necessity"),
    (r"KL\(full \|\| circuit\)", "circuit.fidelity"),
    (r"nodes", "circuit.nodes"),
    (r"edges among its nodes", "circuit.edges"),
    (r"nonsense twin \(\d+ nodes, the circuit \d+\)", "circuit.nonsense.equal_size"),
    (r"steering, strength 1, (?:v\. )?(\w+)", r"transfer.steering.one.\1"),
    (
        r"steering, strength \S+, best on validation, (?:v\. )?(\w+)",
        r"transfer.steering.best.\1",
    ),
    (r"cosine of delta with the true dense difference", "transfer.cosine"),
    (r"norm of delta over that of the true difference", "transfer.norm"),
    (r"ablation, v\. (\w+)", r"transfer.ablation.\1"),
)


def with_keys(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one section of schema 1 with their keys.

    A name that is not listed is its own key. Raises ValueError for a row that has one already.
    """
    if any("key" in row for row in rows):
        raise ValueError("score: unknown keys ['key'] in a report of schema 1; it was edited")
    found = [{**row, "key": _key(str(row.get("name", "")))} for row in rows]
    twins = [row for row in found if row["key"] == "circuit.nonsense.equal_size"]
    for row in twins[1:]:
        row["key"] = "circuit.nonsense.found_size"
    return found


def _key(name: str) -> str:
    for pattern, key in KEYS:
        if match := re.fullmatch(pattern, name):
            return match.expand(key)
    return name
