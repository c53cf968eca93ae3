import pytest

from sparse.config import LOCATIONS, TOPK_LOCATIONS, SparseGPTConfig


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


def test_there_is_a_place_for_every_node_location():
    assert len(LOCATIONS) == len(TOPK_LOCATIONS) == 8


def test_a_config_survives_its_file(tmp_path):
    c = config(activation_locations=["attn_in"], bigram_table=True, eos_token_id=7)
    c.save_pretrained(tmp_path)
    again = SparseGPTConfig.from_pretrained(tmp_path)
    assert again.architecture() == c.architecture() and again.eos_token_id == 7
    assert again.rms_norm_eps == 2.0**-23
    assert config().architecture() != c.architecture()


def test_the_architecture_is_what_decides_the_meaning_of_weights():
    base = config().architecture()
    assert config(eos_token_id=3, use_cache=False, initializer_range=0.5).architecture() == base
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
    }.items():
        assert config(**{field: value}).architecture() != base, field


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
        ("tie_word_embeddings", True, "untied"),
    ],
)
def test_nonsense_is_refused_and_the_field_is_named(field, value, words):
    with pytest.raises(ValueError, match=f"SparseGPTConfig.{field}.*{words}"):
        config(**{field: value})
