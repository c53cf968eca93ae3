import errno

import pytest
import torch
from safetensors import SafetensorError

from sparse.storage.checkpoint import read_folder, steps_saved, write_folder


def tensors(value=1.0):
    return {
        "module": {"w": torch.full((3, 4), value), "half": torch.ones(2, dtype=torch.bfloat16)},
        "adam": {"g/w/step": torch.tensor(7.0), "strided": torch.arange(6.0).view(2, 3).T},
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[stem].keys() == b[stem].keys()
        and all(torch.equal(a[stem][n], b[stem][n]) for n in a[stem])
        for stem in a
    )


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*args, **kwargs):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_reading_gives_what_was_written(tmp_path):
    folder = tmp_path / "deep" / "step-00000007"
    write_folder(folder, tensors(), {"step": 7, "rows": [1, {"a": None}]})
    got, state = read_folder(folder, "module", "adam")
    assert same(got, tensors()) and state == {"step": 7, "rows": [1, {"a": None}]}
    assert got["module"]["half"].dtype == torch.bfloat16
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_writing_again_replaces_the_folder_whole(tmp_path):
    write_folder(tmp_path / "f", tensors() | {"more": {"x": torch.ones(1)}}, {"step": 1})
    write_folder(tmp_path / "f", tensors(2.0), {"step": 2})
    got, state = read_folder(tmp_path / "f", "module", "adam")
    assert same(got, tensors(2.0)) and state == {"step": 2}
    assert not (tmp_path / "f" / "more.safetensors").exists()


@pytest.mark.parametrize(
    "where, how",
    [
        ("sparse.storage.checkpoint.save_file", no_space),
        ("sparse.storage.checkpoint.save_file", no_space_in_rust),
        ("sparse.storage.checkpoint.sync", no_space),
        ("pathlib.Path.write_text", no_space),
        ("pathlib.Path.mkdir", no_space),
    ],
)
def test_a_full_disk_leaves_the_old_folder_and_says_what_to_do(tmp_path, monkeypatch, where, how):
    write_folder(tmp_path / "f", tensors(), {"step": 1})
    with monkeypatch.context() as full:
        full.setattr(where, how)
        with pytest.raises(OSError, match="No space left.*untouched: free some space") as error:
            write_folder(tmp_path / "f", tensors(2.0), {"step": 2})
    assert str(tmp_path / "f") in str(error.value)
    got, state = read_folder(tmp_path / "f", "module", "adam")
    assert same(got, tensors()) and state == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f"], "nothing half-written stays"


def test_a_leftover_of_a_killed_write_is_no_hindrance(tmp_path):
    (tmp_path / "f.partial").mkdir()
    (tmp_path / "f.partial" / "junk.safetensors").write_bytes(b"half")
    write_folder(tmp_path / "f", tensors(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert not (tmp_path / "f" / "junk.safetensors").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def scribble(path):
    path.write_bytes(b"\xff\xfe\x00 not what it was")


@pytest.mark.parametrize("name", ["state.json", "module.safetensors", "adam.safetensors"])
@pytest.mark.parametrize("harm", [cut, scribble, lambda path: path.unlink()])
def test_a_damaged_or_missing_file_is_named_with_the_remedy(tmp_path, name, harm):
    write_folder(tmp_path / "f", tensors(), {"step": 1})
    harm(tmp_path / "f" / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*restore the file"):
        read_folder(tmp_path / "f", "module", "adam")


def test_checkpoints_are_listed_oldest_first_and_nothing_else_is(tmp_path):
    for name in ("step-00000010", "step-00000002", "step-00000003.partial", "other", "step-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in steps_saved(tmp_path)] == ["step-00000002", "step-00000010"]
    assert steps_saved(tmp_path / "absent") == []


def test_one_flipped_bit_is_noticed(tmp_path):
    write_folder(tmp_path / "f", tensors(), {"step": 1})
    path = tmp_path / "f" / "module.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="module.safetensors cannot be read: its sha256"):
        read_folder(tmp_path / "f", "module")
