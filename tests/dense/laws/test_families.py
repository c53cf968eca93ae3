"""One law for every family: what a site is, against the family's own formula and a hook.

Each model is tiny and random, built from one table of config fields of which a family takes those
that it has. The formula says what block k makes of the residual after its attention:

    h_post = h + scale * after(mlp(before(h)))        the names are the block's own
"""

import pytest
import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dense import DenseModel, SiteError

V, D, L = 101, 32, 3
# fmt: off
FIELDS = dict(
    vocab_size=V, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    hidden_size=D, n_embd=D, d_model=D, word_embed_proj_dim=D, embedding_size=D, lru_width=D,
    num_hidden_layers=L, n_layer=L, n_layers=L, num_layers=L, encoder_layers=L, decoder_layers=L,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, attention_heads=4,
    encoder_attention_heads=4, decoder_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, ffn_dim=48, encoder_ffn_dim=48, decoder_ffn_dim=48, dff=48,
    intermediate_size_mlp=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    max_position_embeddings=64, n_positions=64, max_seq_len=64, rotary_dim=4,
    sliding_window=4, attention_window_size=4, window_size=4,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_k=2, moe_num_shared_experts=1, n_shared_experts=1,
    n_group=1, topk_group=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4,
    mamba_expand=2, mamba_num_heads=8, mamba_head_dim=8, state_size=8, ssm_state_size=8,
    conv_kernel=4, chunk_size=4, n_groups=1, time_step_rank=4,
    linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8,
)
HYBRID = ["mamba", "attention", "mamba"]
MIXED = ["linear_attention", "full_attention", "linear_attention"]
OWN = {  # fields for one family
    "gpt_neo": dict(attention_types=[[["global", "local", "global"], 1]]),
    "gpt_neox_seq": dict(use_parallel_residual=False),
    "stablelm_parallel": dict(use_parallel_residual=True),
    "opt_post": dict(do_layer_norm_before=False, word_embed_proj_dim=16),
    "bloom_post": dict(apply_residual_connection_post_layernorm=True),
    "falcon_alibi": dict(alibi=True, new_decoder_architecture=False, parallel_attn=False),
    "granite": dict(residual_multiplier=0.3, embedding_multiplier=5.0, logits_scaling=3.0),
    "granitemoe": dict(residual_multiplier=0.3),
    "granitemoeshared": dict(residual_multiplier=0.3, shared_intermediate_size=16),
    "granitemoehybrid": dict(layer_types=HYBRID, shared_intermediate_size=16),
    "falcon_h1": dict(mamba_d_ssm=64),
    "mamba2": dict(num_heads=8, head_dim=8),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"]),
    "qwen3_next": dict(layer_types=MIXED),
    "qwen3_5_text": dict(layer_types=MIXED),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                  expert_layer_offset=1),
    "bamba": dict(attn_layer_indices=[1]),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "moe"]),
    "recurrent_gemma": dict(block_types=["recurrent", "attention", "recurrent"]),
    "bert": dict(is_decoder=True),
    "zamba2": dict(layer_types=["mamba", "hybrid", "mamba"],
                   layers_block_type=["mamba", "hybrid", "mamba"]),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=["full_attention"] * L,
                         hidden_size_per_layer_input=8, vocab_size_per_layer_input=V),
    "zaya": dict(num_experts_per_tok=1),
    "cpmant": dict(dim_ff=48, dim_head=8, prompt_length=2),
}
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=8, patch_size=4)
TYPE = {
    "gpt_neox_seq": "gpt_neox", "stablelm_parallel": "stablelm", "opt_post": "opt",
    "bloom_post": "bloom", "falcon_alibi": "falcon",
}

# names of norm before, MLP, norm after, scale
PLAIN = ("post_attention_layernorm", "mlp", "", "")
FORMULA = dict.fromkeys(
    "llama mistral ministral qwen2 qwen3 phi3 gemma smollm3 starcoder2 stablelm persimmon nemotron "
    "olmo helium arcee seed_oss cwm diffllama internlm3 hunyuan_v1_dense ernie4_5 glm gpt_neox_seq "
    "mixtral qwen2_moe qwen3_moe olmoe phimoe ernie4_5_moe glm4_moe gpt_oss minimax_m2 dots1 "
    "deepseek_v2 deepseek_v3 youtu qwen3_next qwen3_5_text nanochat".split(), PLAIN,
) | {
    "gpt2": ("ln_2", "mlp", "", ""), "gpt_neo": ("ln_2", "mlp", "", ""),
    "gpt_bigcode": ("ln_2", "mlp", "", ""), "ctrl": ("layernorm2", "ffn", "", ""),
    "gemma2": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", ""),
    "gemma3": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", ""),
    "gemma3_text": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", ""),
    "vaultgemma": ("pre_feedforward_layernorm", "mlp", "", ""),
    "olmo2": ("", "mlp", "post_feedforward_layernorm", ""),
    "olmo3": ("", "mlp", "post_feedforward_layernorm", ""),
    "exaone4": ("", "mlp", "post_feedforward_layernorm", ""),
    "glm4": ("post_attention_layernorm", "mlp", "post_mlp_layernorm", ""),
    "granite": ("post_attention_layernorm", "mlp", "", "residual_multiplier"),
    "granitemoe": ("post_attention_layernorm", "block_sparse_moe", "", "residual_multiplier"),
    "apertus": ("feedforward_layernorm", "mlp", "", ""),
    "llama4_text": ("post_attention_layernorm", "feed_forward", "", ""),
    "jamba": ("pre_ff_layernorm", "feed_forward", "", ""),
    "bamba": ("pre_ff_layernorm", "feed_forward", "", ""),
    "falcon_h1": ("pre_ff_layernorm", "feed_forward", "", ""),
    "lfm2": ("ffn_norm", "feed_forward", "", ""),
    "recurrent_gemma": ("channel_pre_norm", "mlp_block", "", ""),
    "opt": ("final_layer_norm", "fc", "", ""), "xglm": ("final_layer_norm", "fc", "", ""),
    "biogpt": ("final_layer_norm", "fc", "", ""), "whisper": ("final_layer_norm", "fc", "", ""),
    "granitemoeshared": ("post_attention_layernorm", "shared", "", "residual_multiplier"),
    "granitemoehybrid": ("post_attention_layernorm", "shared", "", "residual_multiplier"),
    "bloom": ("post_attention_layernorm", "adds", "", ""), "mpt": ("norm_2", "adds", "", ""),
    "falcon_alibi": ("post_attention_layernorm", "mlp", "", ""),
}
WITHOUT_MID = {
    "parallel": "gpt_neox gptj codegen falcon phi cohere cohere2 stablelm_parallel",
    "post-norm": "opt_post bloom_post bart openai-gpt bert",
    "single": "mamba mamba2 falcon_mamba nemotron_h",
    "mixed": "rwkv",
    "whole": "doge",
}
COMPOSITION = dict.fromkeys(FORMULA, "sequential") | {
    family: kind for kind, families in WITHOUT_MID.items() for family in families.split()
}
REFUSED = {
    "deepseek_v4": "single stream", "gemma3n_text": "single stream",
    "zamba2": "by another way than the residual", "zaya": "by another way than the residual",
    "cpmant": "not causal", "prophetnet": "not causal", "roberta": "not causal",
}
# fmt: on


def config(family):
    """The family's config with every field of the table that it has."""
    cls = CONFIG_MAPPING[TYPE.get(family, family)]

    def fields(of):
        own = getattr(type(of), "__dataclass_fields__", {}).keys() | vars(of).keys()
        own |= getattr(type(of), "attribute_map", {}).keys()
        got = {k: v for k, v in FIELDS.items() if k in own}
        got = {k: v for k, v in got.items() if not isinstance(getattr(type(of), k, None), property)}
        if "qk_rope_head_dim" in got:  # latent attention has its own widths
            got.pop("head_dim", None)
            got["num_key_value_heads"] = 4
        return got | OWN.get(family, {})

    default = cls()
    if "text_config" in (cls.sub_configs or {}):
        text = default.get_text_config()
        vision = {"vision_config": VISION} if "vision_config" in cls.sub_configs else {}
        return cls(text_config=type(text)(**fields(text)), **vision)
    return cls(**fields(default))


def build(family):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(family)).float()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def by_formula(family, b, h):
    before, mlp, after, scale = FORMULA[family]
    x = getattr(b, before)(h) if before else h
    if mlp == "adds":
        return (b.mlp if family == "bloom" else b.ffn)(x, h)
    if mlp == "fc":
        y = b.fc2(b.activation_fn(b.fc1(x)))
    elif mlp == "shared":
        y = b.shared_mlp(x)
        if b.block_sparse_moe is not None and getattr(b, "has_experts", True):
            y = b.block_sparse_moe(x) + y
    else:
        y = getattr(b, mlp)(x)
    y = (y[0] if isinstance(y, tuple) else y).view(h.shape)
    y = getattr(b, after)(y) if after else y
    return h + (y * getattr(b, scale) if scale else y)


def by_hook(dense, family, site, h, inputs):
    """Logits of the original, the stream replaced by a hook on a block."""
    k, mid = divmod(site, 2) if dense.has_mid else (site, 0)
    if mid:
        k, h = k + 1, by_formula(family, dense.layout.blocks[k], h)
    blocks = dense.layout.blocks

    def enter(module, args, kwargs):
        return ((h, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h})

    if k == len(blocks):
        handle = blocks[-1].register_forward_hook(
            lambda m, a, out: type(out)((h, *out[1:])) if isinstance(out, tuple | list) else h
        )
    else:
        handle = blocks[k].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        return dense.model(**inputs).logits
    finally:
        handle.remove()


def moved(h, seed):
    g = torch.Generator().manual_seed(seed)
    return h + h.square().mean().sqrt() * torch.randn(h.shape, generator=g)


@pytest.mark.parametrize("family", COMPOSITION)
def test_a_site_is_the_stream_that_the_family_s_formula_has_there(family, ids):
    dense = DenseModel(build(family))
    has_mid = COMPOSITION[family] == "sequential"
    assert dense.layout.composition == COMPOSITION[family]
    assert dense.n_sites == (2 * L + 1 if has_mid else L + 1) and dense.apart_because is None
    mask = torch.ones_like(ids)
    mask[2, 8:] = 0
    if dense.pads_left:
        mask[1, :4] = 0
    inputs = dense.inputs(ids)
    want = dense.model(**inputs).logits
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(y, want)
    for s, x in enumerate(h):
        assert torch.equal(dense.resume(s, x, ids), want)
        got = dense.resume(s, moved(x, s), ids)
        assert torch.equal(got, by_hook(dense, family, s, moved(x, s), inputs))
        assert (got - want).norm() > 0.01 * want.norm()

    inputs, seen = dense.inputs(ids, mask), mask.bool()
    want = dense.model(**inputs).logits
    h, y = dense.residuals_and_logits(ids, mask)
    assert torch.equal(y, want) and torch.equal(dense.resume(1, h[1], ids, mask), want)
    entries = {s: moved(x, s) for s, x in enumerate(h)}
    final = dense.joined(entries, dict.fromkeys(entries, ids), dict.fromkeys(entries, mask))
    for s in (1, dense.n_sites - 2):
        got = dense.resume(s, entries[s], ids, mask)
        assert torch.equal(got, by_hook(dense, family, s, entries[s], inputs))
        # other batches, other order of summation
        joined = dense.unembed(final[s], ids)[seen]
        torch.testing.assert_close(joined, got[seen], atol=1e-5, rtol=1e-5)
    if dense.pads_left:
        alone = dense.logits(ids[1:2, 4:])[0]
        torch.testing.assert_close(want[1, 4:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_of_another_kind_is_refused_by_name_and_reason(family):
    with pytest.raises(SiteError, match=f"{family}.*{REFUSED[family]}"):
        DenseModel(build(family))
