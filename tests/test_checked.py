"""The suite checks shapes and types in every call of ours, and builds each check once."""

import importlib.util

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests.helpers.checked import built, checked


def inner(hint):
    @jaxtyped(typechecker=checked)
    def double(x: hint) -> Float[Tensor, "a a"]:
        return torch.stack([x, x])

    return double


def test_a_function_defined_again_is_checked_again_and_its_check_is_built_once():
    before = built.cache_info().misses
    for _ in range(3):
        double = inner(Float[Tensor, " a"])
        assert double(torch.ones(2)).shape == (2, 2)
        with pytest.raises(TypeCheckError, match="parameters of"):
            double(torch.ones(2, 2))
        with pytest.raises(TypeCheckError, match="return value"):
            double(torch.ones(3))
    assert built.cache_info().misses == before + 2  # of the arguments, and of what is returned


def test_equal_names_with_other_annotations_are_checked_by_their_own():
    assert inner(Float[Tensor, " a"])(torch.ones(2)).shape == (2, 2)
    with pytest.raises(TypeCheckError):
        inner(Float[Tensor, "a a a"])(torch.ones(2))


@pytest.mark.parametrize("package", ["sparse", "dense", "bridges", "evals"])
def test_every_package_is_checked(package):
    assert type(importlib.util.find_spec(package).loader).__name__ == "_JaxtypingLoader"


def test_a_wrong_shape_is_found_inside_a_package():
    from sparse.ops.abs_topk import abs_topk

    with pytest.raises(TypeCheckError):
        abs_topk(torch.ones(2, dtype=torch.int64), 1)
