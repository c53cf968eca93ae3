import pytest
import torch

from dense import DenseModel, SiteError
from dense.sites import find_blocks, probe

COMPOSITION = {"gpt_neox": "parallel", "gptj": "parallel", "opt_post": "post-norm"}


def test_every_family_is_composed_as_its_source_says(dense):
    layout = dense.layout
    assert layout.composition == COMPOSITION.get(dense.name, "sequential")
    assert len(layout.halves) == (3 if layout.composition == "sequential" else 0)
    assert layout.d_resid == 32


def test_the_blocks_are_the_shallowest_list_as_long_as_the_model_is_deep(make):
    assert find_blocks(make("gpt2"))[0] == "transformer.h"
    assert find_blocks(make("qwen3_moe"))[0] == "model.layers"
    model = make("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(SiteError, match="says 5 layers, but no ModuleList.*model.layers', 3"):
        find_blocks(model)


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


def test_a_block_of_no_known_composition_is_refused_with_what_was_seen(make):
    def decays(self, h, *args, **kwargs):
        h = 0.9 * h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + self.mlp(self.ln_2(h))

    def mixes(self, h, *args, **kwargs):
        a = self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + a * self.mlp(self.ln_2(h + a))

    for forward, seen in ((decays, "no pair that leaves"), (mixes, "attn/mlp: sequential off")):
        with pytest.raises(SiteError, match=f"block 0 .Strange. is neither.*{seen}"):
            DenseModel(strange(make("gpt2"), forward))


def test_blocks_of_two_kinds_are_refused(make):
    def parallel(self, h, *args, **kwargs):
        a = self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + a + self.mlp(self.ln_2(h))

    model = make("gpt2")
    block = model.transformer.h[1]
    block.__class__ = type("Parallel", (type(block),), {"forward": parallel})
    with pytest.raises(SiteError, match="composed differently.*sequential.*parallel"):
        DenseModel(model)


def test_an_exception_in_the_model_is_not_a_missing_site(make):
    model = make("gpt2")

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    model.transformer.h[2].mlp.forward = broken
    with pytest.raises(RuntimeError, match="out of luck"):
        DenseModel(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_weights_are_refused(make):
    model = make("gpt2")
    model.transformer.h[1].mlp.c_fc.bias.data[0] = torch.nan
    with pytest.raises(SiteError, match="nan"):
        DenseModel(model)
