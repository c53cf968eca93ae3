"""Edits of the residual stream, applied by nnsight to the hookable twin.

    h_s[b, p] <- h_s[b, p] + amount[b, p] * direction[b, p]      at the site s and positions p

This is the only file that imports nnsight, and it does so when it is asked to trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dense.model import DenseModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """What is added to the residual stream of a dense model at one site.

    An edit at site s and its negative at s+1 move only what sublayer s reads: the first is seen
    by the sublayer and carried along the stream, the second takes it out of the stream again.
    """

    site: int
    """Residual site in depth order, 0..n_sites-1."""
    direction: Float[Tensor, "*any d"]
    """What is added, broadcast to (batch, pos, d); in the residual's own units."""
    amount: float | Tensor = 1.0
    """Factor on the direction, a number or a tensor that broadcasts to (batch, pos)."""
    position: None | int | tuple[int, ...] = None
    """Positions edited, negative ones counting from the end; None is all of them."""

    def delta(self, h: Float[Tensor, "batch pos d_dense"]) -> Float[Tensor, "batch pos d_dense"]:
        """Return what this edit adds to the residual `h`, zero at other positions.

        Raises ValueError for a direction, an amount or a position that does not fit `h`.
        """
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
        delta = (amount[..., None] * direction).expand(h.shape)
        if self.position is None:
            return delta
        n_pos = h.shape[1]
        wanted = self.position if isinstance(self.position, tuple) else (self.position,)
        if wrong := [p for p in wanted if not -n_pos <= p < n_pos]:
            raise ValueError(
                f"Edit at site {self.site}: positions {wrong} are outside {-n_pos}..{n_pos - 1}"
            )
        chosen = torch.zeros(n_pos, dtype=torch.bool, device=h.device)
        chosen[[p % n_pos for p in wanted]] = True
        return torch.where(chosen[:, None], delta, 0.0)


def run_edited(
    dense: DenseModel,
    ids: Int[Tensor, "batch pos"],
    edits: Sequence[Edit],
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos vocab"]:
    """Return the logits of `dense` with `edits` applied, through nnsight.

    Edits at one site add up; those at different sites act in depth order, each on the stream that
    the earlier ones have changed. No edits, or edits of amount 0, give the plain model's logits
    bit for bit. Gradients flow to directions and amounts. Raises ValueError for an edit that does
    not fit the model.
    """
    check_edits(dense, edits)
    inputs = dense.inputs(ids, attention_mask)
    if dense not in _TRACED:
        _TRACED[dense] = _wrap(dense.hookable())
    traced = _TRACED[dense]
    with traced.trace(**inputs):
        apply_edits(traced, dense, edits)
        logits = traced.output.logits.save()
    return logits


_TRACED: WeakKeyDictionary[DenseModel, Any] = WeakKeyDictionary()


def apply_edits(traced: Any, dense: DenseModel, edits: Sequence[Edit]) -> None:
    """Apply `edits` inside a trace of `traced`, a wrapper from `trace_model(dense)`.

        with traced.trace(**dense.inputs(ids)):
            apply_edits(traced, dense, edits)
            h = traced.get(dense.site_path(4)).output.save()

    nnsight wants modules in the order in which they run: read earlier sites before this call and
    later ones after it. A module that was edited reads as edited.
    """
    check_edits(dense, edits)
    for site in sorted({edit.site for edit in edits}):
        module = traced.get(dense.site_path(site))
        h = module.output
        module.output = h + sum(edit.delta(h) for edit in edits if edit.site == site)


def check_edits(dense: DenseModel, edits: Sequence[Edit]) -> None:
    """Raise ValueError for an edit at a site or of a width that `dense` does not have."""
    for edit in edits:
        dense.site_path(edit.site)
        if edit.direction.shape[-1] != dense.d_resid:
            raise ValueError(
                f"Edit at site {edit.site}: the direction has width {edit.direction.shape[-1]}, "
                f"but the residuals of {dense.name} have {dense.d_resid}"
            )


def trace_model(dense: DenseModel) -> Any:
    """Return an nnsight wrapper of a fresh hookable twin of `dense`.

    With a tokenizer it takes text and generates (`nnsight.TransformersModel`), otherwise it takes
    ids (`nnsight.NNsight`). The original model is not touched. Use it in one thread at a time.
    """
    return _wrap(dense.hookable(), dense.tokenizer)


def as_dense(model: Any) -> DenseModel:
    """Return `model` as a DenseModel: one already, a PreTrainedModel, an nnsight wrapper or a name.

    A wrapper gives the model inside it, and its tokenizer. Raises ValueError for anything else.
    """
    if isinstance(model, DenseModel):
        return model
    if isinstance(model, (str, Path)):
        return DenseModel.from_pretrained(model)
    tokenizer = None
    if type(model).__module__.partition(".")[0] == "nnsight":
        tokenizer = getattr(model, "tokenizer", None)
        model = model._module
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no dense model; pass a DenseModel, a PreTrainedModel, an "
            "nnsight model, or the name or folder of one"
        )
    return DenseModel(model.__dict__.get("original", model), tokenizer)


def tiny() -> DenseModel:
    """Return the built-in dense model: a small trained GPT-2 with its own tokenizer."""
    return DenseModel.from_pretrained("tiny")


def _wrap(module: nn.Module, tokenizer: Any = None) -> Any:
    import nnsight

    if tokenizer is None:
        return nnsight.NNsight(module)
    return nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def _broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    return len(shape) <= len(onto) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(onto), strict=False)
    )
