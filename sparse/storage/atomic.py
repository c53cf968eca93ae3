"""Writing files so that a kill or a full disk leaves the old ones or the new ones, never a half."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def replace_files(folder: str | Path, files: Mapping[str, bytes | str]) -> None:
    """Write every file (name to content) beside its place, sync them, then move them all there.

    The folder is made if need be. Processes may write the same file at once: one of them is the
    last. Raises OSError with what to do; what was there stays.
    """
    folder = Path(folder)
    aside = {folder / name: folder / f"{name}.{os.getpid()}.partial" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(aside.values(), files.values(), strict=True):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(path)
        for place, path in aside.items():
            os.replace(path, place)
        sync(folder)
    except OSError as error:
        for path in aside.values():
            path.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"could not write {', '.join(files)} in {folder} ({error.strerror or error}); what was "
            "there before is untouched: free some space or choose another folder, and run again",
        ) from error


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
