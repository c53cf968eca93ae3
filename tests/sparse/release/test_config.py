"""What we write opens in the authors' code, which calls GPTConfig with every key of the file."""

import json
import random
from dataclasses import fields, make_dataclass

import pytest

from sparse import release
from sparse.model.config import CHOICES, RESIDUAL_TOPK, TOPK_LOCATIONS, SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.release.config import IGNORED, read_config, write_config

NAMES = """block_size vocab_size n_layer n_head d_head d_model dropout bias ln_bias rms_norm
residual_activation_type activation_type afrac afrac_loctypes debug_nans tied_unembed tokenizer_name
grad_checkpointing d_mlp enable_bigram_table learnable_bigram_table d_pos_emb dropout_cat_pos_emb
sinusoidal_cat_pos_emb enable_sparse_kernels flash sink""".split()
GPTConfig = make_dataclass("GPTConfig", [(name, object, None) for name in NAMES])  # the authors'

SMALL = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
SMALL |= dict(head_dim=3, intermediate_size=24, max_position_embeddings=12)
PLACES = (*TOPK_LOCATIONS, *RESIDUAL_TOPK)
BESIDE = dict(positions="concatenated", position_channels=5)
NEEDS_MORE = ("concatenated", "zero")
TABLE, LAYER = dict(bigram_table=True), dict(norm="layer")
OPTIONS = {
    "plain": {},
    **{f"{f}={x}": {f: x} for f, xs in CHOICES.items() for x in xs if x not in NEEDS_MORE},
    "positions from zero": dict(positions="learned", position_init="zero"),
    **{f"AbsTopK at {x}": dict(activation_locations=[x]) for x in PLACES},
    "AbsTopK nowhere": dict(activation_locations=[]),
    "all kept": dict(activation_fraction=1.0),
    "no sinks": dict(attention_sinks=False),
    "no biases": dict(linear_bias=False),
    "norm bias": LAYER | dict(norm_bias=True),
    "bigram table": TABLE,
    "fixed table": TABLE | dict(bigram_fixed=True),
    "table without its last row": TABLE | dict(bigram_freeze_last=True),
    "beside": BESIDE,
    "beside, sinusoids": BESIDE | dict(position_sinusoids=True),
    "beside, dropout": BESIDE | dict(position_dropout=True, dropout=0.1),
    "tied": dict(tie_word_embeddings=True),
    "bias of the logits": dict(logits_bias=True),
    "dropout": dict(dropout=0.1),
}


def mixed(seed):
    """A config with every option drawn at random."""
    rng = random.Random(seed)
    flag = lambda: rng.random() < 0.5  # noqa: E731
    drawn = {name: rng.choice(choices) for name, choices in CHOICES.items()}
    beside, layer, table = drawn["positions"] == "concatenated", drawn["norm"] == "layer", flag()
    start = drawn["position_init"] if drawn["positions"] == "learned" else "normal"
    return drawn | dict(
        position_init=start,
        activation_fraction=rng.choice([0.25, 0.5, 1.0]),
        activation_locations=[p for p in PLACES if flag()],
        position_channels=rng.choice([1, 6]) if beside else 0,
        position_sinusoids=beside and flag(),
        position_dropout=beside and flag(),
        norm_bias=layer and flag(),
        bigram_table=table,
        bigram_fixed=table and flag(),
        dropout=rng.choice([0.0, 0.2]),
        **{name: flag() for name in ("attention_sinks", "linear_bias", "tie_word_embeddings")},
    )


EVERY = OPTIONS | {f"at random {seed}": mixed(seed) for seed in range(26)}


@pytest.mark.parametrize("option", EVERY)
def test_every_config_that_we_write_is_one_of_the_authors(option):
    config = SparseGPTConfig(**SMALL | EVERY[option])
    written = write_config(config)
    theirs = GPTConfig(**json.loads(json.dumps(written)))
    assert {name: getattr(theirs, name) for name in written} == written
    again = read_config(written, config.positions == "learned", config.logits_bias)
    assert again.architecture() == config.architecture()


def test_a_saved_model_opens_in_the_authors_code(tmp_path):
    release.save_model(SparseGPT(SparseGPTConfig(**SMALL)), tmp_path)
    theirs = GPTConfig(**json.loads((tmp_path / "beeg_config.json").read_text()))
    assert (theirs.n_layer, theirs.d_model, theirs.sink) == (1, 16, True)


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_of_other_versions_is_read_and_never_written(key):
    assert key not in {f.name for f in fields(GPTConfig)}
    written = write_config(SparseGPTConfig(**SMALL))
    assert key not in written
    with pytest.raises(TypeError, match=key):
        GPTConfig(**written | {key: None})  # control: the authors' code takes no other key
    plain = read_config(written, False, False)
    assert read_config(written | {key: None}, False, False).to_dict() == plain.to_dict()
