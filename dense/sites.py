"""Find the residual sites of any decoder by probing the model in hand.

Site 0 is after the embeddings, 2i+1 after the attention of block i, 2i+2 after its MLP. A block has
a site inside it when silencing one sublayer at a time splits it exactly:

    block(h) = mlp_half(attn_half(h)),   attn_half: the block with its MLP silenced
                                         mlp_half:  the block with its attention silenced

Blocks whose sublayers read the same stream (parallel) or which normalise the stream itself
(post-norm) have no such point: such a model has the L+1 sites between its blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dense.twin import Silent, arity, first, take_hidden, twin

# Names only seed the search; every pair of children is tried after them.
_ATTENTION = ("self_attn", "attn", "self_attention", "attention", "linear_attn", "mixer")
_MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "feedforward", "fc2")

Composition = Literal["sequential", "parallel", "post-norm"]


class SiteError(ValueError):
    """The residual sites of this model could not be found or did not pass their proof."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the residual stream of a model can be read and replaced."""

    path: str
    """Dotted path of the list of blocks."""
    blocks: tuple[nn.Module, ...]
    """The model's own blocks."""
    halves: tuple[tuple[nn.Module, nn.Module], ...]
    """(attn_half, mlp_half) of each block; empty when blocks have no site inside."""
    composition: Composition
    """How a block combines its two sublayers."""
    d_resid: int
    """Width of the residual stream."""
    arity: int
    """Length of the tuple that a block returns, 0 for a bare tensor."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call of a module during the probe."""

    args: tuple
    kwargs: dict[str, Any]
    out: Any

    def silences(self) -> Iterator[Silent]:
        """The ways of silencing this child: write zeros, or hand through a like-shaped argument."""
        out = first(self.out)
        yield Silent(out.shape[-1], arity(self.out))
        for key, value in [*list(enumerate(self.args))[1:], *self.kwargs.items()]:
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (out.shape, out.dtype):
                yield Silent(out.shape[-1], arity(self.out), through=key)


def perturbation(h: Tensor, seed: int = 0) -> Tensor:
    """Return Gaussian noise of the shape and root mean square of `h`."""
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(h) * h.float().square().mean().sqrt().to(h.dtype)


def allowed_error(x: Tensor) -> float:
    """Relative error that rounding may cause in another batch or order of summation."""
    return 1e-3 if x.dtype == torch.float32 else 5e-2


def probe_ids(model: Any) -> Tensor:
    """Return the two short random sequences on which a model is probed."""
    embedding = model.get_input_embeddings()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.weight.shape[0], (2, 6), generator=g)
    return ids.to(embedding.weight.device)


def find_blocks(model: Any) -> tuple[str, tuple[nn.Module, ...]]:
    """Return path and members of the shallowest ModuleList as long as the model is deep."""
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [(p, m) for p, m in lists if len(m) == n_layers]
    if not fitting:
        raise SiteError(
            f"{family(model)}: the config says {n_layers} layers, but no ModuleList has that "
            f"length; found {[(p, len(m)) for p, m in lists]}"
        )
    path, members = min(fitting, key=lambda found: (found[0].count("."), len(found[0])))
    return path, tuple(members)


@torch.no_grad()
def probe(model: nn.Module) -> Layout:
    """Return the layout of `model`, which must be in eval mode.

    Runs the model once, then each block a few times from a perturbed residual. Raises SiteError
    with what was seen when a block is neither sequential, parallel nor post-norm.
    """
    path, blocks = find_blocks(model)
    calls, children = _watch(model, blocks)
    splits = []
    for k, block in enumerate(blocks):
        h, args, kwargs = take_hidden(calls[k].args, calls[k].kwargs)
        if h.ndim != 3:
            raise SiteError(
                f"{family(model)}: the residual entering block {k} has shape {tuple(h.shape)}; "
                "only a single stream of shape (batch, pos, d) can be bridged"
            )
        run = _Runner(h + perturbation(h, k), args, kwargs)
        splits.append(_split(f"{family(model)}, block {k}", block, children[k], run))
    kinds = {composition for composition, _ in splits}
    if len(kinds) > 1:
        raise SiteError(
            f"{family(model)}: blocks are composed differently "
            f"({[composition for composition, _ in splits]}); sites need one kind"
        )
    return Layout(
        path=path,
        blocks=blocks,
        halves=tuple(halves for _, halves in splits if halves is not None),
        composition=kinds.pop(),
        d_resid=first(calls[0].out).shape[-1],
        arity=arity(calls[0].out),
    )


def family(model: Any) -> str:
    """Return the family's name in transformers, for example "gpt2"."""
    return str(model.config.model_type)


def _watch(
    model: nn.Module, blocks: tuple[nn.Module, ...]
) -> tuple[list[_Seen], list[dict[str, _Seen]]]:
    """Return how the model calls every block, and every block its children, in one forward."""
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
        """Largest difference relative to what the block adds; NaN when anything is NaN."""
        return ((got - want).abs().max() / (want - self.h).abs().max()).item()


def _pairs(children: dict[str, _Seen], width: int) -> Iterator[tuple[str, str]]:
    """Candidate (attention, MLP) children: those with telling names first, then all others."""
    fit = [n for n, c in children.items() if isinstance(o := first(c.out), Tensor) and o.ndim > 1]
    fit = [name for name in fit if first(children[name].out).shape[-1] == width]
    named = [(a, m) for a in _ATTENTION for m in _MLP if a in fit and m in fit]
    yield from named
    yield from (pair for pair in permutations(fit, 2) if pair not in named)


def _split(
    where: str, block: nn.Module, children: dict[str, _Seen], run: _Runner
) -> tuple[Composition, tuple[nn.Module, nn.Module] | None]:
    """Return how `block` is composed, and its halves if it is sequential.

    With both sublayers silenced a pre-norm block returns its input, and a post-norm block a
    normalised input, which does not depend on the input's scale. Then

        sequential   mlp_half(attn_half(h)) = block(h)
        parallel     attn_half(h) + mlp_half(h) - h = block(h)
    """
    full, tolerance = run(block), allowed_error(run.h)
    tried: list[str] = []
    rescaled = False
    for a, m in _pairs(children, run.h.shape[-1]):
        for silent_a in children[a].silences():
            for silent_m in children[m].silences():
                rest = twin(block, {a: silent_a, m: silent_m})
                if not torch.equal(run(rest), run.h):
                    rescaled |= run.gap(run(rest, 2 * run.h), run(rest)) <= 1e-2
                    continue
                attn, mlp = twin(block, {m: silent_m}), twin(block, {a: silent_a})
                sequential = run.gap(run(mlp, run(attn)), full)
                parallel = run.gap(run(attn) + run(mlp) - run.h, full)
                if sequential <= tolerance and not parallel < sequential:
                    mid = run(attn)
                    attn = _trimmed(attn, {a, m}, children, run, run.h)
                    return "sequential", (attn, _trimmed(mlp, {a, m}, children, run, mid))
                if parallel <= tolerance:
                    return "parallel", None
                tried.append(f"{a}/{m}: sequential off by {sequential:.1e}, {parallel=:.1e}")
    if rescaled and not tried:
        return "post-norm", None
    raise SiteError(
        f"{where} ({type(block).__name__}) is neither sequential, parallel nor post-norm, so its "
        f"residual sites are unknown. Children called: {list(children)}. "
        f"Silencing pairs of them gave: {tried or 'no pair that leaves the stream alone'}"
    )


def _trimmed(
    half: nn.Module, kept: set[str], children: dict[str, _Seen], run: _Runner, h: Tensor
) -> nn.Module:
    """Silence the children that this half computes in vain: its output must keep every bit."""
    want = run(half, h)
    for name, seen in children.items():
        if name not in kept and isinstance(first(seen.out), Tensor):
            idle = twin(half, {name: Silent(first(seen.out).shape[-1], arity(seen.out))})
            if torch.equal(run(idle, h), want):
                half = idle
    return half
