"""Checkpoints: folders of safetensors and JSON that are always whole or absent.

They are written under another name and then renamed. sparse/training/run_state.py decides what is
in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .atomic import sync

STATE = "state.json"


def write_folder(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write `tensors` (file stem -> name -> tensor) and `state` as one folder, atomically.

    Everything is written and synced under a temporary name beside `folder` and then renamed, so a
    kill or a full disk at any moment leaves the folder whole or absent. Hashes of the tensor files
    are stored with the state. Raises OSError where the folder cannot be written.
    """
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for stem, named in tensors.items():
            flat = {name: t.detach().cpu().contiguous() for name, t in named.items()}
            save_file(flat, aside / f"{stem}.safetensors")
        marks = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
        (aside / STATE).write_text(json.dumps({**state, "sha256": marks}, indent=1))
        for path in [*aside.iterdir(), aside]:
            sync(path)
        gone = folder.with_name(f"{folder.name}.gone")
        if folder.exists():
            os.replace(folder, gone)
        os.replace(aside, folder)
        sync(folder.parent)
        shutil.rmtree(gone, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"could not write {folder}: {error}; what was saved before is untouched: free some "
            "space (or choose another folder) and start the same command again to resume"
        ) from error


def read_folder(folder: Path, *stems: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors (file stem -> name -> tensor) and the state that `write_folder` wrote.

    Only the tensor files of the given stems are read. Raises ValueError naming the file that is
    missing or damaged.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
        marks, tensors = state.pop("sha256", {}), {}
        for stem in stems:
            path = folder / f"{stem}.safetensors"
            tensors[stem] = load_file(path)
            if _sha256(path) != marks.get(path.name):
                raise ValueError("its sha256 is not the one written beside it")
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: no JSON, or no text
        raise ValueError(
            f"{path} cannot be read: {error}; restore the file, or, if {folder} is a checkpoint, "
            "delete it to resume from the one before it"
        ) from error
    return tensors, state


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remove_folder(folder: Path) -> None:
    """Remove a folder that `write_folder` wrote.

    It is renamed before its files are removed, so that a kill leaves it whole or absent under its
    own name.
    """
    gone = folder.with_name(f"{folder.name}.partial")
    folder.rename(gone)
    shutil.rmtree(gone)


def steps_saved(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, folders such as `step-00000200`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.name[5:].isdigit())
