import errno
import os

import pytest

from sparse.storage.atomic import replace_files


def test_files_are_written_and_replaced(tmp_path):
    folder = tmp_path / "new" / "folder"
    replace_files(folder, {"a.json": "ä", "b.bin": b"\x00\xff"})
    replace_files(folder, {"a.json": "two"})
    assert (folder / "a.json").read_text() == "two"
    assert (folder / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "b.bin"]


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.write_bytes"])
def test_a_full_disk_leaves_the_old_files_and_says_what_to_do(tmp_path, monkeypatch, where):
    replace_files(tmp_path, {"a": "old a", "b": "old b"})
    calls = []
    real = os.fsync if where == "os.fsync" else type(tmp_path).write_bytes

    def full_at_the_second_file(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as full:
        full.setattr(where, full_at_the_second_file)
        with pytest.raises(OSError, match="a, b in .*No space left.*free some space") as error:
            replace_files(tmp_path, {"a": "new a", "b": "new b"})
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_text() == "old a" and (tmp_path / "b").read_text() == "old b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_move_that_fails_says_which_files_are_new(tmp_path, monkeypatch):
    replace_files(tmp_path, {"a": "old a", "b": "old b"})
    real = os.replace

    def refuse_b(source, place):
        if place.name == "b":
            raise OSError(errno.EACCES, "Permission denied")
        real(source, place)

    monkeypatch.setattr(os, "replace", refuse_b)
    with pytest.raises(
        OSError, match="there before is untouched but for a, new and whole: .*run again"
    ):
        replace_files(tmp_path, {"a": "new a", "b": "new b"})
    assert (tmp_path / "a").read_text() == "new a" and (tmp_path / "b").read_text() == "old b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    """The other process writes and moves its file while this one has written but not moved."""
    real, others = os.replace, []

    def replace(source, place):
        if not others:
            others.append(1)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                other.setattr(os, "replace", real)
                replace_files(tmp_path, {"a": "theirs"})
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    replace_files(tmp_path, {"a": "ours"})
    assert (tmp_path / "a").read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
