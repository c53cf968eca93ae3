"""Writing files so that a kill or a full disk leaves each one old or new, never half written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def replace_files(folder: str | Path, files: Mapping[str, bytes | str]) -> None:
    """Replace files in `folder` (name to content), each of them as a whole.

    All contents are first written and synced under temporary names beside the files, then moved
    into place one after the other. So a full disk leaves all old files. A kill between two moves
    leaves some old and some new ones, and so does a move that fails, which the error says. The
    folder is made if need be. Several processes may write the same file at once; the last one wins.
    Raises OSError that says what to do.
    """
    folder = Path(folder)
    aside = {folder / name: folder / f"{name}.{os.getpid()}.partial" for name in files}
    moved: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(aside.values(), files.values(), strict=True):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(path)
        for place, path in aside.items():
            os.replace(path, place)
            moved.append(place.name)
        sync(folder)
    except OSError as error:
        for path in aside.values():
            path.unlink(missing_ok=True)
        left = f"untouched but for {', '.join(moved)}, new and whole" if moved else "untouched"
        raise OSError(
            error.errno,
            f"could not write {', '.join(files)} in {folder} ({error.strerror or error}); what was "
            f"there before is {left}: free some space or choose another folder, and run again",
        ) from error


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
