import itertools

import pytest
import torch

from sparse.circuits.extract.circuit_module import CircuitModule, refuse_unknown
from sparse.circuits.mask import masked
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT


def made(seed: int = 0, **fields) -> SparseGPT:
    """A random model, two thirds of its weights zero, every bias and gain away from its start."""
    config = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=4,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    torch.manual_seed(seed)
    model = SparseGPT(SparseGPTConfig(**(config | fields))).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p) if p.ndim == 1 else 0
            p *= torch.rand_like(p) < 1 / 3 if p.ndim == 2 else 1
    return model


def drawn(model: SparseGPT, share: float, seed: int = 0, scale: float = 1.0):
    """Which nodes are kept, and the values of the others."""
    rng = torch.Generator().manual_seed(seed)
    widths = model.node_widths().items()
    keep = {at: torch.rand(w, generator=rng) < share for at, w in widths}
    return keep, {at: scale * torch.randn(w, generator=rng) for at, w in widths}


def texts(n: int = 5, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(1))


def of_the_masked_model(model, keep, values, ids) -> torch.Tensor:
    with masked(model, keep, values), torch.no_grad():
        return model(ids).logits


PARTS = [
    dict(attention_sinks=sinks, positions=positions, bigram_table=bigram, activation=activation)
    for sinks, positions, (bigram, activation) in itertools.product(
        (True, False), ("none", "learned"), ((True, "gelu"), (False, "relu"))
    )
]

TIED = dict(tie_word_embeddings=True, bigram_table=True, bigram_fixed=True)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_exact_is_the_masked_model_with_abstopk_everywhere(parts):
    model, ids = made(**parts), texts()
    for share, scale in itertools.product((0.1, 0.4, 1.0), (0.0, 1.0)):
        keep, values = drawn(model, share, scale=scale)
        circuit = CircuitModule(model, keep, values)
        expected = of_the_masked_model(model, keep, values, ids)
        assert (circuit(ids) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("parts", PARTS[::3], ids=str)
def test_where_abstopk_does_not_act_sliced_is_the_masked_model_too(parts):
    model, ids = made(**parts, activation_fraction=1.0), texts()
    keep, values = drawn(model, 0.2)
    expected = of_the_masked_model(model, keep, values, ids)
    for mode in ("exact", "sliced"):
        circuit = CircuitModule(model, keep, values, mode)
        assert circuit.mode == mode
        assert (circuit(ids) - expected).abs().max() < 1e-12


BORROWED = dict(embedding_width=24, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "parts", [{"linear_bias": False}, {"logits_bias": True}, TIED, BORROWED], ids=str
)
def test_the_other_parts_of_the_released_models_are_computed_too(parts):
    model = made(**parts)
    if model.logits_bias is not None:
        torch.nn.init.normal_(model.logits_bias)
    if model.config.embedding_width:
        model.borrow_(torch.randn(50, 24))
    keep, values = drawn(model, 0.3)
    got = CircuitModule(model, keep, values)(texts())
    assert (got - of_the_masked_model(model, keep, values, texts())).abs().max() < 1e-12


def test_control_where_it_acts_sliced_is_another_function_namely_the_model_without_it():
    model, plain = made(), made(activation_fraction=1.0)
    plain.load_state_dict(model.state_dict())
    keep, values = drawn(model, 0.3)
    sliced = CircuitModule(model, keep, values, "sliced")(texts())
    assert (sliced - of_the_masked_model(model, keep, values, texts())).abs().max() > 0.1
    assert (sliced - of_the_masked_model(plain, keep, values, texts())).abs().max() < 1e-12


def test_single_precision_stays_within_1e_5_of_the_masked_model():
    for seed in range(3):
        model = made(seed).float()
        keep, values = drawn(model, 0.3, seed)
        expected = of_the_masked_model(model, keep, values, texts())
        torch.testing.assert_close(
            CircuitModule(model, keep, values)(texts()), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("positions", ["none", "learned"])
def test_logits_at_chosen_positions_are_those_of_the_whole_text(n_layers, positions):
    model, ids = made(num_hidden_layers=n_layers, positions=positions, bigram_table=True), texts()
    for sinks, mode in itertools.product((True, False), ("exact", "sliced")):
        model = made(num_hidden_layers=n_layers, positions=positions, attention_sinks=sinks)
        circuit = CircuitModule(model, *drawn(model, 0.3), mode)
        whole, row = circuit(ids), torch.arange(5)
        at = torch.tensor([8, 3, 0, 5, 8])
        torch.testing.assert_close(circuit(ids, at), whole[row, at])
        torch.testing.assert_close(circuit(ids, -1), whole[:, -1])
        padded = ids.clone()
        padded[1, 4:] = 0  # padding on the right cannot matter
        torch.testing.assert_close(circuit(padded, at)[1], whole[1, 3])
    with pytest.raises(ValueError, match=r"within 0\.\.8"):
        circuit(ids, 9)


def test_nothing_kept_a_location_or_a_whole_layer_without_nodes():
    ids = texts()
    for parts in (PARTS[0], PARTS[-1]):
        model = made(**parts, num_attention_heads=2)
        keep, values = drawn(model, 0.5)
        none = {at: torch.zeros_like(m) for at, m in keep.items()}
        cases = [none, *({**keep, at: none[at]} for at in keep)]
        cases += [{at: none[at] if at[0] == layer else keep[at] for at in keep} for layer in "01"]
        for case in cases:
            expected = of_the_masked_model(model, case, values, ids)
            got = CircuitModule(model, case, values)(ids)
            assert (got - expected).abs().max() < 1e-12


def test_heads_are_left_out_only_where_that_changes_nothing():
    model = made(activation_fraction=1.0, num_hidden_layers=1)
    keep, values = drawn(model, 1.0)
    keep["0.attn.v"][4:8] = False  # the values of head 1 are constant
    heads = lambda circuit: circuit.steps[0].body.n_head  # noqa: E731
    assert heads(CircuitModule(model, keep, values)) == 3  # the sink's share varies with t
    with torch.no_grad():
        values["0.attn.v"][4:8] = 0.0
    circuit = CircuitModule(model, keep, values)
    assert heads(circuit) == 2
    expected = of_the_masked_model(model, keep, values, texts())
    assert (circuit(texts()) - expected).abs().max() < 1e-12
    bare = made(activation_fraction=1.0, num_hidden_layers=1, attention_sinks=False)
    values["0.attn.v"][4:8] = 1.0
    circuit = CircuitModule(bare, keep, values)
    assert heads(circuit) == 2
    expected = of_the_masked_model(bare, keep, values, texts())
    assert (circuit(texts()) - expected).abs().max() < 1e-12


def test_a_location_that_is_not_named_is_kept_whole_as_in_masked():
    model = made()
    keep, values = drawn(model, 0.3)
    some = {"0.attn.v": keep["0.attn.v"], "1.mlp.post_act": keep["1.mlp.post_act"]}
    got = CircuitModule(model, some, values)(texts())
    assert (got - of_the_masked_model(model, some, values, texts())).abs().max() < 1e-12
    got = CircuitModule(model, {}, {})(texts())
    assert (got - of_the_masked_model(model, {}, {}, texts())).abs().max() < 1e-12


def test_it_is_a_copy_that_says_what_it_is_and_how_little_it_holds():
    model = made()
    keep, values = drawn(model, 0.1)
    exact, sliced = (CircuitModule(model, keep, values, m) for m in ("exact", "sliced"))
    assert "mode='exact'" in repr(exact) and "mode='sliced'" in repr(sliced)
    kept, total = sum(int(m.sum()) for m in keep.values()), sum(map(len, keep.values()))
    assert f"{kept} of {total} nodes" in repr(exact) and "\n" not in repr(exact)
    everything = CircuitModule(model, {}, {})
    assert sliced.n_weights < exact.n_weights < everything.n_weights
    blocks = sum(int(p.count_nonzero()) for p in model.model.blocks.parameters())
    assert sliced.n_weights < everything.n_weights - blocks / 2
    before = exact(texts())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(exact(texts()), before)
    assert exact.to(torch.float32)(texts()).dtype == torch.float32


def test_what_it_does_not_know_is_refused_by_name():
    model = made()
    keep, values = drawn(model, 0.5)
    with pytest.raises(ValueError, match="mode='fast' must be 'exact' or 'sliced'"):
        refuse_unknown(model.config, "fast")
    for fields in (
        {"norm": "layer"},
        {"positions": "concatenated", "position_channels": 2},
        {"residual_activation": "relu"},
        {"activation_locations": ["resid_post_mlp"]},
    ):
        name = next(iter(fields))
        with pytest.raises(ValueError, match=rf"SparseGPTConfig\.{name}=.* is not supported"):
            CircuitModule(made(**fields), {}, {})
    with pytest.raises(ValueError, match=r"nodes of \['final_resid'\] are not supported"):
        CircuitModule(model, {**keep, "final_resid": torch.ones(16)}, values)
    learned = made(positions="learned")
    circuit = CircuitModule(learned, *drawn(learned, 0.5))
    with pytest.raises(ValueError, match="13 positions, but the model has 12 learned ones"):
        circuit(texts(2, 13))
    circuit(texts(2, 12))
