"""What is added to the residual stream of a dense model, and where.

    h_s[b, p] <- h_s[b, p] + amount[b, p] * direction[b, p]      at the site s and positions p

A site is a place in the residual stream (`DenseModel` says how they are numbered). In a generation
the prompt is one pass and every new token is another. An edit that names positions, or that has a
different direction or amount at each position, acts on the prompt only: it says nothing about later
tokens. An edit that is the same at all positions acts on the generated ones too, unless
`prompt_only` is set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from .model import DenseModel
from .outlying import lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """What is added to the residual stream of a dense model at one site.

    To change only what sublayer s reads, make an edit at site s and its negative at site s+1. The
    sublayer sees the first; the second takes the change out of the stream again.
    """

    site: int
    """Residual site in depth order, 0..n_sites-1."""
    direction: Float[Tensor, "*any d"]
    """What is added, broadcast to (batch, pos, d); in the residual's own units."""
    amount: float | Tensor = 1.0
    """Factor on the direction, a number or a tensor that broadcasts to (batch, pos)."""
    position: None | int | tuple[int, ...] = None
    """Positions of the prompt that are edited, counted over the real tokens of each row without its
    padding; negative ones count from the row's end. None means all positions."""
    prompt_only: bool = False
    """Whether generated positions are left alone. An edit at named positions, or with a direction
    or an amount of its own for each position, leaves them alone in any case."""
    limit: float = math.inf
    """Tokens whose residual is longer than this keep it: attention sinks, whose residual is a
    hundred times as long as the others' and means something else."""

    def __post_init__(self) -> None:
        check_site(self.site)
        check_amount(self.amount, f"Edit at site {self.site}: amount")

    def delta(
        self,
        h: Float[Tensor, "batch pos d_dense"],
        attention_mask: Shaped[Tensor, "rows own"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, "batch pos d_dense"]:
        """Return what this edit adds to the residual `h`, zero at other positions.

        `attention_mask` says which tokens of the prompt are real, by default all. If it has fewer
        columns than the prompt, it belongs to the last ones, and the columns before are padding.
        `step` is the number of tokens generated so far. If it is above 0, h is either one new
        position (with a cache) or the prompt and `step` positions more (without). Raises ValueError
        for a direction, an amount or a position that does not fit `h`.
        """
        return _within(self.limit, h, self._delta(h, attention_mask, step))

    def _delta(self, h: Tensor, attention_mask: Tensor | None, step: int) -> Tensor:
        if self._everywhere():
            return self._product(h)
        n_prompt = 0 if step and h.shape[1] == 1 else h.shape[1] - step
        if n_prompt < 1:
            return torch.zeros_like(h)
        pad = 0
        if attention_mask is not None:
            pad = n_prompt - attention_mask.shape[-1]
            self._check_mask(attention_mask, h, n_prompt)
        own = h[:, pad:n_prompt]
        delta = self._product(own)
        if self.position is not None:
            real = own.new_ones(1, own.shape[1]) if attention_mask is None else attention_mask
            delta = torch.where(self._chosen(real.to(h.device) != 0)[..., None], delta, 0.0)
        return F.pad(delta, (0, 0, pad, h.shape[1] - n_prompt))

    def length(self) -> int:
        """Return how many positions the edit has values for; 1 if all positions share one."""
        amount = self.amount.shape[-1:] if isinstance(self.amount, Tensor) else ()
        return max(*self.direction.shape[-2:-1], *amount, 1, 1)

    def _everywhere(self) -> bool:
        """Return whether the edit acts alike at every position, generated ones too."""
        return not (self.length() > 1 or self.prompt_only or self.position is not None)

    def _product(self, h: Tensor) -> Tensor:
        direction = self.direction.to(h)
        amount = torch.as_tensor(self.amount, dtype=h.dtype, device=h.device)
        for what, value, shape in (
            ("direction", direction, h.shape),
            ("amount", amount, h.shape[:2]),
        ):
            if not _broadcasts(value.shape, shape):
                raise ValueError(
                    f"Edit at site {self.site}: {what} of shape {tuple(value.shape)} does not "
                    f"broadcast to {tuple(shape)}, the residual there being {tuple(h.shape)}"
                )
        return (amount[..., None] * direction).expand(h.shape)

    def _chosen(self, real: Tensor) -> Tensor:
        """Return which columns are edited, (rows, pos): the p-th real token of each row."""
        place, count = real.cumsum(-1) - 1, real.sum(-1, keepdim=True)
        least = int(count.min())
        wanted = self.position if isinstance(self.position, tuple) else (self.position,)
        if wrong := [p for p in wanted if not -least <= p < least]:  # pyright: ignore
            raise ValueError(
                f"Edit at site {self.site}: positions {wrong} are outside {-least}..{least - 1}"
            )
        chosen = torch.zeros_like(real)
        for p in wanted:
            chosen |= real & (place == (p if p >= 0 else count + p))  # pyright: ignore
        return chosen

    def _check_mask(self, mask: Tensor, h: Tensor, n_prompt: int) -> None:
        if mask.ndim != 2 or mask.shape[0] not in (1, len(h)) or mask.shape[1] > n_prompt:
            raise ValueError(
                f"Edit at site {self.site}: the attention_mask has shape {tuple(mask.shape)}, but "
                f"the prompt has {len(h)} rows of {n_prompt} positions"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveEdit:
    """An edit that is computed anew at every pass, from the tokens so far.

    h_s <- h_s + amount * compute(ids, attention_mask)[:, -n:]      n positions in the pass
    """

    site: int
    """Residual site in depth order, 0..n_sites-1."""
    compute: Callable[[Tensor, Tensor | None], Tensor]
    """A function of (ids, attention_mask) that returns what is added, (batch, pos, d). Both
    arguments are (batch, pos) over prompt and generated tokens; the mask is None where the model
    got none. What is added at a position may depend only on that token and earlier ones, because a
    generation with a cache does not visit a position again."""
    amount: float | Tensor = 1.0
    """Factor on what is computed."""
    limit: float = math.inf
    """Tokens whose residual is longer than this keep it, as in `Edit`."""

    def __post_init__(self) -> None:
        check_site(self.site)
        check_amount(self.amount, f"LiveEdit at site {self.site}: amount")

    def delta(
        self, h: Tensor, ids: Tensor | None, attention_mask: Tensor | None
    ) -> Float[Tensor, "batch pos d_dense"]:
        """Return what this edit adds to the residual `h` of the last tokens of `ids`.

        Raises ValueError without `ids`, and where `compute` gives another shape than that of `h`.
        """
        if ids is None:
            raise ValueError(
                f"LiveEdit at site {self.site} needs the tokens so far: pass ids= to apply_edits, "
                "or enter it with editing(...)"
            )
        if attention_mask is not None:  # generated tokens are real, not padding
            attention_mask = F.pad(
                attention_mask, (0, ids.shape[1] - attention_mask.shape[1]), value=1
            )
        delta = self.compute(ids, attention_mask)[:, -h.shape[1] :]
        if delta.shape != h.shape:
            raise ValueError(
                f"LiveEdit at site {self.site}: compute gave {tuple(delta.shape)} for the last "
                f"positions, where the residual is {tuple(h.shape)}"
            )
        amount = torch.as_tensor(self.amount, dtype=h.dtype, device=h.device)
        return _within(self.limit, h, amount[..., None] * delta.to(h))


Edits = Sequence[Edit | LiveEdit]


def check_edits(dense: DenseModel, edits: Edits) -> None:
    """Raise ValueError for an edit at a site or of a width that `dense` does not have."""
    for edit in edits:
        dense.site_path(edit.site)
        if isinstance(edit, Edit) and edit.direction.shape[-1:] != (dense.d_resid,):
            raise ValueError(
                f"Edit at site {edit.site}: the direction has width {edit.direction.shape[-1]}, "
                f"but the residuals of {dense.name} have {dense.d_resid}"
            )


def check_site(site: Any) -> None:
    """Raise ValueError for a site that is not a whole number."""
    if isinstance(site, bool) or not isinstance(site, int):
        raise ValueError(f"site={site!r} must be an int, the index of a residual site")


def check_amount(amount: Any, what: str) -> None:
    """Raise ValueError for a factor that is not a finite number or a tensor of them."""
    if isinstance(amount, Tensor):
        fine = bool(torch.isfinite(amount).all())
    else:
        fine = isinstance(amount, Real) and math.isfinite(amount)
    if not fine:
        raise ValueError(f"{what}={amount!r} must be a finite number, or a tensor of them")


def _within(limit: float, h: Tensor, delta: Tensor) -> Tensor:
    """Return `delta`, with 0 where the residual `h` is longer than `limit`."""
    if math.isinf(limit):
        return delta
    return torch.where((lengths(h) > limit)[..., None], 0.0, delta)


def _broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    return len(shape) <= len(onto) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(onto), strict=False)
    )
