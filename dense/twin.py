"""Twins: module objects that share every weight with an original and replace some of its parts.

A twin of a module is a new object with the same class, the same parameters and buffers and the
same children, except those that are named. Running a twin runs the family's own code; building
one changes nothing on the original: no hook, no attribute, no copied weight.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

# What a wrapper may have put on the instance: a twin runs the code of its class.
_WRAPPED = ("forward", "__nnsight__", "_hf_hook", "_old_forward", "_compiled_call_impl")


def twin(
    module: nn.Module,
    children: Mapping[str, nn.Module] = MappingProxyType({}),
    cls: type[nn.Module] | None = None,
) -> nn.Module:
    """Return a twin of `module`: the same weights, with the named direct children replaced.

    Hooks of the original do not fire on the twin. Plain attributes (`training` among them) are
    those of the moment; parameters and buffers stay shared when the original moves or loads.
    """
    t = object.__new__(cls or type(module))
    t.__dict__.update({k: v for k, v in module.__dict__.items() if k not in _WRAPPED})
    for name, value in module.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            t.__dict__[name] = type(value)()
    t.__dict__["_modules"] = {**module._modules, **children}
    return t


def replaced(root: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """Return a twin of `root` whose submodule at each dotted path is the one given."""
    children: dict[str, nn.Module] = {}
    below: dict[str, dict[str, nn.Module]] = {}
    for path, part in parts.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = part
        else:
            children[head] = part
    for head, deeper in below.items():
        children[head] = replaced(root.get_submodule(head), deeper)
    return twin(root, children)


def deep_twin(root: nn.Module) -> nn.Module:
    """Return a twin of `root` and of everything below it; a module met twice has one twin.

    Whoever wraps or hooks the result, wherever in the tree, leaves the original alone. It has no
    hooks yet, so it does not say that transformers' own, of `output_hidden_states`, are in place.
    """
    twins: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            t = twins[id(module)] = twin(module)
            t.__dict__.pop("_output_capturing_hooks_installed", None)
            for name, child in module._modules.items():
                t._modules[name] = None if child is None else visit(child)
        return twins[id(module)]

    return visit(root)


def forwarding(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a twin of `module` that answers calls with `forward`; its attributes stay readable."""
    t = twin(module)
    t.__dict__["forward"] = forward
    return t


def transplanted(part: nn.Module, original: nn.Module, onto: nn.Module) -> nn.Module:
    """Return a twin of `onto` with those children that `part`, a twin of `original`, replaced."""
    own = {
        n: c for n, c in part._modules.items() if c is not None and c is not original._modules[n]
    }
    return twin(onto, own)


def site_block(block: nn.Module, halves: tuple[nn.Module, ...], last: bool) -> nn.Module:
    """Return a twin of `block` with an identity module at each of its residual sites.

    `resid_pre` before it, `resid_mid` between its halves if there are any, and `resid_post` after
    it if it is the last. Their outputs are the stream: whoever replaces one moves the model.
    """
    children: dict[str, nn.Module] = {"resid_pre": nn.Identity()}
    if halves:
        children["resid_mid"] = nn.Identity()
    if last:
        children["resid_post"] = nn.Identity()
    t = twin(block, children, _site_class(type(block)))
    t.__dict__["halves"] = halves  # beside the tree: they share its children
    return t


@cache
def _site_class(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        h, args, kwargs = take_hidden(args, kwargs)
        h = self.resid_pre(h)
        if self.halves:
            attn_half, mlp_half = self.halves
            attn_half.training = mlp_half.training = self.training
            out = attn_half(h, *args, **kwargs)
            h = first(mlp_half(self.resid_mid(first(out)), *args, **kwargs))
        else:
            out = base.forward(self, h, *args, **kwargs)
            h = first(out)
        if "resid_post" in self._modules:
            h = self.resid_post(h)
        return (h, *out[1:]) if isinstance(out, (tuple, list)) else h

    return type(f"Sites{base.__name__}", (base,), {"forward": forward})


def first(output: Any) -> Any:
    """Return the hidden states of a block or sublayer that answers with a tensor or a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def arity(output: Any) -> int:
    """Return how many values a tuple output has, 0 for a bare tensor."""
    return len(output) if isinstance(output, (tuple, list)) else 0


def answer(h: Tensor, arity: int) -> Any:
    """Return `h` as a module of that output arity would: alone, or leading a tuple of None."""
    return (h, *[None] * (arity - 1)) if arity else h


def take_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """Return the hidden states of a call and what else was passed."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


class Silent(nn.Module):
    """Stands in for a child and adds nothing to the residual stream; a twin made by `silent`.

    It answers with zeros of the child's width; or, if `through` names an argument, with that
    argument: some families hand the residual to the sublayer, which adds to it by itself.
    A child that answered with a tuple gets the rest of it filled with None.
    """

    silence: tuple[int, Any, int | str | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        width, was, through = self.silence
        if isinstance(through, int):
            out = args[through]
        elif through is not None:
            out = kwargs[through]
        else:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            out = x.new_zeros(*x.shape[:-1], width)
        return [out, *[None] * (len(was) - 1)] if isinstance(was, list) else answer(out, arity(was))


def silent(child: nn.Module, out: Any, through: int | str | None = None) -> nn.Module:
    """Return a silent twin of `child`, which answered with `out`; its attributes stay readable."""
    t = twin(child, cls=Silent)
    shape = [None] * len(out) if isinstance(out, list) else (None,) * arity(out)
    t.__dict__["silence"] = (first(out).shape[-1], shape or None, through)
    return t


def blank(embedding: nn.Module) -> nn.Module:
    """Return a twin of a token embedding whose output nobody reads: zeros of its shape."""

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight: Any = embedding.weight
        return weight.new_zeros(*ids.shape, weight.shape[-1])

    return forwarding(embedding, forward)
