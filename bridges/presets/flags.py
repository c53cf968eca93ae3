"""Flags of the command line for the fields of a preset, and a table of all presets."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .preset import PRESETS, QUOTES, Preset

CHOICES = {"mixed_precision": ["no", "bf16"], "embeddings": ["own", "dense"]}
"""The values of the flags that have a few."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of a preset; without it the preset's own value holds.

    >>> import argparse
    >>> from bridges import PRESETS, add_flags, with_flags
    >>> parser = argparse.ArgumentParser()
    >>> add_flags(parser)
    >>> with_flags(PRESETS["cpu"], parser.parse_args(["--steps", "9"])).steps
    9
    """
    kinds = {"int": int, "int | None": int, "float": float}
    for f in fields(Preset)[1:]:
        how: dict[str, Any] = {"help": f.metadata["help"]}
        if f.type == "bool":
            how["action"] = argparse.BooleanOptionalAction
        elif f.name in CHOICES:
            how["choices"] = CHOICES[f.name]
        elif f.name == "tasks":
            how["nargs"] = "*"
        else:
            how["type"] = site_map if f.name == "sites" else kinds[str(f.type)]
        parser.add_argument(f"--{f.name}", **how)


def with_flags(preset: Preset, args: argparse.Namespace) -> Preset:
    """Return the preset with what was given as flags; raise ValueError for what makes no sense.

    >>> import argparse
    >>> from bridges import PRESETS, add_flags, with_flags
    >>> parser = argparse.ArgumentParser()
    >>> add_flags(parser)
    >>> with_flags(PRESETS["cpu"], parser.parse_args([])) == PRESETS["cpu"]
    True
    """
    given = {f.name: getattr(args, f.name) for f in fields(Preset)[1:]}
    given["tasks"] = None if given["tasks"] is None else tuple(given["tasks"])
    return replace(preset, **{name: x for name, x in given.items() if x is not None})


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Return what reads a number above 0 from a command line.

    >>> from bridges import positive
    >>> positive(float)("0.5")
    0.5
    """

    def number(text: str) -> int | float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    return number


def new_folder(text: str) -> str:
    """Return the path of a folder that can be made; refuse one where a file is in the way.

    >>> from bridges import new_folder
    >>> new_folder("runs/new")
    'runs/new'
    """
    for path in (Path(text), *Path(text).parents):
        if path.is_file():
            raise argparse.ArgumentTypeError(f"{text}: {path} is a file; name a folder")
    return text


def site_map(text: str) -> dict[int, int]:
    """Return {dense site: sparse site} of D:S,D:S,...; empty, which is the even map, for "even"."""
    if text == "even":
        return {}
    pairs = [pair.split(":") for pair in text.split(",")]
    if not all(len(pair) == 2 and all(map(str.isdecimal, pair)) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is neither even nor D:S,D:S,...; try 0:0,4:2")
    if len({d for d, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a dense site twice")
    return {int(d): int(s) for d, s in pairs}


def preset_table() -> str:
    """Return the values of all presets, one column each: what holds where a flag is not given.

    >>> from bridges import preset_table
    >>> preset_table().splitlines()[1].split()
    ['steps', '6', '500', '3000', '3000', '2000', '30000', '12000']
    """
    rows = [["", *PRESETS]]
    for f in fields(Preset)[1:]:
        rows.append([f.name, *(_shown(getattr(preset, f.name)) for preset in PRESETS.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "quotes" if value == QUOTES else " ".join(value)
    if value is None or value == {}:
        return "even" if value == {} else "dense"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
