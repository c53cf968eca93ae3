"""Twins of modules: copies that share every weight with an original and replace some parts of it.

(The weight-sparse model beside a dense one is called a twin too; that is another thing.) A twin of
a module is a new object with the same class, the same parameters and buffers and the same children,
except those children that are replaced. Running a twin runs the family's own code. Making one
changes nothing on the original: it adds no hook and no attribute, and it copies no weight.

Where accelerate places the weights of a module (`device_map`, offloading), it runs a hook before
and after the module. A twin runs that hook too, so that it finds its weights where it computes.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from .weights.placement import device_of

# Attributes that a wrapper may have put on the instance. A twin drops them and runs its class.
_WRAPPED = ("forward", "__nnsight__", "_old_forward", "_compiled_call_impl")


def twin(
    module: nn.Module,
    children: Mapping[str, nn.Module] = MappingProxyType({}),
    cls: type[nn.Module] | None = None,
) -> nn.Module:
    """Return a twin of `module`: the same weights, with the named direct children replaced.

    Torch hooks of the original do not fire on the twin. Plain attributes, such as `training`, are
    copied as they are now and do not follow the original later. Parameters and buffers stay shared,
    also when the original is moved to another device or loads other weights.
    """
    t = object.__new__(cls or type(module))
    t.__dict__.update({k: v for k, v in module.__dict__.items() if k not in _WRAPPED})
    for name, value in module.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            t.__dict__[name] = type(value)()
    t.__dict__["_modules"] = {**module._modules, **children}
    if "_hf_hook" in t.__dict__:
        t.__dict__["forward"] = partial(_placed, t)
    return t


def _placed(t: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a twin whose weights and arguments accelerate's hook brings to their device."""
    args, kwargs = t._hf_hook.pre_forward(t, *args, **kwargs)
    return t._hf_hook.post_forward(t, type(t).forward(t, *args, **kwargs))


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
    """Return a twin of `root` whose submodules, at any depth, are twins too.

    A module that occurs twice has one twin. Wrapping or hooking any part of the result leaves the
    original alone. transformers marks a model on which it has put its hooks for
    `output_hidden_states`; the twin has no hooks yet, so the mark is removed.
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
    """Return a twin of `onto` with the replacements that `part` has, a twin of `original`.

    The children of `part` that are not those of `original` take the place of those of `onto`.
    """
    own = {
        n: c for n, c in part._modules.items() if c is not None and c is not original._modules[n]
    }
    return twin(onto, own)


def site_block(block: nn.Module, halves: tuple[nn.Module, ...], last: bool) -> nn.Module:
    """Return a twin of `block` with an identity module at each of its residual sites.

    They are `resid_pre` before the block, `resid_mid` between its halves if it has any, and
    `resid_post` after it if it is the last block. The model goes on from their outputs, so to
    replace an output is to replace the residual there.
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
    """Return the hidden states in the output of a block or sublayer, a tensor or a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def arity(output: Any) -> int:
    """Return how many values a tuple output has, 0 for a bare tensor."""
    return len(output) if isinstance(output, (tuple, list)) else 0


def answer(h: Tensor, arity: int) -> Any:
    """Return `h` in the form of a module's output: alone, or first in a tuple filled with None."""
    return (h, *[None] * (arity - 1)) if arity else h


def take_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """Return the hidden states of a call, and its other positional and keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


class Silent(nn.Module):
    """Stands in for a child of a block and adds nothing to the residual stream.

    `silent` makes it. It answers with zeros of the child's width or, if `through` names an
    argument, with that argument: in some families the sublayer gets the residual and adds to it
    itself. If the child answered with a tuple, the rest of the tuple is filled with None.
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
    """Return a twin of `child` that adds nothing (`Silent`); `out` is what the child answered."""
    t = twin(child, cls=Silent)
    shape = [None] * len(out) if isinstance(out, list) else (None,) * arity(out)
    t.__dict__["silence"] = (first(out).shape[-1], shape or None, through)
    return t


def blank(embedding: nn.Module) -> nn.Module:
    """Return a twin of a token embedding that answers with zeros, for passes that do not use it."""

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight: Any = embedding.weight
        return weight.new_zeros(*ids.shape, weight.shape[-1], device=device_of(embedding))

    return forwarding(embedding, forward)


def blank_head(head: nn.Linear) -> nn.Module:
    """Return a twin of an unembedding that answers with zeros, for passes without logits."""
    return forwarding(head, lambda h: h.new_zeros(*h.shape[:-1], head.out_features))
