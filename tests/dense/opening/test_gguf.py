"""GGUF files that are not there or are being converted (tests/real opens one)."""

import pytest
from huggingface_hub import constants
from safetensors import SafetensorError

from dense import DenseModel
from dense.opening import gguf


def test_a_model_that_comes_in_a_wheel_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="smollm2 is not installed.*make real"):
        DenseModel.from_pretrained("smollm2")


def test_a_gguf_file_needs_its_reader(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    for given in (dict(), dict(gguf_file="model.gguf")):
        at = tmp_path if given else tmp_path / "model.gguf"
        with pytest.raises(ValueError, match=r"GGUF file.*sparse-bridges\[real\]"):
            DenseModel.from_pretrained(at, **given)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nothing.gguf"):
        DenseModel.from_pretrained(tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match="there is no file .*other.gguf"):
        DenseModel.from_pretrained(tmp_path, gguf_file="other.gguf")


def test_what_is_no_gguf_file_is_left_to_the_others(tmp_path):
    assert gguf.gguf_file("tiny", {}) is None
    assert gguf.gguf_file(tmp_path, {}) is None
    assert gguf.gguf_file("somebody/a-name", {"gguf_file": "a.gguf"}) is None  # on the hub


@pytest.fixture
def file(monkeypatch, tmp_path):
    """A GGUF file, a cache of its own, and a conversion that writes one small file."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gguf, "convert", write_one)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def write_one(path, folder, text="converted"):
    folder.mkdir()
    (folder / "config.json").write_text(text)


def test_a_file_is_converted_once_and_nothing_else_is_left_in_the_cache(file, monkeypatch):
    kept = gguf.converted(file)
    assert (kept / "config.json").read_text() == "converted"
    monkeypatch.setattr(gguf, "convert", None)  # a second one would fail
    assert gguf.converted(file) == kept and list(kept.parent.iterdir()) == [kept]


def test_of_two_processes_that_convert_at_once_the_first_wins_and_both_go_on(file, monkeypatch):
    def late(path, folder):
        monkeypatch.setattr(gguf, "convert", write_one)
        gguf.converted(path)  # another process begins later and ends earlier
        write_one(path, folder, "late")

    monkeypatch.setattr(gguf, "convert", late)
    kept = gguf.converted(file)
    assert (kept / "config.json").read_text() == "converted"
    assert list(kept.parent.iterdir()) == [kept]


def full(path, folder):
    raise SafetensorError("no space left on device")


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(file, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "convert", full)
    with pytest.raises(
        ValueError, match="kept in .*gguf, which cannot be written .no space.*HF_HO"
    ):
        gguf.converted(file)
    assert not list((tmp_path / "home" / "sparse-bridges" / "gguf").iterdir())
    monkeypatch.setattr(constants, "HF_HOME", str(file))  # a file is in the way
    with pytest.raises(ValueError, match="cannot be written.*set HF_HOME to a folder"):
        gguf.converted(file)
