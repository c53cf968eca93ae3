"""Hooks on the blocks: transformers' own, which only note outputs, and those of others."""

from functools import partial

import pytest
import torch

from dense import DenseModel, SiteError, tiny

FLAGS = dict(output_hidden_states=True, output_attentions=True)
FAMILIES = ("gpt2", "llama", "qwen3_moe", "gpt_neox", "opt_post")


@pytest.fixture(params=["tiny", *FAMILIES])
def dense(request, make):
    return tiny() if request.param == "tiny" else DenseModel(make(request.param))


@pytest.fixture
def ids():
    return torch.randint(1, 101, (3, 7), generator=torch.Generator().manual_seed(4))


def everything(dense, ids):
    """Every number that passes with stand-ins compute, and their gradients."""
    h, y = dense.residuals_and_logits(ids)
    resumed = [dense.resume(s, x + 0.5, ids) for s, x in enumerate(h)]
    entries = {s: x.clone().requires_grad_() for s, x in enumerate(h)}
    final = dense.joined(entries, dict.fromkeys(entries, ids))
    gradients = torch.autograd.grad(
        sum(x.square().sum() for x in final.values()), [*entries.values()]
    )
    return [*h, y, *resumed, *(x.detach() for x in final.values()), *gradients]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reading_hidden_states_from_transformers_changes_no_number(dense, ids):
    before, clean = everything(dense, ids), dense.model(ids).logits
    out = dense.model(ids, **FLAGS)
    assert torch.equal(out.logits, clean) and len(out.hidden_states) == dense.n_layers + 1
    installed = [m for m in dense.model.modules() if m._forward_hooks]
    assert installed, "the control: transformers left hooks"
    assert equal(everything(dense, ids), before)
    again = dense.model(ids, **FLAGS)  # and transformers still reads what it read
    assert equal(again.hidden_states, out.hidden_states)
    assert [m for m in dense.model.modules() if m._forward_hooks] == installed


def test_a_model_that_transformers_has_hooked_opens_as_it_did(dense, ids):
    before, layout = everything(dense, ids), dense.layout
    dense.model(ids, **FLAGS)
    again = DenseModel(dense.model, dense.tokenizer)
    assert (again.layout.composition, again.n_sites) == (layout.composition, dense.n_sites)
    assert equal(everything(again, ids), before)


def test_a_model_whose_config_asks_for_hidden_states_is_the_same_model(make, ids):
    plain, model = DenseModel(make("llama")), make("llama")
    model.config.output_hidden_states = True
    assert equal(everything(DenseModel(model), ids), everything(plain, ids))


def test_the_hookable_twin_gives_hidden_states_before_and_after_the_original_did(dense, ids):
    before = dense.hookable()(ids, output_hidden_states=True).hidden_states
    theirs = dense.model(ids, output_hidden_states=True).hidden_states
    after = dense.hookable()(ids, output_hidden_states=True).hidden_states
    assert len(theirs) == dense.n_layers + 1
    assert equal(before, theirs) and equal(after, theirs)


class Watcher:
    def __call__(self, module, args, out):
        """Look on."""


def watch(name, module, args, out):
    """Look on."""


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (Watcher(), f"Watcher of {__name__}"),
        (lambda m, a, out: None, f"<lambda> of {__name__}"),
        (partial(watch, "block 2"), f"watch of {__name__}"),
    ],
)
def test_a_hook_of_others_is_named_and_refused_also_beside_those_of_transformers(
    hook, named, make, ids
):
    dense = DenseModel(make("llama"))
    h = dense.residuals(ids)
    dense.model(ids, **FLAGS)
    handle = dense.layout.blocks[2].register_forward_hook(hook)
    says = (
        f"model.layers.2 of llama has hooks, .*would not run: {named}; remove them, or .*hookable"
    )
    with pytest.raises(ValueError, match=says):
        dense.residuals(ids)
    with pytest.raises(ValueError, match=says):
        dense.resume(0, h[0], ids)
    with pytest.raises(SiteError, match=says):
        DenseModel(dense.model)
    handle.remove()
    assert equal(dense.residuals(ids), h)


def test_a_hook_before_a_block_is_refused_by_name_too(make, ids):
    dense = DenseModel(make("llama"))
    dense.layout.blocks[0].register_forward_pre_hook(lambda m, args: None)
    with pytest.raises(ValueError, match=f"model.layers.0 .*<lambda> of {__name__}; remove them"):
        dense.residuals(ids)
