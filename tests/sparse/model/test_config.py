import pytest

from sparse.model.config import LOCATIONS, RESIDUAL_TOPK, TOPK_LOCATIONS, SparseGPTConfig


def config(**fields):
    return SparseGPTConfig(**(dict(hidden_size=64, num_attention_heads=3, head_dim=8) | fields))


def test_k_is_the_floor_of_fraction_times_width_at_every_place():
    c = config(intermediate_size=50, activation_fraction=0.29)
    for place in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        assert c.k(place) == 18  # 0.29 * 64 = 18.56
    for place in ("attn_q", "attn_k", "attn_v"):
        assert c.k(place) == 6  # of 24, all heads together: 6.96
    assert c.k("mlp_neuron") == 14


def test_at_least_one_entry_is_kept_and_a_fraction_of_one_keeps_all():
    assert {config(activation_fraction=1e-4).k(p) for p in TOPK_LOCATIONS} == {1}
    c = config(activation_fraction=1.0, intermediate_size=50)
    assert [c.k(p) for p in TOPK_LOCATIONS] == [64, 24, 24, 24, 64, 64, 50, 64]


def test_places_that_are_left_out_keep_everything():
    c = config(activation_locations=("mlp_neuron",), intermediate_size=48)
    assert c.k("mlp_neuron") == 12
    assert [c.k(p) for p in TOPK_LOCATIONS if p != "mlp_neuron"] == [64, 24, 24, 24, 64, 64, 64]


def test_concatenated_positions_widen_what_is_read_and_nothing_else():
    c = config(positions="concatenated", position_channels=13, activation_fraction=0.5)
    assert c.read_width == 77 and config().read_width == 64
    assert [c.k(p) for p in ("attn_in", "mlp_in", "attn_out", "mlp_out")] == [38, 38, 32, 32]


def test_the_residual_is_left_alone_unless_it_is_named():
    assert [config().k(p) for p in RESIDUAL_TOPK] == [64, 64]
    c = config(activation_locations=["resid_post_mlp"])
    assert [c.k(p) for p in RESIDUAL_TOPK] == [64, 16]


def test_there_is_a_place_for_every_node_location():
    assert len(LOCATIONS) == len(TOPK_LOCATIONS) == 8


def test_a_config_survives_its_file(tmp_path):
    c = config(activation_locations=["attn_in"], bigram_table=True, eos_token_id=7)
    c.save_pretrained(tmp_path)
    again = SparseGPTConfig.from_pretrained(tmp_path)
    assert again.architecture() == c.architecture() and again.eos_token_id == 7
    assert again.rms_norm_eps == 2.0**-23
    assert config().architecture() != c.architecture()


def test_a_model_saved_before_a_field_existed_is_the_same_model():
    """These are the fields that the first configs had; their fingerprints must not move."""
    first = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
    first |= {"intermediate_size", "max_position_embeddings", "activation", "activation_fraction"}
    first |= {"activation_locations", "attention_sinks", "bigram_table", "positions"}
    first |= {"rms_norm_eps", "tie_word_embeddings"}
    assert set(config().architecture()) == first
    assert set(config(positions="learned", bigram_table=True).architecture()) == first
    assert set(config(norm="layer").architecture()) == first | {"norm"}


def test_the_architecture_is_what_decides_the_meaning_of_weights():
    base = config().architecture()
    assert config(eos_token_id=3, use_cache=False, initializer_range=0.5).architecture() == base
    assert config(dropout=0.1).architecture() == base
    table = config(bigram_table=True).architecture()
    frozen = config(bigram_table=True, bigram_fixed=True, bigram_freeze_last=True)
    assert frozen.architecture() == table != base
    for field, value in {
        "vocab_size": 7,
        "hidden_size": 32,
        "activation": "relu",
        "activation_fraction": 0.5,
        "activation_locations": ["attn_in"],
        "attention_sinks": False,
        "bigram_table": True,
        "positions": "learned",
        "rms_norm_eps": 1e-5,
        "head_dim": 4,
        "norm": "layer",
        "layer_norm_eps": 1e-6,
        "linear_bias": False,
        "residual_activation": "relu",
        "logits_bias": True,
        "tie_word_embeddings": True,
    }.items():
        assert config(**{field: value}).architecture() != base, field
    widths = [config(positions="concatenated", position_channels=n).architecture() for n in (1, 2)]
    assert widths[0] != widths[1] != base


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("hidden_size", 0, "at least 1"),
        ("num_hidden_layers", -1, "at least 1"),
        ("vocab_size", "10", "integer"),
        ("head_dim", 8.5, "integer"),
        ("intermediate_size", None, "integer"),
        ("activation_fraction", 0.0, r"\(0, 1\]"),
        ("activation_fraction", 1.1, r"\(0, 1\]"),
        ("activation_fraction", float("nan"), r"\(0, 1\]"),
        ("activation_locations", ["attn_im"], "attn_im.*known: attn_in"),
        ("activation", "swish", "gelu"),
        ("positions", "rotary", "learned"),
        ("rms_norm_eps", 0.0, "above 0"),
        ("norm", "batch", "rms"),
        ("residual_activation", "gelu", "identity"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("layer_norm_eps", -1.0, "above 0"),
        ("linear_bias", "yes", "true or false"),
        ("position_channels", 4, "'none'"),
        ("position_channels", -1, "'none'"),
        ("norm_bias", True, "needs norm='layer'"),
        ("position_sinusoids", True, "needs positions='concatenated'"),
        ("position_dropout", True, "needs positions='concatenated'"),
        ("bigram_fixed", True, "needs bigram_table"),
        ("bigram_freeze_last", True, "needs bigram_table"),
    ],
)
def test_nonsense_is_refused_and_the_field_is_named(field, value, words):
    with pytest.raises(ValueError, match=f"SparseGPTConfig.{field}.*{words}"):
        config(**{field: value})


def test_concatenated_positions_need_a_width():
    with pytest.raises(ValueError, match="position_channels=0 must be at least 1"):
        config(positions="concatenated")
