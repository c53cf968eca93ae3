"""Prove the residual sites of a model on that model, without using twins or stand-ins.

The original model is run on one sequence, with one row of the batch for every site. Row s runs
undisturbed up to site s; there its residual is replaced by a perturbed one, in the original's own
computation (`substituted`). Two things must then hold. Resuming at site s from the perturbed
residual must give the logits of that row. And the row must have the same logits if it began with
other tokens, which shows that the residual is all that is handed on at the site.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .inputs import Inputs
from .sites import (
    Layout,
    SiteError,
    allowed_error,
    exact_error,
    explaining,
    family,
    perturbation,
    probe_ids,
)
from .twin import answer, first, take_hidden


@torch.no_grad()
def check_function(model: Any) -> None:
    """Raise SiteError unless the model's logits are a causal function of its tokens.

    A model that draws random numbers in eval mode, or that remembers an earlier call, gives the
    same tokens other logits the next time. In one without a causal mask later tokens change the
    logits of earlier ones.
    """
    ids, other = probe_ids(model), probe_ids(model, 1)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with explaining(model, "a forward on probe tokens"):
        y, again, _, later, end = (
            model(input_ids=x, use_cache=False).logits for x in (ids, ids, other, ids, changed)
        )
    if not y.isfinite().all():
        raise SiteError(f"{family(model)}: its logits are inf or nan")
    gap = torch.stack([(y - x).norm() for x in (again, later)]).max() / y.norm()
    if not gap <= exact_error(y):
        raise SiteError(
            f"{family(model)}: the same tokens get other logits when they come again (off by "
            f"{gap.item():.1e} of them), so it is no function of its tokens: dropout that eval() "
            "leaves on, or a state kept between calls"
        )
    earlier, last = ((y - end)[:, p].norm() for p in (slice(-1), slice(-1, None)))
    if not earlier <= allowed_error(y) * last:
        raise SiteError(
            f"{family(model)} ({type(model).__name__}) is not causal: another last token changes "
            "the logits before it. Encoders and the like cannot be bridged; some of them are "
            "decoders if the config says is_decoder=True"
        )


@torch.no_grad()
def pads_left(model: Any, inputs: Inputs) -> bool:
    """Return whether a row padded on the left gets the logits that it gets alone."""
    if not inputs.takes_mask:
        return False
    ids = torch.cat((probe_ids(model), probe_ids(model, 1)), dim=1)[:, : inputs.limit]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with explaining(model, "a forward with padding on the left"):
        padded = model(**inputs(ids, mask)).logits[1, 4:]
        alone = model(**inputs(ids[1:, 4:])).logits[0]
    return bool((padded - alone).norm() <= allowed_error(alone) * alone.norm())


@torch.no_grad()
def prove(
    model: Any,
    layout: Layout,
    read: Callable[[Tensor], list[Tensor]],
    resume: Callable[[int, Tensor, Tensor], Tensor],
    besides: Callable[[Tensor, Tensor], str],
) -> tuple[list[Tensor], Tensor]:
    """Return the perturbed residuals and the original's logits; raise SiteError if a site fails.

        resume(s, h_s + noise) = the original with its residual at site s replaced by h_s + noise

    `read` gives the clean residual h_s at every site, and row s of the logits returned belongs to
    site s. The right side is `substituted`. The residual is perturbed because a faulty `resume`
    may reproduce the clean run all the same, for example from a stale cache. Errors are relative
    to what the perturbation does to the logits.

    The substitution is made in runs of two different sequences. If their logits differ, the tokens
    reach what follows the site by another way than the residual; `besides` names an argument of a
    block that differs, if there is one. Before resuming, another sequence has been run, and sites
    are resumed from the last to the first, so that anything a block may have kept from an earlier
    call belongs to the wrong tokens and would show.
    """
    ids, other = probe_ids(model)[:1], probe_ids(model, 1)[:1]
    n_sites = (2 if layout.halves else 1) * len(layout.blocks) + 1
    with explaining(model, "reading the residuals"):
        stream, strange = (read(x.expand(n_sites, -1)) for x in (ids, other))
        clean = model(input_ids=ids, use_cache=False).logits
    moved = [h + perturbation(h, 1000 + site) for site, h in enumerate(stream)]
    with explaining(model, "replacing residuals in the original"):
        (want, missed), (elsewhere, missed_too) = (
            substituted(model, layout, old, moved, x.expand(n_sites, -1))
            for x, old in ((ids, stream), (other, strange))
        )
    missed |= missed_too
    _check_alone(model, want, elsewhere, clean, missed, lambda: besides(ids, other))
    if missed:
        raise SiteError(
            f"{family(model)}: no operation of blocks {sorted({s // 2 for s in missed})} "
            "computes the residual found between their attention and their MLP (sites "
            f"{sorted(missed)}), so those sites cannot be proven"
        )
    wrong: dict[int, str] = {}
    sites = reversed(list(enumerate(moved)))
    for s, h in tqdm(sites, "proving sites", n_sites, leave=False, disable=None, delay=2):
        with explaining(model, f"resuming at site {s}"):
            got = resume(s, h[s : s + 1], ids)
        if how := _wrong(got, want[s], clean):
            wrong[s] = how
    if wrong:
        s = min(wrong)
        raise SiteError(
            f"{family(model)}: resuming from a perturbed residual at site {s} of "
            f"0..{n_sites - 1} is {wrong[s]} ({layout.composition} blocks)"
        )
    return moved, want


def _check_alone(
    model: Any,
    want: Tensor,
    elsewhere: Tensor,
    clean: Tensor,
    missed: set[int],
    besides: Callable[[], str],
) -> None:
    """Raise SiteError unless row s has the same logits in `want` and `elsewhere`, for every s.

    The two are runs of different tokens whose residual at site s was replaced by the same one.
    """
    for s in sorted(set(range(len(want))) - missed):
        if how := _wrong(elsewhere[s], want[s], clean, exact_error(clean)):
            raise SiteError(
                f"{family(model)}: what follows site {s} of 0..{len(want) - 1} depends on the "
                f"tokens by another way than the residual there ({how}; "
                f"{besides() or 'no argument of a block says which'}), so the residual cannot "
                "stand for them"
            )


@torch.no_grad()
def check_joined(
    model: Any,
    moved: list[Tensor],
    want: Tensor,
    joined: Callable[[dict[int, Tensor], dict[int, Tensor]], dict[int, Tensor]],
    unembed: Callable[[Tensor, Tensor], Tensor],
) -> str | None:
    """Return None if one pass that rows join at every site gives the right logits, or why not.

    `moved` and `want` are what `prove` returned: the row that joins at site s with residual
    moved[s] must give the logits want[s]. Raises SiteError if `unembed` of the last site's residual
    does not give that site's logits.
    """
    ids, last = probe_ids(model)[:1], len(moved) - 1
    clean = model(input_ids=ids, use_cache=False).logits
    if wrong := _wrong(unembed(moved[last][last:], ids), want[last], clean):
        raise SiteError(f"{family(model)}: final norm and head on single tokens are {wrong}")
    entries = {s: h[s : s + 1] for s, h in enumerate(moved)}
    try:
        final = joined(entries, dict.fromkeys(entries, ids))
    except RuntimeError as error:  # torch: shapes that do not fit
        return f"a pass that rows join fails: {error}"
    for s, h in final.items():
        if wrong := _wrong(unembed(h, ids), want[s], clean):
            return f"a row that joins at site {s} is {wrong}"
    return None


def _wrong(got: Tensor, want: Tensor, clean: Tensor, allowed: float = 0.0) -> str | None:
    """Return None if `got` is `want` up to rounding, or a text that says how far it is off.

    The error is relative to how far `want` is from the clean logits.
    """
    allowed = allowed or allowed_error(clean)
    error = ((got - want).norm() / (want - clean).norm()).item()
    if error <= allowed:  # NaN is wrong too
        return None
    return f"off by {error:.1e} of the perturbation's effect, allowed {allowed:.0e}"


class _Substitute(TorchFunctionMode):
    """Watches every torch operation and replaces one row in the first result that equals `old`.

    Only row `row` is compared and replaced, by that of `new`; while it is None nothing is watched.
    Equal means up to rounding (`near`), relative to what the sublayer added to the stream. `old`
    was computed in the same batch, but experts and the like may group its rows differently.
    """

    def __init__(self) -> None:
        super().__init__()
        self.row: int | None = None
        self.missed: set[int] = set()

    def seek(self, row: int, before: Tensor, old: Tensor, new: Tensor) -> None:
        self.old, self.new = old, new
        self.near = allowed_error(old) * (old - before)[row].norm()
        self.missed.add(row)
        self.row = row  # set last: from here on every operation is watched

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.row is None or not isinstance(out, Tensor) or out.numel() != self.old.numel():
            return out
        if not out.is_floating_point():  # a mask or ids of the same size
            return out
        row, self.row = self.row, None  # the operations below must not be watched themselves
        rows = out.reshape(self.old.shape)
        if not (rows[row] - self.old[row].to(rows.device)).norm() <= self.near:
            self.row = row
            return out
        self.missed.discard(row)
        return _with_row(rows, row, self.new).reshape(out.shape)


def _with_row(h: Tensor, row: int, new: Tensor) -> Tensor:
    h = h.clone()
    h[row] = new[row]
    return h


def substituted(
    model: Any, layout: Layout, old: list[Tensor], new: list[Tensor], ids: Tensor
) -> tuple[Tensor, set[int]]:
    """Return the original model's logits with the residual of row s replaced at site s.

    Row s of `ids` runs undisturbed up to site s, where old[s] is replaced by new[s]. At the ends of
    a block, hooks replace what enters or leaves it. Inside a block, the operation of the family's
    own code whose result is old[s] is found (`_Substitute`) and its result replaced, so that all
    later code sees new[s]. Also returns the sites for which there is no such operation. No twins
    are used.
    """
    stride, swap = (2, _Substitute()) if layout.halves else (1, _Substitute())

    def enter(k: int, args: tuple, kwargs: dict[str, Any]) -> tuple:
        h, args, kwargs = take_hidden(args, kwargs)
        site = stride * k
        h = _with_row(h, site, new[site])
        if layout.halves:
            swap.seek(site + 1, old[site], old[site + 1], new[site + 1])
        return (h, *args), kwargs

    def leave(k: int, out: Any) -> Any:
        swap.row = None
        if k < len(layout.blocks) - 1:
            return out
        return answer(_with_row(first(out), len(new) - 1, new[-1]), layout.arity)

    handles = []
    try:
        for k, block in enumerate(layout.blocks):
            pre = block.register_forward_pre_hook(
                lambda _m, args, kwargs, k=k: enter(k, args, kwargs), with_kwargs=True
            )
            handles += [pre, block.register_forward_hook(lambda _m, _a, out, k=k: leave(k, out))]
        with swap:
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, swap.missed
