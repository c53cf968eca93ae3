"""Models made so that a probe might take them for what they are not: each is refused, and says why.

All are GPT-2s of the shared tiny shape with blocks (or a loop over them) of another kind. The
control is `plain`: the same surgery without the trick opens.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from dense import DenseModel, SiteError


def blocks_with(model, forward, **extra):
    """Give every block this forward, and these attributes made per block."""
    for k, block in enumerate(model.transformer.h):
        for name, value in extra.items():
            setattr(block, name, value(k))
        block.__class__ = type("Odd", (type(block),), {"forward": forward})
    return model


def loop_with(model, forward):
    """Replace the loop over the blocks."""
    trunk = model.transformer
    trunk.__class__ = type("OddTrunk", (type(trunk),), {"forward": forward})
    return model


def sublayers(self, h, a_in=0.0, m_in=0.0, **kwargs):
    h = h + self.attn(self.ln_1(h) + a_in, **kwargs)[0]
    return h + self.mlp(self.ln_2(h) + m_in)


def embed(self, input_ids, position_ids):
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1])[None]
    return self.wte(input_ids) + self.wpe(position_ids)


def mask_of(input_ids):
    t = input_ids.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    return causal.expand(len(input_ids), 1, t, t)


def run(self, input_ids, position_ids, step):
    h, mask = embed(self, input_ids, position_ids), mask_of(input_ids)
    state = {"ids": input_ids, "embedded": h}
    for k, block in enumerate(self.h):
        h = step(block, k, h, state, attention_mask=mask)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(h))


# what is harmless


def plain(model):
    def forward(self, h, *args, **kwargs):
        h = h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + self.mlp(self.ln_2(h))

    return blocks_with(model, forward)


def own_loop(model):
    def forward(self, input_ids, position_ids=None, **kwargs):
        return run(self, input_ids, position_ids, lambda b, k, h, state, **kw: b(h, **kw))

    return loop_with(blocks_with(model, sublayers), forward)


def one_mlp_for_all(model):
    for block in model.transformer.h:
        block.mlp = model.transformer.h[0].mlp
    return model


# what a block must not do


def remembers_the_last_call(model):
    def forward(self, h, *args, **kwargs):
        before = self.memory if self.memory.shape == h.shape else 0
        self.memory = h.detach()
        h = h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + self.mlp(self.ln_2(h) + 1e-2 * before)

    return blocks_with(model, forward, memory=lambda k: torch.zeros(0))


def averages_over_calls(model):
    def forward(self, h, *args, **kwargs):
        self.memory = 0.99 * self.memory + 0.01 * h.detach().mean((0, 1))
        h = h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + self.mlp(self.ln_2(h) + self.memory)

    return blocks_with(model, forward, memory=lambda k: torch.zeros(32))


def acts_by_the_number_of_the_call(model):
    def forward(self, h, *args, **kwargs):
        self.count[0] += 1
        h = h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + self.mlp(self.ln_2(h) * (1 + self.count[0] % 2))

    return blocks_with(model, forward, count=lambda k: [0])


def numbers_the_layers_by_counting_calls(model):
    count = [0]

    def forward(self, h, *args, **kwargs):
        layer, count[0] = count[0] % 3, count[0] + 1
        h = h + self.attn(self.ln_1(h), *args, **kwargs)[0]
        return h + self.mlp(self.ln_2(h) * (1 + layer))

    return blocks_with(model, forward)


def drops_out_in_eval_mode(model):
    def forward(self, h, *args, **kwargs):
        h = h + F.dropout(self.attn(self.ln_1(h), *args, **kwargs)[0], 0.1, training=True)
        return h + self.mlp(self.ln_2(h))

    return blocks_with(model, forward)


def stays_in_train_mode(model):
    class Stubborn(nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    for block in model.transformer.h:
        block.mlp.dropout = Stubborn(0.1).train()
    return model


# what must not pass between blocks beside the residual


def _values_of_block_0(strength):
    """Value residuals: what block 0 computed is kept and added in the later blocks."""

    def tricked(model):
        kept = {}

        def forward(self, h, *args, **kwargs):
            v = self.ln_1(h)
            kept.setdefault("shape", v.shape)
            if self.k == 0:
                kept["v"] = v
            h = h + self.attn(v, *args, **kwargs)[0] + strength * kept["v"].mean(-1, keepdim=True)
            return h + self.mlp(self.ln_2(h))

        return blocks_with(model, forward, k=lambda k: k)

    return tricked


def values_of_block_0_by_name(model):
    """The same through the loop, as a keyword."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, **kw):
            v = block.ln_1(h)
            state.setdefault("v0", v)
            return block(h, a_in=0.5 * state["v0"] if k else 0.0, **kw)

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, sublayers), forward)


def keys_of_an_earlier_layer(model):
    """Keys and values kept in a dict that blocks share, as in models that save cache."""

    def block(self, h, shared=None, **kwargs):
        x = self.ln_1(h)
        if self.k < 2:
            shared[self.k] = x
        h = h + self.attn(x + (shared[1] if self.k == 2 else 0.0), **kwargs)[0]
        return h + self.mlp(self.ln_2(h))

    def forward(self, input_ids, position_ids=None, **kwargs):
        def step(b, k, h, state, **kw):
            return b(h, shared=state.setdefault("shared", {}), **kw)

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, block, k=lambda k: k), forward)


def embeddings_per_layer(model):
    model.transformer.per_layer = nn.Embedding(101, 32)

    def forward(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, **kw):
            return block(h, m_in=0.1 * self.per_layer(state["ids"]), **kw)

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, sublayers), forward)


def the_embedding_again(model):
    def forward(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, **kw):
            return block(h, a_in=1e-3 * state["embedded"], **kw)

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, sublayers), forward)


def a_bridge_over_blocks(model):
    """As in a U-net: the last block also gets what the first one got."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, **kw):
            return block(h + 0.1 * state["embedded"] if k == 2 else h, **kw)

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, sublayers), forward)


def one_block_for_all(model):
    model.transformer.h = nn.ModuleList([model.transformer.h[0]] * 3)
    return model


def looks_ahead(model):
    def forward(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, attention_mask):
            return block(h, attention_mask=torch.ones_like(attention_mask))

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, sublayers), forward)


# what a stream must be


def two_streams(model):
    def forward(self, h, *args, **kwargs):
        a, b = h
        a = a + self.attn(self.ln_1(b), *args, **kwargs)[0]
        return torch.stack((a, b + self.mlp(self.ln_2(a))))

    def loop(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, **kw):
            h = block(torch.stack((h, h)) if k == 0 else h, **kw)
            return h.mean(0) if k == 2 else h

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, forward), loop)


def positions_first(model):
    def forward(self, h, *args, **kwargs):
        return sublayers(self, h.transpose(0, 1), **kwargs).transpose(0, 1)

    def loop(self, input_ids, position_ids=None, **kwargs):
        def step(block, k, h, state, **kw):
            h = block(h.transpose(0, 1) if k == 0 else h, **kw)
            return h.transpose(0, 1) if k == 2 else h

        return run(self, input_ids, position_ids, step)

    return loop_with(blocks_with(model, forward), loop)


NO_FUNCTION = "same tokens get other logits"
BESIDE = "by another way than the residual"
REFUSED = {
    remembers_the_last_call: NO_FUNCTION,
    averages_over_calls: NO_FUNCTION,
    acts_by_the_number_of_the_call: NO_FUNCTION,
    numbers_the_layers_by_counting_calls: "cannot be proven",
    drops_out_in_eval_mode: NO_FUNCTION,
    stays_in_train_mode: NO_FUNCTION,
    values_of_block_0_by_name: BESIDE + ".*block 1 is also given .a_in.",
    keys_of_an_earlier_layer: BESIDE,
    embeddings_per_layer: BESIDE + ".*block 0 is also given .m_in.",
    the_embedding_again: BESIDE + ".*block 0 is also given .a_in.",
    a_bridge_over_blocks: BESIDE,
    one_block_for_all: "lists one module several times",
    looks_ahead: "not causal",
    two_streams: r"block 0 has shape \(2, 2, 6, 32\)",
    positions_first: r"block 0 has shape \(6, 2, 32\)",
}


@pytest.mark.parametrize("harmless", [plain, own_loop, one_mlp_for_all])
def test_control_the_surgery_alone_changes_nothing(make, ids, harmless):
    dense = DenseModel(harmless(make("gpt2")))
    h, y = dense.residuals_and_logits(ids)
    assert dense.n_sites == 7 and dense.apart_because is None
    assert all(torch.equal(dense.resume(s, x, ids), y) for s, x in enumerate(h))


@pytest.mark.parametrize("trick", REFUSED, ids=lambda trick: trick.__name__)
def test_a_model_that_is_not_one_stream_is_refused(make, trick):
    with pytest.raises(SiteError, match=REFUSED[trick]):
        DenseModel(trick(make("gpt2")))


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_values_kept_on_the_side_are_found_however_weak(make, strength):
    with pytest.raises(SiteError, match=BESIDE + "|resuming at site|cannot be proven"):
        DenseModel(_values_of_block_0(strength)(make("gpt2")))
