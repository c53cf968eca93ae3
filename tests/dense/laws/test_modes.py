"""Precision, padding, positions, compilation, checkpointing, and what users do to a model."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dense import DenseModel, SiteError


def noisy(h, seed=3):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(h.shape, generator=g).to(h)
    return h + h.float().square().mean().sqrt().to(h) * noise


SOME = ["gpt2", "llama", "gemma2", "bloom", "qwen3_moe", "gpt_neox"]


def boundary(dense, site, h, ids, **inputs):
    """The original's logits with the stream entering block k replaced by a hook; sites 0, 2, .."""
    k = site // (2 if dense.has_mid else 1)
    block = dense.layout.blocks[min(k, dense.n_layers - 1)]
    if k == dense.n_layers:
        swap = block.register_forward_hook(
            lambda m, a, out: (h, *out[1:]) if isinstance(out, tuple) else h
        )
    else:
        swap = block.register_forward_pre_hook(lambda m, args: (h, *args[1:]))
    try:
        return dense.model(input_ids=ids, use_cache=False, **inputs).logits
    finally:
        swap.remove()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_every_precision_is_the_model_in_that_precision(make, opened, ids, family, precision):
    if precision == "bf16":
        dense = DenseModel(make(family).to(torch.bfloat16))
    else:
        dense = opened(family)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        want = dense.model(input_ids=ids, use_cache=False).logits
        h, y = dense.residuals_and_logits(ids)
        assert torch.equal(y, want)
        for site, x in enumerate(h):
            assert torch.equal(dense.resume(site, x, ids), want)
            if not dense.has_mid or site % 2 == 0:
                moved = noisy(x)
                got = dense.resume(site, moved, ids)
                assert torch.equal(got, boundary(dense, site, moved, ids))
                assert not torch.equal(got, want)
    if precision == "autocast":  # control: it is another precision
        assert not torch.equal(want, dense.logits(ids))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_positions_that_are_given_are_the_model_s(opened, ids, family):
    dense = opened(family)
    positions = (
        torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]).expand(3, 10) + torch.arange(3)[:, None]
    )
    want = dense.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(dense.logits(ids, position_ids=positions), want)
    assert not torch.equal(dense.logits(ids), want)
    h = dense.residuals(ids, position_ids=positions)
    for site, x in enumerate(h):
        assert torch.equal(dense.resume(site, x, ids, position_ids=positions), want)
    moved = noisy(h[0])
    got = dense.resume(0, moved, ids, position_ids=positions)
    assert torch.equal(got, boundary(dense, 0, moved, ids, position_ids=positions))


def test_a_model_that_numbers_its_positions_itself_is_given_none(opened, ids):
    positions = torch.arange(10).expand(3, 10)
    with pytest.raises(ValueError, match="bloom numbers its positions itself"):
        opened("bloom").logits(ids, position_ids=positions)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_eager_and_sdpa_attention_are_the_model_s_own(make, ids, family):
    seen = []
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for kind in ("eager", "sdpa"):
        model = make(family)
        model.set_attn_implementation(kind)
        dense = DenseModel(model)
        h, y = dense.residuals_and_logits(ids, mask)
        assert torch.equal(y, model(**dense.inputs(ids, mask)).logits)
        assert all(torch.equal(dense.resume(s, x, ids, mask), y) for s, x in enumerate(h))
        seen.append(y[mask.bool()])
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)


def entry_gradient(resume, h):
    h = h.detach().clone().requires_grad_()
    g = torch.Generator().manual_seed(6)
    y = resume(h)
    (y * torch.randn(y.shape, generator=g)).sum().backward()
    return h.grad


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_checkpointing_changes_no_gradient(make, ids, family):
    dense = DenseModel(make(family))
    want = [
        entry_gradient(lambda h, s=s: dense.resume(s, h, ids), noisy(x))
        for s, x in enumerate(dense.residuals(ids))
    ]
    runs = [0]
    count = dense.layout.blocks[-1].mlp.register_forward_hook(
        lambda *_: runs.__setitem__(0, runs[0] + 1)
    )

    def tail(s, h):
        return checkpoint(lambda x: dense.resume(s, x, ids), h, use_reentrant=False)

    for s, x in enumerate(dense.residuals(ids)):
        runs[0] = 0
        got = entry_gradient(lambda h, s=s: tail(s, h), noisy(x))
        assert torch.equal(got, want[s])
        assert runs[0] == (2 if s < dense.n_sites - 1 else 0)  # control: it was recomputed
    count.remove()
    dense.model.gradient_checkpointing_enable()
    for s, x in enumerate(dense.residuals(ids)):
        got = entry_gradient(lambda h, s=s: dense.resume(s, h, ids), noisy(x))
        assert torch.equal(got, want[s])


# the checks of shapes that the tests add give all functions one code, whose graphs are bounded
@torch._dynamo.config.patch(recompile_limit=64)
def test_blocks_and_halves_compile_without_a_break(make, ids):
    dense = DenseModel(make("llama"))
    h, y = dense.residuals_and_logits(ids)
    slope = entry_gradient(lambda x: dense.resume(3, x, ids), h[3])
    torch._dynamo.reset()
    dense.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert all(torch.equal(dense.resume(s, h[s], ids), y) for s in (0, 3, 6))
    got = entry_gradient(lambda x: dense.resume(3, x, ids), h[3])
    torch.testing.assert_close(got, slope, atol=1e-6, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # control: it was compiled


def test_a_block_that_was_changed_after_opening_is_refused(make, ids):
    class Adapter(nn.Module):  # what parameter-efficient tuning does
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, *args, **kwargs):
            return 1.1 * self.base(*args, **kwargs)

    dense = DenseModel(make("llama"))
    h, block = dense.residuals(ids), dense.layout.blocks[1]
    block.mlp = Adapter(block.mlp)
    with pytest.raises(ValueError, match="children of model.layers.1 of llama were replaced"):
        dense.residuals(ids)
    with pytest.raises(ValueError, match="open the model again"):
        dense.resume(1, h[1], ids)
    dense.resume(4, h[4], ids)  # nothing of that block
    again = DenseModel(dense.model)
    assert not torch.equal(again.logits(ids), dense.resume(6, h[6], ids))
    again.model.model.layers[1] = make("llama").model.layers[1]
    with pytest.raises(ValueError, match="model.layers.1 of llama was replaced"):
        again.residuals(ids)


def test_a_change_deeper_in_a_block_is_seen(make, ids):
    dense = DenseModel(make("llama"))
    before = dense.logits(ids)
    dense.layout.blocks[1].mlp.gate_proj = nn.Linear(32, 48, bias=False).requires_grad_(False)
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(y, dense.logits(ids)) and not torch.equal(y, before)
    assert all(torch.equal(dense.resume(s, x, ids), y) for s, x in enumerate(h))


def test_a_hook_on_a_block_that_halves_would_skip_is_refused(make, ids):
    dense = DenseModel(make("llama"))
    handle = dense.layout.blocks[2].register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(ValueError, match="model.layers.2 of llama has hooks.*hookable"):
        dense.residuals(ids)
    handle.remove()
    dense.residuals(ids)


class Int8Linear(nn.Module):
    """Weights as integers with one scale per row, held in buffers as quantisers do."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def test_a_model_of_integer_weights_is_exact_and_its_buffers_count(make, ids):
    def quantised():
        model = make("llama")
        for block in model.model.layers:
            for part in (block.mlp, block.self_attn):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(part, name, Int8Linear(child))
        return DenseModel(model)

    dense = quantised()
    h, y = dense.residuals_and_logits(ids)
    assert dense.n_sites == 7 and torch.equal(y, dense.logits(ids))
    assert all(torch.equal(dense.resume(s, x, ids), y) for s, x in enumerate(h))
    other = quantised()
    assert other.fingerprint == dense.fingerprint
    other.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert other.fingerprint != dense.fingerprint


def test_weights_are_frozen_and_gradients_flow_to_the_residual_alone(opened, ids):
    dense = opened("llama")
    assert not any(p.requires_grad for p in dense.model.parameters())
    assert not dense.resume(1, dense.residuals(ids)[1], ids).requires_grad
    assert not any(h.requires_grad for h in dense.residuals(ids))


def test_padding_on_the_left_is_refused_where_it_would_change_the_answer(make, ids):
    model = make("gpt2")

    class Placed(type(model)):  # numbers positions by place, whatever is padding
        def forward(self, input_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0):
            return super().forward(
                input_ids, attention_mask=attention_mask, use_cache=False,
                logits_to_keep=logits_to_keep,
            )  # fmt: skip

    model.__class__ = Placed
    dense = DenseModel(model)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    right = dense.logits(ids, mask)
    torch.testing.assert_close(right[1, :6], dense.logits(ids[1:2, :6])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="padded on the left"):
        dense.logits(ids, mask.flip(1))


def test_a_model_that_takes_no_mask_says_so(make, ids):
    model = make("gpt2")

    class Maskless(type(model)):
        def forward(self, input_ids=None, use_cache=None):
            return super().forward(input_ids, use_cache=False)

    model.__class__ = Maskless
    dense = DenseModel(model)
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(dense.resume(3, h[3], ids), y)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        dense.logits(ids, torch.ones_like(ids))


def test_what_encodes_is_refused_by_name(make):
    import transformers as tf

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    bert = tf.BertConfig(vocab_size=101, **small)
    with pytest.raises(SiteError, match=r"bert .BertForMaskedLM. is not causal"):
        DenseModel(tf.BertForMaskedLM(bert))
    decoder = tf.BertLMHeadModel(tf.BertConfig(vocab_size=101, is_decoder=True, **small))
    assert DenseModel(decoder).describe().startswith("bert (bert): 2 layers, 3 residual sites")
    t5 = tf.T5Config(vocab_size=101, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    with pytest.raises(SiteError, match="t5 .T5ForConditionalGeneration. is not a causal"):
        DenseModel(tf.T5ForConditionalGeneration(t5))
