import re

import pytest
import torch

from dense import DenseModel, SiteError
from dense.probe import probe
from dense.sites import perturbation

COMPOSITION = {"gpt_neox": "parallel", "gptj": "parallel", "opt_post": "post-norm"}


def test_every_family_is_composed_as_its_source_says(dense):
    layout = dense.layout
    assert layout.composition == COMPOSITION.get(dense.name, "sequential")
    assert len(layout.halves) == (3 if layout.composition == "sequential" else 0)
    assert layout.d_resid == 32


def test_a_half_runs_only_what_it_needs(make):
    model = make("llama").eval()
    attn_half, mlp_half = probe(model).halves[0]
    block = model.model.layers[0]
    assert attn_half.self_attn is block.self_attn and mlp_half.mlp is block.mlp
    for idle in (attn_half.post_attention_layernorm, mlp_half.input_layernorm):
        assert type(idle).__name__ == "Silent"
    assert attn_half.input_layernorm is block.input_layernorm


def test_sublayers_with_untold_names_are_found_by_trying(make, ids):
    model = make("llama")
    for block in model.model.layers:
        names = {"self_attn": "mixing", "mlp": "thinking"}
        block._modules = {names.get(n, n): m for n, m in block._modules.items()}
        block.__class__ = _renamed(type(block))
    dense = DenseModel(model)
    assert dense.n_sites == 7
    assert torch.equal(dense.residuals(ids)[3], DenseModel(make("llama")).residuals(ids)[3])


def _renamed(base):
    class Renamed(base):
        self_attn = property(lambda self: self._modules["mixing"])
        mlp = property(lambda self: self._modules["thinking"])

    return Renamed


def strange(model, forward):
    for block in model.transformer.h:
        block.__class__ = type("Strange", (type(block),), {"forward": forward})
    return model


def decays(self, h, *args, **kwargs):
    h = 0.9 * h + self.attn(self.ln_1(h), *args, **kwargs)[0]
    return h + self.mlp(self.ln_2(h))


def mixes(self, h, *args, **kwargs):
    a = self.attn(self.ln_1(h), *args, **kwargs)[0]
    return h + a * self.mlp(self.ln_2(h + a))


def only_attends(self, h, *args, **kwargs):
    return h + self.attn(self.ln_1(h), *args, **kwargs)[0]


def parallel(self, h, *args, **kwargs):
    a = self.attn(self.ln_1(h), *args, **kwargs)[0]
    return h + a + self.mlp(self.ln_2(h))


@pytest.mark.parametrize(
    ("forward", "composition", "said"),
    [
        (decays, "whole", "do not come apart .*no sublayers that can be silenced"),
        (mixes, "single", "adds to the stream once"),
        (only_attends, "single", "adds to the stream once"),
        (parallel, "parallel", "in parallel, so there is none"),
    ],
)
def test_blocks_without_a_stream_inside_have_sites_between_them_and_say_why(
    make, ids, hooked, forward, composition, said
):
    dense = DenseModel(strange(make("gpt2"), forward))
    assert dense.layout.composition == composition and not dense.has_mid and dense.n_sites == 4
    assert re.search(f"4 residual sites .* none inside: .*{said}", dense.describe())
    for site, h in enumerate(dense.residuals(ids)):
        moved = h + perturbation(h)
        assert torch.equal(dense.resume(site, moved, ids), hooked(dense, site, moved, ids))


def test_blocks_of_two_kinds_have_sites_between_them_and_say_which(make):
    model = make("gpt2")
    block = model.transformer.h[1]
    block.__class__ = type("Parallel", (type(block),), {"forward": parallel})
    dense = DenseModel(model)
    assert dense.n_sites == 4 and "0 sequential, 1 parallel, 2 sequential" in dense.describe()


def test_two_children_that_are_silenced_together_are_one_sublayer(make, ids):
    def twice(self, h, *args, **kwargs):
        x = self.ln_1(h)
        h = h + self.attn(x, *args, **kwargs)[0] + self.beside(x)
        return h + self.mlp(self.ln_2(h))

    def thrice(self, h, *args, **kwargs):
        h = h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        x = self.ln_2(h)
        return h + self.mlp(x) + self.beside(x)

    for forward in (twice, thrice):
        model = make("gpt2")
        for block in model.transformer.h:
            block.beside = torch.nn.Linear(32, 32)
        dense = DenseModel(strange(model, forward))
        block, h = dense.layout.blocks[0], dense.residuals(ids)
        want = h[1] + block.mlp(block.ln_2(h[1]))
        if forward is thrice:
            want = want + block.beside(block.ln_2(h[1]))
        assert dense.n_sites == 7 and torch.equal(h[2], want)


def test_an_exception_in_the_model_names_the_module_and_is_not_a_missing_site(make):
    model = make("gpt2")

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    model.transformer.h[2].mlp.act.forward = broken
    with pytest.raises(
        SiteError, match=r"gpt2: .* failed in transformer\.h\.2\.mlp\.act .*out of luck"
    ):
        DenseModel(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exception_while_a_block_is_split_is_not_a_missing_site(make):
    def fragile(self, h, *args, **kwargs):
        a = self.attn(self.ln_1(h), *args, **kwargs)[0]
        if not a.any():
            raise RuntimeError("nothing to add")
        return h + a + self.mlp(self.ln_2(h + a))

    with pytest.raises(SiteError, match=r"splitting block 0 .* transformer\.h\.0 .*nothing to add"):
        DenseModel(strange(make("gpt2"), fragile))


def test_nan_weights_are_refused(make):
    model = make("gpt2")
    model.transformer.h[1].mlp.c_fc.bias.data[0] = torch.nan
    with pytest.raises(SiteError, match="nan"):
        DenseModel(model)
