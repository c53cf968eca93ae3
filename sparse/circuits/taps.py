"""Reading and replacing node values: the one mechanism behind masks, means and interventions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from sparse.model.gpt import SparseGPT

Edits = Mapping[str, Callable[[Tensor], Tensor]]


@contextmanager
def edited(model: SparseGPT, edits: Edits) -> Iterator[None]:
    """Replace the value x at each location by `edits[location](x)` while the context is open.

    x is (batch, pos, width), after AbsTopK and before the next matrix reads it.
    """
    handles = []
    try:
        for location, edit in edits.items():
            hook = lambda _module, _args, x, edit=edit: edit(x)  # noqa: E731
            handles.append(model.node(location).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(
    model: SparseGPT, locations: list[str] | None = None
) -> Iterator[dict[str, Float[Tensor, "batch pos width"]]]:
    """Yield a dict that each forward pass fills with the value at every location in `locations`.

    By default these are all of `SparseGPT.node_widths`. Opened inside `edited`, it sees the edited
    values. The values are part of the graph, so gradients flow through them.
    """
    values: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            values[name] = x
            return x

        return see

    names = list(model.node_widths()) if locations is None else locations
    with edited(model, {name: keep(name) for name in names}):
        yield values
