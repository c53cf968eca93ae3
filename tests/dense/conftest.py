"""Tiny random models of many families, built from configs: no network, no files."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers as tf

from dense import DenseModel

V, D, L = 101, 32, 3
_CORE = dict(
    vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=4, intermediate_size=48
)
_IDS = dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0)
_BASE = _CORE | _IDS
_GQA = _BASE | dict(num_key_value_heads=2)
_HEAD = _GQA | dict(head_dim=8)
_GPT2 = dict(vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=64)
_OPT = _BASE | dict(ffn_dim=48, pad_token_id=1, word_embed_proj_dim=D)
_BLOOM = dict(vocab_size=V, hidden_size=D, n_layer=L, n_head=4)

# fmt: off
FAMILIES = {
    "gpt2":       lambda: tf.GPT2Config(**_GPT2, bos_token_id=0, eos_token_id=0),
    "llama":      lambda: tf.LlamaConfig(**_GQA),
    "mistral":    lambda: tf.MistralConfig(**_GQA, sliding_window=4),
    "qwen3":      lambda: tf.Qwen3Config(**_HEAD),
    "gemma2":     lambda: tf.Gemma2Config(**_HEAD, sliding_window=4),
    "phi3":       lambda: tf.Phi3Config(**_GQA),
    "bloom":      lambda: tf.BloomConfig(**_BLOOM),
    "opt":        lambda: tf.OPTConfig(**_OPT),
    "qwen3_moe":  lambda: tf.Qwen3MoeConfig(**_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),  # noqa: E501
    "gpt_neox":   lambda: tf.GPTNeoXConfig(**_BASE),
    "gptj":       lambda: tf.GPTJConfig(**_GPT2, rotary_dim=4),
    "opt_post":   lambda: tf.OPTConfig(**_OPT, do_layer_norm_before=False),
}
# fmt: on
SEQUENTIAL = ("gpt2 llama mistral qwen3 gemma2 phi3 bloom opt qwen3_moe").split()


def build(family: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model whose biases and norm gains are random too, so that none of them hides."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="session")
def make() -> Callable[..., tf.PreTrainedModel]:
    """`make(family, seed=0)`: a fresh model."""
    return build


@pytest.fixture(scope="session")
def opened() -> Callable[[str], DenseModel]:
    """`opened(family)`: a DenseModel shared by the tests, which must leave it as it is."""
    return cache(lambda family: DenseModel(build(family), name=family))


@pytest.fixture(params=list(FAMILIES))
def dense(request, opened) -> DenseModel:
    return opened(request.param)


@pytest.fixture(params=SEQUENTIAL)
def sequential(request, opened) -> DenseModel:
    return opened(request.param)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(0, V, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def by_hand() -> Callable[[DenseModel, int, torch.Tensor], torch.Tensor]:
    """`by_hand(dense, k, mid)`: what block k makes of the residual after its attention.

    Spelled out from each family's source, as an oracle: nothing here is probed.
    """

    def mlp_half(dense: DenseModel, k: int, x: torch.Tensor) -> torch.Tensor:
        b = dense.layout.blocks[k]
        match dense.model_type:
            case "gpt2":
                return x + b.mlp(b.ln_2(x))
            case "gemma2":
                return x + b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(x)))
            case "bloom":
                return b.mlp(b.post_attention_layernorm(x), x)
            case "opt":
                return x + b.fc2(b.activation_fn(b.fc1(b.final_layer_norm(x))))
            case _:
                return x + b.mlp(b.post_attention_layernorm(x))

    return mlp_half


@pytest.fixture(scope="session")
def hooked(by_hand) -> Callable[..., torch.Tensor]:
    """`hooked(dense, site, h, ids)`: logits of the original with the stream replaced by a hook."""

    def run(dense: DenseModel, site: int, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        k, mid = divmod(site, 2) if dense.has_mid else (site, 0)
        if mid:
            k, h = k + 1, by_hand(dense, k, h)
        blocks = dense.layout.blocks
        if k == len(blocks):
            handle = blocks[-1].register_forward_hook(
                lambda m, a, out: (h, *out[1:]) if isinstance(out, tuple) else h
            )
        else:
            handle = blocks[k].register_forward_pre_hook(lambda m, args: (h, *args[1:]))
        try:
            return dense.model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()

    return run
