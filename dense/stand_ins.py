"""Passes through a model in which stand-ins replace some blocks and rows may join on the way.

Every pass is one forward pass of the family's own code. A stand-in for a block records the stream,
hands it through unchanged, or runs the block on the rows that have entered so far:

    rows of site s enter at site s,  h <- [h; h_s],  and stay to the end

In such a pass the model makes masks and other arguments of the blocks for all rows at once, but an
early block runs on the first n rows only and needs the arguments for those. `BatchAxes` cuts them.
It learns which axis of an argument is the batch from two passes with different numbers of rows, in
which no block is run.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Inputs
from .sites import Layout, family, probe_ids
from .twin import answer, blank, blank_head, first, forwarding, replaced, take_hidden

Call = tuple[tuple, dict[str, Any]]
"""The positional and keyword arguments of a block, without the hidden states."""
CAPTURING = "transformers.utils.output_capturing"
"""The module in which transformers defines its own hooks; we compare its name, without import."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class StandIns:
    """The passes of one model whose sites are known.

    `inputs` are always the keyword arguments of the model's forward. Site s belongs to block
    k = s // stride: it is at the block's entrance or, where s % stride is 1, between its halves.
    The last site is what the last block returns. Residuals and logits are returned on the device of
    the ids, also where accelerate has placed blocks on others.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.stride = 2 if layout.halves else 1
        self.last = self.stride * len(layout.blocks)
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._passing = [forwarding(b, self._pass) for b in layout.blocks]
        paths = {module: path for path, module in model.named_modules()}
        found, head = model.get_input_embeddings(), model.get_output_embeddings()
        halves = layout.halves or [(block,) for block in layout.blocks]
        self._running: list[tuple[Any, ...]] = [tuple(parts) for parts in halves]
        self._children = [dict(block._modules) for block in layout.blocks]
        self._no_embedding: dict[str, nn.Module] = {paths[found]: blank(found)}
        self._no_head: dict[str, nn.Module] = {}
        if isinstance(head, nn.Linear) and head in paths:
            self._no_head = {paths[head]: blank_head(head)}

    def read(self, inputs: dict[str, Any], logits: bool) -> tuple[list[Tensor], Tensor]:
        """Return the residual at every site and the logits, without gradient.

        Unless `logits` are asked for, what is returned in their place means nothing.
        """
        stream: list[Tensor] = []
        stand_ins = {k: self._recording(k, stream) for k in range(len(self.layout.blocks))}
        with torch.no_grad():
            answered = self._forward(stand_ins, inputs, logits)
        return [h.to(inputs["input_ids"].device) for h in stream], answered

    def last_residual(self, inputs: dict[str, Any]) -> Tensor:
        """Return the residual at the last site, without gradient."""
        stream: list[Tensor] = []
        k = len(self.layout.blocks) - 1
        with torch.no_grad():
            self._forward({k: self._recording(k, stream)}, inputs, False)
        return stream[-1].to(inputs["input_ids"].device)

    def calls(self, inputs: dict[str, Any], embedded: bool = False) -> list[Call]:
        """Return the arguments with which the model calls every block.

        No block is run. The embedding is run only if `embedded`.
        """
        seen: list[Call] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            h, args, kwargs = take_hidden(args, kwargs)
            seen.append((args, kwargs))
            return answer(h, self.layout.arity)

        stand_ins = {k: forwarding(b, note) for k, b in enumerate(self.layout.blocks)}
        with torch.no_grad():
            self._forward(stand_ins, inputs, False, {} if embedded else self._no_embedding)
        return seen

    def enter(
        self,
        entries: Sequence[tuple[int, Tensor]],
        inputs: dict[str, Any],
        logits: bool,
        axes: "BatchAxes | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual at the last site, and the logits, of rows that enter at given sites.

        `entries` are (site, h) with ascending sites. The rows of `inputs` belong to the rows of the
        entries, in the same order. More than one entry needs `axes`. Nothing before the first site
        is computed. Unless `logits` are asked for, what is returned in their place means nothing.
        """
        waiting, rows = list(entries), sum(len(h) for _, h in entries)
        k_first = min(entries[0][0] // self.stride, len(self.layout.blocks) - 1)
        final: list[Tensor] = []

        def join(h: Tensor | None, site: int, device: torch.device) -> Tensor | None:
            while waiting and waiting[0][0] == site:
                new = waiting.pop(0)[1]
                h = new.to(device) if h is None else torch.cat((h, new.to(h.device)))
            return h

        def run(k: int, part: Any, h: Tensor | None, call: Call) -> Any:
            if h is None:
                return None
            if len(h) < rows:
                assert axes is not None, "entries at several sites need the batch axes"
                call = axes.narrow(k, call, len(h), rows)
            return part(h, *call[0], **call[1])

        def block(k: int, *args: Any, **kwargs: Any) -> Any:
            h, args, kwargs = take_hidden(args, kwargs)
            device, out = h.device, None
            h = None if k == k_first else h
            for i, part in enumerate(self._parts(k)):
                h = join(h, self.stride * k + i, device)
                out = run(k, part, h, (args, kwargs))
                h = first(out)
            if k == len(self.layout.blocks) - 1:
                h = join(h, self.last, device)
                final.append(h)  # pyright: ignore[reportArgumentType]
                return answer(h, self.layout.arity)  # pyright: ignore[reportArgumentType]
            return out

        stand_ins: dict[int, nn.Module] = dict(enumerate(self._passing[:k_first]))
        for k in range(k_first, len(self.layout.blocks)):
            original = self.layout.blocks[k]
            stand_ins[k] = forwarding(original, lambda *a, _k=k, **kw: block(_k, *a, **kw))
        answered = self._forward(stand_ins, inputs, logits, self._no_embedding)
        return final[0].to(inputs["input_ids"].device), answered

    def besides(self, inputs: dict[str, Any], others: dict[str, Any]) -> str:
        """Return a text that names an argument of a block that differs with the tokens, or "".

        Hidden states, which always differ, are not meant. `inputs` and `others` have other tokens.
        """
        a, b = (self.calls(x, embedded=True) for x in (inputs, others))
        found = []
        for k in range(len(a)):
            was, now = dict(_leaves(a[k])), dict(_leaves(b[k]))
            found += [
                f"block {k} is also given {_name(path)}"
                for path, x in was.items()
                if isinstance(x, Tensor) and not torch.equal(x, now.get(path, x[:0]))
            ]
        return found[0] if found else ""

    def _forward(
        self,
        stand_ins: dict[int, nn.Module],
        inputs: dict[str, Any],
        logits: bool,
        parts: dict[str, nn.Module] | None = None,
    ) -> Tensor:
        """Return the logits of the model with stand-ins for some blocks.

        Unless `logits` are asked for, the unembedding, which may cost more than all blocks, is
        replaced too, and where the family can it is asked for one position only.
        """
        inside = {f"{self.layout.path}.{k}": module for k, module in stand_ins.items()}
        if not logits:
            inside |= self._no_head
        if not logits and self._keeps:
            inputs = inputs | {"logits_to_keep": 1}
        return replaced(self.model, inside | (parts or {}))(**inputs).logits

    def compile(self, **options: Any) -> None:
        """Run blocks and halves through `torch.compile` from now on.

        Two functions are compiled, one for all first halves and one for all second halves. Dynamo
        keeps a bounded number of graphs per function and makes a new one for a module with other
        children, as the two halves of a block have.
        """
        compiled = [torch.compile(f, **options) for f in (_first_part, _second_part)]
        halves = self.layout.halves or [(block,) for block in self.layout.blocks]
        self._running = [
            tuple(partial(run, part) for run, part in zip(compiled, parts, strict=False))
            for parts in halves
        ]

    def _parts(self, k: int) -> tuple[Any, ...]:
        """Return what is run for block `k`: its two halves, or the block itself.

        Raises ValueError if the block is no longer the one that was split, or has hooks, which its
        halves would not run.
        """
        block, name = self.layout.blocks[k], f"{self.layout.path}.{k} of {family(self.model)}"
        if self.model.get_submodule(self.layout.path)[k] is not block:
            raise ValueError(f"{name} was replaced; open the model again")
        if self.layout.halves and block._modules != self._children[k]:
            raise ValueError(f"children of {name} were replaced; open the model again")
        if self.layout.halves and (hooks := _hooks(block)):
            raise ValueError(
                f"{name} has hooks, which its halves would not run: {', '.join(hooks)}; remove "
                "them, or put hooks on the modules of hookable()"
            )
        return self._running[k]

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """Answer in the place of a block that is not run: hand its input through."""
        return answer(take_hidden(args, kwargs)[0], self.layout.arity)

    def _recording(self, k: int, stream: list[Tensor]) -> nn.Module:
        """Return a stand-in for block `k` that appends to `stream` the residual at its sites."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            h, args, kwargs = take_hidden(args, kwargs)
            out = None
            for part in self._parts(k):
                stream.append(h)
                out = part(h, *args, **kwargs)
                h = first(out)
            if k == len(self.layout.blocks) - 1:
                stream.append(h)
            return out

        return forwarding(self.layout.blocks[k], forward)


def _hooks(block: nn.Module) -> list[str]:
    """Return the names of a block's hooks, without those that transformers puts there itself.

    A call with `output_hidden_states=True` leaves hooks on the blocks that record their outputs in
    such calls. They change no numbers, so a block can be run in halves without them.
    """
    found = []
    for hook in [*block._forward_pre_hooks.values(), *block._forward_hooks.values()]:
        hook = hook.func if isinstance(hook, partial) else hook
        named = hook if hasattr(hook, "__qualname__") else type(hook)
        if named.__module__ != CAPTURING:
            found.append(f"{named.__qualname__} of {named.__module__}")
    return found


def _first_part(part: nn.Module, h: Tensor, *args: Any, **kwargs: Any) -> Any:
    return part(h, *args, **kwargs)


def _second_part(part: nn.Module, h: Tensor, *args: Any, **kwargs: Any) -> Any:
    return part(h, *args, **kwargs)


class BatchAxes:
    """Which axis of each argument of a block is the batch, so that it can be cut to fewer rows.

    An argument may have m entries per row along its axis a; for the first n rows it is cut to its
    first m n entries. All other arguments are the same for any number of rows. Calls with an
    attention mask need another table than calls without.
    """

    def __init__(self) -> None:
        self._axis: dict[tuple, tuple[int, int] | None] = {}

    def learn(self, many: list[Call], few: list[Call], n_many: int, n_few: int) -> str | None:
        """Learn the axes from the calls of `n_many` rows and those of the first `n_few` of them.

        Returns None, or why such calls cannot be cut: some argument for fewer rows is not a part of
        the same argument for more rows.
        """
        for k, (a, b) in enumerate(zip(many, few, strict=True)):
            was, now = dict(_leaves(a)), dict(_leaves(b))
            for path in sorted(was.keys() | now.keys(), key=str):
                name = f"{_name(path)} of block {k}"
                if path not in was or path not in now:
                    return f"{name} is there for some numbers of rows alone"
                axis = _axis(was[path], now[path], n_many, n_few)
                if isinstance(axis, str):
                    return f"{name} {axis}"
                self._axis[k, *path] = axis
        return None

    def narrow(self, k: int, call: Call, n: int, rows: int) -> Call:
        """Return the arguments of block `k` for the first `n` rows, given those for `rows` rows."""

        def cut(path: tuple, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if (k, *path) not in self._axis:
                raise ValueError(
                    f"block {k} is given {_name(path)} of shape {tuple(x.shape)}, which it was not "
                    "given when this model was opened, so its batch axis is unknown; resume the "
                    "sites one at a time"
                )
            if (found := self._axis[k, *path]) is None or x.shape[found[0]] == found[1]:
                return x
            axis, times = found
            assert x.shape[axis] == times * rows, (k, path, x.shape, found, rows)
            return x.narrow(axis, 0, times * n)

        return _map(cut, call)


def learn_axes(stand_ins: StandIns, inputs: Inputs) -> tuple[dict[bool, BatchAxes], str | None]:
    """Return the batch axes of calls without and with a mask (False, True), and a reason or None.

    The reason says why the calls of this model cannot be cut to fewer rows.
    """
    ids = probe_ids(stand_ins.model)
    ids = torch.cat((ids, ids.flip(0)))[:3]
    mask = torch.ones_like(ids)
    mask[:, -1] = mask[0, -2] = 0
    learned = {padded: BatchAxes() for padded in ((False, True) if inputs.takes_mask else (False,))}
    for padded, axes in learned.items():
        many, few = (
            stand_ins.calls(inputs(ids[:n], mask[:n]) if padded else inputs(ids[:n]))
            for n in (3, 2)
        )
        if why := axes.learn(many, few, 3, 2):
            return learned, why
    return learned, None


def _axis(many: Any, few: Any, n_many: int, n_few: int) -> tuple[int, int] | str | None:
    """Return (axis, entries per row) of an argument, None if all rows share it, or why neither."""
    if not isinstance(many, Tensor) or not isinstance(few, Tensor):
        same = many is few or (isinstance(many, _PLAIN) and type(many) is type(few))
        if same and (many is few or many == few):
            return None
        return f"({type(many).__name__}) is no tensor and differs with the rows"
    if many.shape == few.shape:
        return None if torch.equal(many, few) else "differs with the rows but has no axis for them"
    axes = [i for i, (a, b) in enumerate(zip(many.shape, few.shape, strict=False)) if a != b]
    if many.ndim == few.ndim and len(axes) == 1:
        m, rest = divmod(many.shape[axes[0]], n_many)
        small = many.narrow(axes[0], 0, m * n_few)
        if not rest and small.shape == few.shape and torch.equal(small, few):
            return axes[0], m
    return f"of shape {tuple(few.shape)} for {n_few} rows is no part of {tuple(many.shape)}"


def _name(path: tuple) -> str:
    """Return a name by which a reader of the block's code finds the argument."""
    return repr(path[1]) if path[0] == 1 else f"positional argument {path[1] + 1}"


def _leaves(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yield (path, value) of everything in nested tuples, lists and dicts."""
    if isinstance(tree, (tuple, list, dict)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _map(f: Callable[[tuple, Any], Any], tree: Any, path: tuple = ()) -> Any:
    """Return nested tuples, lists and dicts with `f(path, value)` in the place of each value."""
    if isinstance(tree, dict):
        return {key: _map(f, value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([_map(f, value, (*path, key)) for key, value in enumerate(tree)])
    return f(path, tree)
