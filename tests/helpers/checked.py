"""Beartype for jaxtyping, that does not build the same check twice.

jaxtyping asks for the check of a function whenever its `def` is executed, so for one inside another
at every call of the outer one; and asks by an empty function of the same signature, so that equal
signatures have equal checks. Every call is checked as ever: only building the checks is saved.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray


def said(hint: Any) -> Any:
    """Return what an annotation says; `Float[Tensor, "n"]` is another class wherever it is said."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return hint.dtype, hint.array_type, hint.dim_str
    if isinstance(hint, list | tuple):
        return tuple(map(said, hint))
    return (get_origin(hint), said(get_args(hint))) if get_args(hint) else hint


class Signature:
    """An empty function, equal to all others of the same name and annotations."""

    def __init__(self, empty: Callable) -> None:
        self.empty = empty
        hints = tuple((name, said(hint)) for name, hint in empty.__annotations__.items())
        code = empty.__code__
        arguments = code.co_varnames, code.co_argcount, code.co_kwonlyargcount, code.co_flags
        self.key = (empty.__module__, empty.__qualname__, *arguments, code.co_code, hints)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.key == other.key


@cache
def built(signature: Signature) -> Callable:
    return beartype(signature.empty)


def checked(empty: Callable) -> Callable:
    """Return `empty` as beartype makes it: called with arguments of other types, it raises."""
    inner = "<locals>" in getattr(empty, "__qualname__", "")
    if not inner or empty.__defaults__ or empty.__kwdefaults__:
        return beartype(empty)
    try:
        return built(Signature(empty))
    except TypeError:  # an annotation that cannot be looked up
        return beartype(empty)
