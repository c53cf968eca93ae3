"""Reading and writing files of the released format, without running code that is in them.

It is the only module that opens torch files.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from sparse.storage.atomic import replace_files


def read_torch(path: str | Path) -> Any:
    """Return what a torch file holds, on the CPU; only tensors and plain values are accepted.

    Raises ValueError for a file that is missing, empty, cut short, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder or file as it was released")
    n_bytes = path.stat().st_size
    if n_bytes == 0:
        raise ValueError(
            f"{path} has 0 bytes; fetch it again (final_bridges.pt was served empty for both "
            "released bridge models: then there is nothing to fetch)"
        )
    if not is_zipfile(path):
        raise ValueError(
            f"{path} has {n_bytes} bytes and no zip directory at its end, so it is cut short or no "
            "torch file; fetch it again and compare the size (the released "
            "csp_bridges1/final_model.pt was served cut short at 452984832 bytes)"
        )
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except torch.serialization.pickle.UnpicklingError as error:  # pyright: ignore
        raise ValueError(
            f"{path} holds more than tensors and plain values, and opening it could run code; save "
            f"its tensors alone: {str(error).partition(chr(10))[0]}"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def torch_bytes(values: Any) -> bytes:
    """Return the torch file that holds `values`."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError where there is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a folder as it was released")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, must be an object")
    return values


def write_torch(path: str | Path, values: Any) -> None:
    """Write `values` as a torch file, whole or not at all."""
    path = Path(path)
    replace_files(path.parent, {path.name: torch_bytes(values)})
