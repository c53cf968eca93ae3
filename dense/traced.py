"""Edits of the residual stream, applied by nnsight to the hookable twin of a dense model.

    h_s <- h_s + sum of what the edits of site s add        at every pass over the model

The hookable twin (`DenseModel.hookable`) shares the model's weights and has an identity module at
every site. A trace is one pass over it. A generation is one pass for the prompt and one for every
new token; edit.py says what an edit does in each. This is the only file that imports nnsight, and
only when something is to be traced.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .edit import Edit, Edits, LiveEdit, check_edits
from .inputs import at_positions, check_positions
from .model import DenseModel
from .weights.placement import device_of, is_placed


def run_edited(
    dense: DenseModel,
    ids: Int[Tensor, "batch pos"],
    edits: Edits,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    positions: Int[Tensor, "batch wanted"] | None = None,
) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch wanted vocab"]:
    """Return the logits of `dense` with `edits` applied, through nnsight.

    Edits at one site add up; those at different sites act in depth order, each on the stream that
    the earlier ones have changed. No edits, or edits of amount 0, give the plain model's logits
    bit for bit. Gradients flow to directions and amounts. With `positions`, only the logits there
    are computed, as in `DenseModel.logits`: the trace ends at the last site, and the residual there
    is unembedded at those positions. Raises ValueError for an edit that does not fit the model, and
    for positions that `ids` do not have.

    >>> import torch
    >>> from dense import Edit, run_edited, tiny
    >>> model, ids = tiny(), torch.tensor([[1, 2, 3]])
    >>> nothing = Edit(site=2, direction=torch.ones(128), amount=0.0)
    >>> torch.equal(run_edited(model, ids, [nothing]), model.logits(ids))
    True
    """
    check_edits(dense, edits)
    inputs = dense.inputs(ids, attention_mask)
    traced = _shared(dense)
    if positions is None:
        with traced.trace(**inputs):
            apply_edits(traced, dense, edits, attention_mask=attention_mask, ids=ids)
            logits = traced.output.logits.save()
        return logits
    check_positions(positions, ids)
    end = dense.site_path(dense.n_sites - 1)
    with traced.trace(**inputs) as tracer:
        apply_edits(traced, dense, edits, attention_mask=attention_mask, ids=ids)
        h = traced.get(end).output.save()
        tracer.stop()  # what comes after it, the head at every token, is not run
    return dense.unembed(*at_positions(positions, h.to(ids.device), ids))


def generate_edited(
    dense: DenseModel,
    ids: Int[Tensor, "batch pos"],
    edits: Edits,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    **kwargs: Any,
) -> Any:
    """Return the prompts with what `dense`, edited at every step, adds to them: Int[batch longer].

    `ids` are prompts as `dense.tokenizer(text, return_tensors="pt").input_ids` makes them: they
    begin with what the tokenizer puts before a text by default, as the blocks of training do.

    `kwargs` go to Hugging Face's `generate` (max_new_tokens, do_sample, use_cache and so on). What
    it returns is returned, which is something else than ids if `kwargs` ask for that. The edits
    mean the same with and without a cache. edit.py says which edits act on generated positions; a
    LiveEdit always does. There is no gradient. Raises ValueError for an edit that does not fit, and
    for live edits under beam search, which swaps rows between steps.

    >>> import torch
    >>> from dense import Edit, generate_edited, tiny
    >>> model, ids = tiny(), torch.tensor([[1, 2, 3]])
    >>> edit = Edit(site=2, direction=torch.ones(128), amount=0.5)
    >>> generate_edited(model, ids, [edit], max_new_tokens=2, do_sample=False, pad_token_id=0).shape
    torch.Size([1, 5])
    """
    dense.inputs(ids, attention_mask)  # refuses what the model cannot take
    if attention_mask is None and "attention_mask" in _parameters(dense.model):
        attention_mask = torch.ones_like(ids)
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    config = kwargs.get("generation_config") or dense.model.generation_config
    beams = kwargs.get("num_beams") or config.num_beams or 1
    if beams > 1 and any(isinstance(edit, LiveEdit) for edit in edits):
        raise ValueError(
            f"num_beams={beams}: a live edit follows the tokens of each row, and beam search swaps "
            "rows between steps; generate greedily or by sampling"
        )
    with editing(_shared(dense), dense, edits) as edited:
        return edited.trace(input_ids=ids, fn="generate", trace=False, **kwargs)


_TRACED: WeakKeyDictionary[DenseModel, Any] = WeakKeyDictionary()


def _shared(dense: DenseModel) -> Any:
    """Return the library's own nnsight wrapper of a hookable twin of `dense`, made once."""
    if dense not in _TRACED:
        _TRACED[dense] = _wrap(dense.hookable())
    return _TRACED[dense]


def apply_edits(
    traced: Any,
    dense: DenseModel,
    edits: Edits,
    *,
    attention_mask: Shaped[Tensor, "rows own"] | None = None,
    step: int = 0,
    ids: Int[Tensor, "batch pos"] | None = None,
) -> None:
    """Apply `edits` inside a trace of `traced`, a wrapper from `trace_model(dense)`.

        with traced.trace(**dense.inputs(ids)):
            apply_edits(traced, dense, edits)
            h = traced.get(dense.site_path(4)).output.save()

    nnsight requires modules in the order in which they run: read earlier sites before this call and
    later sites after it. A site that was edited reads as edited.

    Where prompts are padded, `attention_mask` says which tokens are real. A trace may have several
    invokes, which nnsight pads on the left to one length; in each of them give the mask of the
    invoke's own prompt (ones). An edit with a direction for each position needs no mask there,
    because it belongs to the last columns. In a generation, call this at every step and pass the
    number of the step:

        with traced.generate(prompt, max_new_tokens=n) as tracer:
            for step in tracer.iter[:n]:
                apply_edits(traced, dense, edits, step=step)

    `ids` are the tokens so far, which live edits need. `editing` keeps track of all this by itself.
    Raises ValueError for edits, or a wrapper, that do not fit the model.

    >>> import torch
    >>> from dense import Edit, apply_edits, run_edited, tiny, trace_model
    >>> model, ids = tiny(), torch.tensor([[1, 2, 3]])
    >>> traced, edits = trace_model(model), [Edit(site=2, direction=torch.ones(128))]
    >>> with traced.trace(**model.inputs(ids)):
    ...     apply_edits(traced, model, edits)
    ...     logits = traced.output.logits.save()
    >>> torch.equal(logits, run_edited(model, ids, edits))
    True
    """
    check_edits(dense, edits)
    _check_traced(traced, dense)
    for site in sorted({edit.site for edit in edits}):
        module = traced.get(dense.site_path(site))
        h = module.output
        deltas = []
        for edit in (edit for edit in edits if edit.site == site):
            if isinstance(edit, LiveEdit):
                deltas.append(edit.delta(h, ids, attention_mask))
            else:
                mask = _own_columns(traced, edit, h) if attention_mask is None else attention_mask
                deltas.append(edit.delta(h, mask, step))
        module.output = h + sum(deltas)


def _own_columns(traced: Any, edit: Edit, h: Tensor) -> Tensor | None:
    """Return the mask of an edit in one of several invokes, which nnsight padded on the left.

    None means that no mask is needed. Raises ValueError where the place of a position is unclear.
    """
    batcher = traced.interleaver.batcher
    if batcher is None or not batcher.batching:
        return None
    if (length := edit.length()) > 1:
        return h.new_ones(1, min(length, h.shape[1]))
    wanted = edit.position if isinstance(edit.position, tuple) else (edit.position,)
    if any(p is not None and p >= 0 for p in wanted):
        raise ValueError(
            f"Edit at site {edit.site}: several invokes are padded to one length, so it is unclear "
            f"where position {edit.position} is; pass attention_mask= of this invoke's own prompt, "
            "or count from its end (-1, -2, ...)"
        )
    return None


@contextmanager
def editing(traced: Any, dense: DenseModel, edits: Edits) -> Iterator[Any]:
    """Yield a copy of `traced` that applies the edits in every trace and generation, at every step.

        with editing(traced, dense, edits) as edited:
            with edited.trace(prompt):
                logits = edited.output.logits.save()
            ids = edited.generate(prompt, max_new_tokens=20)

    `traced` is a wrapper from `trace_model(dense)` and stays as it is. Padding is read from the
    attention_mask with which the model is called. With several invokes, the rows of an edit are
    those of all invokes together. What your own trace reads is edited already. When the context
    closes the copy has no edits any more.

    >>> import torch
    >>> from dense import Edit, editing, run_edited, tiny, trace_model
    >>> model, ids = tiny(), torch.tensor([[1, 2, 3]])
    >>> traced, edits = trace_model(model), [Edit(site=2, direction=torch.ones(128))]
    >>> with editing(traced, model, edits) as edited:
    ...     with edited.trace(**model.inputs(ids)):
    ...         logits = edited.output.logits.save()
    >>> torch.equal(logits, run_edited(model, ids, edits))
    True
    """
    check_edits(dense, edits)
    _check_traced(traced, dense)
    with traced.edit() as (tracer, edited):
        _at_every_pass(tracer, edited, dense, edits)
    try:
        yield edited
    finally:
        edited.clear_edits()


def _at_every_pass(tracer: Any, traced: Any, dense: DenseModel, edits: Edits) -> None:
    """Apply `edits` at every pass of a run, keeping track of the tokens so far and of padding."""
    from nnsight.intervention.interleaver import OutOfOrderError

    so_far, mask, step = None, None, 0
    try:
        for step in tracer.iter[:]:
            args, kwargs = traced.inputs
            ids = args[0] if args else kwargs.get("input_ids")
            if not step:
                so_far, mask = ids, kwargs.get("attention_mask")
            elif so_far is not None and ids is not None:
                so_far = torch.cat((so_far, ids), -1) if ids.shape[1] == 1 else ids
            apply_edits(traced, dense, edits, attention_mask=mask, step=step, ids=so_far)
    except OutOfOrderError:
        if not step:  # after the first pass this is how nnsight ends the loop over passes
            raise


def trace_model(dense: DenseModel) -> Any:
    """Return an nnsight wrapper of a fresh hookable twin of `dense`.

    If `dense` has a tokenizer the wrapper takes text, which it encodes as `dense.tokenizer(text)`
    does by default, and has `generate` (`nnsight.TransformersModel`). Otherwise it takes ids
    (`nnsight.NNsight`; to generate, call `traced.trace(input_ids=ids, fn="generate")`). The
    original model is not touched. Use the wrapper in one thread at a time.

    >>> from dense import tiny, trace_model
    >>> model = tiny()
    >>> traced = trace_model(model)  # an nnsight model with a module at every site
    >>> model.site_path(3)
    'transformer.h.1.resid_mid'
    """
    return _wrap(dense.hookable(), dense.tokenizer)


def _check_traced(traced: Any, dense: DenseModel) -> None:
    """Raise ValueError unless `traced` wraps a hookable twin of `dense`."""
    inside = getattr(traced, "_module", None)
    if not isinstance(inside, nn.Module):
        raise ValueError(
            f"{type(traced).__name__} is no nnsight wrapper; make one with trace_model(dense)"
        )
    original = inside.__dict__.get("original")
    if original is None:
        raise ValueError(
            "this wrapper is of the plain model, which has no module at its residual sites; use "
            "trace_model(dense), or wrap dense.hookable()"
        )
    if original is not dense.model:
        raise ValueError(
            f"this wrapper is of another model than {dense.name}; use its own, trace_model(dense)"
        )


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _wrap(module: nn.Module, tokenizer: Any = None) -> Any:
    import nnsight

    kind: Any = nnsight.NNsight if tokenizer is None else nnsight.TransformersModel
    if is_placed(module):
        kind = _placed(kind, module)
    if tokenizer is None:
        return kind(module)
    return kind(module, tokenizer=tokenizer, task="text-generation")


def _placed(kind: type, module: Any) -> type:
    """Return a kind of wrapper for a model that accelerate has placed (weights/placement.py).

    nnsight moves inputs to where the first parameter is, which may be the device "meta"; this one
    moves them to where tokens are embedded. A model with `hf_device_map`, which the twin is given
    here, transformers leaves where it is.
    """
    device = device_of(module.get_input_embeddings())
    module.__dict__["hf_device_map"] = {"": device}
    return type(kind.__name__, (kind,), {"device": device, "__module__": kind.__module__})
