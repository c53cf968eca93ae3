"""Find the residual sites of any decoder by probing the model in hand.

A block has a site inside it, between attention and MLP, when it can be split exactly in two halves:

    block(h) = mlp_half(attn_half(h)),   attn_half: the block with its MLP silenced
                                         mlp_half:  the block with its attention silenced

To silence a sublayer is to replace it by something that adds nothing to the stream. A sublayer is a
child module of the block, or two children that are silenced together (experts beside a shared
expert, attention beside a state-space mixer). Some blocks have no such point inside: their
sublayers read the same stream (parallel), there is only one sublayer (single), they normalise the
stream itself (post-norm), or no choice of children splits them (whole). A model with such a block
has the L+1 sites between its L blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from .sites import (
    Composition,
    Layout,
    SiteError,
    exact_error,
    explaining,
    family,
    find_blocks,
    perturbation,
    probe_ids,
)
from .twin import arity, first, silent, take_hidden, twin

# These names are tried first, because they are likely; after them all children are tried.
_ATTENTION = ("self_attn", "attn", "self_attention", "attention", "linear_attn", "mixer")
_MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "feedforward", "fc2")

Names = tuple[str, ...]
Pair = tuple[Names, Names]
Split = tuple[Composition, tuple[nn.Module, nn.Module] | None, str]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call of a module during the probe."""

    args: tuple
    kwargs: dict[str, Any]
    out: Any

    def silences(self, child: nn.Module) -> Iterator[nn.Module]:
        """Yield silent stand-ins for the child whose call this is.

        The first answers with zeros; the others return one of its arguments that has the shape of
        its output, for families whose sublayers add the residual themselves.
        """
        out = first(self.out)
        yield silent(child, self.out)
        for key, value in [*list(enumerate(self.args))[1:], *self.kwargs.items()]:
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (out.shape, out.dtype):
                yield silent(child, self.out, through=key)


@torch.no_grad()
def probe(model: nn.Module) -> Layout:
    """Return the layout of `model`, which must be in eval mode.

    Runs the model once, then each block a few times from a perturbed residual. Raises SiteError,
    with what was seen, if the blocks do not hand on a residual stream. An exception in the model's
    own code raises a SiteError too; it is not taken to mean that there are fewer sites.
    """
    path, blocks = find_blocks(model)
    with explaining(model, "a forward on probe tokens"):
        calls, children = _watch(model, blocks)
    splits: list[Split] = []
    known: list[Pair] = []
    for k, block in enumerate(blocks):
        h, args, kwargs = take_hidden(calls[k].args, calls[k].kwargs)
        _check_stream(model, k, h, calls[k].out)
        h = h.to(first(calls[k].out).device)  # where the block computes
        run = _Runner(h + perturbation(h, k), args, kwargs)
        with explaining(model, f"splitting block {k}"):
            splits.append(_split(f"{family(model)}, block {k}", block, children[k], run, known))
    kinds: list[Composition] = [composition for composition, _, _ in splits]
    halves = tuple(halves for _, halves, _ in splits if halves is not None)
    same = len(set(kinds)) == 1
    seen = splits[0][2] if same else ", ".join(f"{k} {kind}" for k, kind in enumerate(kinds))
    return Layout(
        path=path,
        blocks=blocks,
        halves=halves if same else (),
        composition=kinds[0] if same else "mixed",
        seen=seen,
        d_resid=first(calls[0].out).shape[-1],
        arity=arity(calls[0].out),
    )


def _check_stream(model: nn.Module, k: int, h: Any, out: Any) -> None:
    """Raise SiteError unless block `k` turns one (batch, pos, d) stream into another."""
    ids = probe_ids(model)
    for what, x in (("entering", h), ("leaving", first(out))):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != ids.shape:
            raise SiteError(
                f"{family(model)}: the residual {what} block {k} has shape {shape} for tokens "
                f"{tuple(ids.shape)}; only a single stream of shape (batch, pos, d) can be bridged"
            )
        if not x.isfinite().all():
            raise SiteError(f"{family(model)}: the residual {what} block {k} is inf or nan")
    if h.shape != first(out).shape:
        raise SiteError(
            f"{family(model)}: block {k} turns a stream of shape {tuple(h.shape)} into one of "
            f"{tuple(first(out).shape)}; only a stream of one width can be bridged"
        )


def _watch(
    model: nn.Module, blocks: tuple[nn.Module, ...]
) -> tuple[list[_Seen], list[dict[str, _Seen]]]:
    """Return how the model calls every block, and how every block calls its children.

    Both are recorded in one forward pass on probe tokens.
    """
    calls: dict[int, _Seen] = {}
    children: list[dict[str, _Seen]] = [{} for _ in blocks]

    def note(into: dict, key: Any) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            into.setdefault(key, _Seen(args, kwargs, out))

        return hook

    handles = []
    try:
        for k, block in enumerate(blocks):
            handles.append(block.register_forward_hook(note(calls, k), with_kwargs=True))
            for name, child in block.named_children():
                hook = note(children[k], name)
                handles.append(child.register_forward_hook(hook, with_kwargs=True))
        model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(range(len(blocks))) - calls.keys()):
        raise SiteError(f"{family(model)}: blocks {missing} were not called by the model")
    return [calls[k] for k in range(len(blocks))], children


@dataclass(frozen=True, slots=True)
class _Runner:
    """Runs block-like modules from one residual `h`, called as the model calls the block."""

    h: Tensor
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, h: Tensor | None = None) -> Tensor:
        return first(module(self.h if h is None else h, *self.args, **self.kwargs))

    def gap(self, got: Tensor, want: Tensor) -> float:
        """Return the largest difference, relative to what the block adds; NaN if anything is."""
        return ((got - want).abs().max() / (want - self.h).abs().max()).item()


def _candidates(children: dict[str, _Seen], width: int, known: list[Pair]) -> Iterator[Pair]:
    """Yield groups of children that may be (attention, MLP), likely ones first.

    The order is: what split an earlier block; children with telling names; one child alone, which
    would be the only sublayer; all pairs; three children in call order, two of them together.
    """
    fit = [n for n, c in children.items() if isinstance(o := first(c.out), Tensor) and o.ndim > 1]
    fit = [name for name in fit if first(children[name].out).shape[-1] == width]
    yield from (pair for pair in known if {*pair[0], *pair[1]} <= set(fit))
    yield from (((a,), (m,)) for a in _ATTENTION for m in _MLP if a in fit and m in fit)
    yield from (((a,), ()) for a in fit)
    yield from (((a,), (m,)) for a, m in permutations(fit, 2))
    for a, b, c in combinations(fit, 3):
        yield from (((a,), (b, c)), ((a, b), (c,)))


def _silenced(block: nn.Module, children: dict[str, _Seen], names: Names) -> list[dict]:
    """Return the ways of silencing the named children together."""
    ways = [list(children[name].silences(block._modules[name])) for name in names]  # pyright: ignore
    if len(names) > 1:
        ways = [way[:1] for way in ways]
    return [dict(zip(names, way, strict=True)) for way in product(*ways)]


def _split(
    where: str, block: nn.Module, children: dict[str, _Seen], run: _Runner, known: list[Pair]
) -> Split:
    """Return how `block` is composed, its halves if it is sequential, and what was seen.

        sequential   mlp_half(attn_half(h)) = block(h)
        parallel     attn_half(h) + mlp_half(h) - h = block(h)

    A pair of sublayers is a candidate if the block returns its input when both are silenced. A
    post-norm block returns its normalised input then, which is recognised because it does not
    depend on the scale of the input.
    """
    full, tolerance = run(block), exact_error(run.h)
    if not full.isfinite().all():
        raise SiteError(f"{where}: what it makes of a perturbed residual is inf or nan")
    tried: list[str] = []
    rescaled = False
    for a, m in _candidates(children, run.h.shape[-1], known):
        ways = product(_silenced(block, children, a), _silenced(block, children, m))
        for silent_a, silent_m in ways:
            rest = twin(block, silent_a | silent_m)
            if not torch.equal(run(rest), run.h):
                rescaled |= run.gap(run(rest, 2 * run.h), run(rest)) <= 1e-2
                continue
            if not m:
                return "single", None, f"{a[0]} is all that block 0 adds to the stream"
            attn, mlp = twin(block, silent_m), twin(block, silent_a)
            mid = run(attn)
            if min(run.gap(mid, run.h), run.gap(mid, full), run.gap(run(mlp), run.h)) == 0:
                continue  # one of the two does nothing
            sequential = run.gap(run(mlp, mid), full)
            parallel = run.gap(mid + run(mlp) - run.h, full)
            if sequential <= tolerance and not parallel < sequential:
                known[:0] = [(a, m)]
                attn = _trimmed(attn, {*a, *m}, children, run, run.h)
                return "sequential", (attn, _trimmed(mlp, {*a, *m}, children, run, mid)), ""
            if parallel <= tolerance:
                return "parallel", None, ""
            tried.append(f"{'+'.join(a)}/{'+'.join(m)}: {sequential=:.1e}, {parallel=:.1e}")
    if rescaled and not tried:
        return "post-norm", None, ""
    return "whole", None, "; ".join(tried[:4]) or "no sublayers that can be silenced"


def _trimmed(
    half: nn.Module, kept: set[str], children: dict[str, _Seen], run: _Runner, h: Tensor
) -> nn.Module:
    """Return `half` with those children silenced too that do not change a bit of its output.

    The half would compute them in vain; `kept` are never tried.
    """
    want = run(half, h)
    for name, seen in children.items():
        child = half._modules[name]
        if name not in kept and isinstance(first(seen.out), Tensor) and child is not None:
            idle = twin(half, {name: silent(child, seen.out)})
            if torch.equal(run(idle, h), want):
                half = idle
    return half
