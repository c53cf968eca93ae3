"""What is said where a GGUF file, its wheel or its reader is not there (tests/real opens one)."""

import pytest

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
