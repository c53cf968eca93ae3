import pytest

from sparse.tasks.pair import Pair, pair_of

GOOD = {"context_1": "a", "context_2": "b", "target_1": "x", "target_2": "y"}


def test_a_pair_is_its_fields_and_may_be_one_sided_and_grouped():
    pair = pair_of(GOOD | {"target_2": None, "groups": {"frame": "f"}}, "here")
    assert pair == Pair(**(GOOD | {"target_2": None}), groups={"frame": "f"})
    assert pair != pair_of(GOOD | {"target_2": None, "groups": {"frame": "g"}}, "here")
    assert hash(pair) == hash(pair_of(GOOD | {"target_2": None}, "here"))  # groups are not hashed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context_1": ""}, "context_1 is ''; it must be a non-empty string"),
        ({"target_1": None}, "target_1 is None; it must be a non-empty string$"),
        ({"target_2": 3}, "target_2 is 3; it must be a non-empty string, or null"),
        ({"groups": ["f"]}, r"groups is \['f'\]; it must be an object of texts"),
        ({"groups": {"frame": 1}}, "groups is .*must be an object of texts"),
        ({"taget": "x"}, "unknown keys .'taget'"),
    ],
)
def test_a_field_that_cannot_be_is_named(change, says):
    with pytest.raises(ValueError, match=f"^line 3: {says}"):
        pair_of(GOOD | change, "line 3")


def test_a_target_left_out_is_not_the_same_as_null():
    without = {k: v for k, v in GOOD.items() if k != "target_2"}
    with pytest.raises(ValueError, match="line 1: .'target_2'. missing"):
        pair_of(without, "line 1")
