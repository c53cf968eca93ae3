"""The strict reader: a key too many is another experiment, one too few a broken file."""

from dataclasses import dataclass

import pytest

from sparse.storage.records import checked


@dataclass
class Record:
    a: int
    b: int = 0


def test_known_keys_pass_and_defaults_may_be_left_out():
    assert checked(Record, {"a": 1}, "x") == {"a": 1}
    assert checked(Record, {"a": 1, "b": 2}, "x", complete=True) == {"a": 1, "b": 2}


def test_an_unknown_key_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"x: unknown keys \['c'\]; it may have \['a', 'b'\]"):
        checked(Record, {"a": 1, "c": 2}, "x")


def test_a_missing_key_is_named_where_all_are_needed():
    with pytest.raises(ValueError, match=r"x: keys \['b'\] are missing"):
        checked(Record, {"a": 1}, "x", complete=True)


def test_keys_besides_are_those_that_only_one_of_the_two_has():
    assert checked(Record, {"a": 1, "version": 3}, "x", besides=["version"])["version"] == 3
    assert checked(Record, {"a": 1}, "x", complete=True, besides=["b"]) == {"a": 1}
    with pytest.raises(ValueError, match="unknown keys"):
        checked(Record, {"a": 1, "b": 2}, "x", besides=["b"])  # it is in the other file
