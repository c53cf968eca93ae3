"""Presets, and twins whose embeddings are the dense model's (`Preset.embeddings`)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from bridges import PRESETS, cotrain, load_run, plan, read_text, save_run
from dense import DenseModel, tiny
from sparse.model.borrowed import normed_table

BORROWS = replace(PRESETS["smoke"], embeddings="dense", density=0.5, steps=3, tasks=())


def untied():
    torch.manual_seed(0)
    shape = dict(vocab_size=2048, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False))
    return DenseModel(model, tokenizer=tiny().tokenizer, name="untied")


def offloaded():
    """The built-in model with its weights put away between two runs."""
    dense = tiny()
    cpu_offload(dense.model, torch.device("cpu"))
    assert dense.model.get_input_embeddings().weight.is_meta
    return DenseModel(dense.model, tokenizer=dense.tokenizer, name="offloaded")


def test_an_offloaded_model_lends_the_same_tables():
    assert BORROWS.build(offloaded()).sparse.fingerprint() == (
        BORROWS.build(tiny()).sparse.fingerprint()
    )


@pytest.mark.parametrize("open_", [tiny, untied])
def test_the_tables_are_the_dense_models_and_one_where_it_ties_them(open_):
    dense, tied = open_(), open_ is tiny
    twin, bridges, _ = BORROWS.build(dense)
    bridges.check(dense, twin)
    assert twin.config.tie_word_embeddings is tied
    embedding = dense.model.get_input_embeddings().weight
    unembedding = dense.model.get_output_embeddings().weight
    assert torch.equal(twin.model.wte.table, normed_table(embedding))
    assert torch.equal(twin.lm_head.table, normed_table(unembedding))
    assert torch.equal(twin.model.wte.table, twin.lm_head.table) is tied
    own = replace(BORROWS, embeddings="own").build(dense).sparse
    assert twin.num_parameters() < own.num_parameters() / 2


def test_training_changes_the_maps_and_leaves_the_tables(tmp_path):
    dense = tiny()
    twin, bridges, config = BORROWS.build(dense, str(tmp_path / "run"))
    table, before = twin.model.wte.table.clone(), twin.model.wte.map.weight.detach().clone()
    text = read_text(BORROWS, dense.tokenizer)
    cotrain(dense, twin, bridges, text.batches, config)
    assert torch.equal(twin.model.wte.table, table)
    assert not torch.equal(twin.model.wte.map.weight, before)
    save_run(tmp_path / "run", dense, twin, bridges, facts={}, **text.kept())
    again = load_run(tmp_path / "run", dense).sparse
    assert again.fingerprint() == twin.fingerprint() and torch.equal(again.lm_head.table, table)


def test_the_plan_counts_what_is_borrowed_as_memory_and_not_as_trained():
    dense = tiny()
    own, borrowed = (
        plan(dense, *replace(BORROWS, embeddings=which).build(dense), batch=4, length=32)
        for which in ("own", "dense")
    )
    table = dense.model.get_input_embeddings().weight
    width = BORROWS.build(dense).sparse.d_resid
    fewer = 2 * (table.shape[0] - table.shape[1]) * width  # rows of its own; columns of a map
    assert own.twin_parameters - borrowed.twin_parameters == fewer
    name = "weights of twin and bridges"
    assert own.state[name] - borrowed.state[name] == 4 * (fewer - table.numel())
    assert borrowed.borrowed == table.numel() and own.borrowed == 0


def test_tables_of_two_shapes_are_refused():
    shape = dict(vocab_size=2048, hidden_size=32, word_embed_proj_dim=16, ffn_dim=32)
    shape |= dict(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    model = OPTForCausalLM(OPTConfig(**shape, tie_word_embeddings=False))
    model.lm_head = torch.nn.Linear(32, 2048, bias=False)
    dense = SimpleNamespace(model=model, name="odd", vocab_size=2048, tokenizer=tiny().tokenizer)
    dense.d_resid = 32
    with pytest.raises(ValueError, match=r"odd: its embedding and unembedding .* --embeddings own"):
        BORROWS.build(dense)
