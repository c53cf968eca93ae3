"""How a learned position table starts: drawn as embeddings are, or at zero as the authors' does."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from sparse import Batches, SparseGPT, SparseGPTConfig, gao2025, pretrain

SMALL = dict(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
SMALL |= dict(num_attention_heads=1, head_dim=16, max_position_embeddings=200)


def build(**fields):
    torch.manual_seed(0)
    return SparseGPT(SparseGPTConfig(**SMALL, positions="learned", **fields)).eval()


def test_the_table_starts_as_asked_and_no_other_weight_knows():
    normal, zero = build().state_dict(), build(position_init="zero").state_dict()
    assert abs(normal["model.wpe.weight"].std() / 0.02 - 1) < 0.05
    assert (zero["model.wpe.weight"] == 0).all()
    assert all(torch.equal(zero[name], normal[name]) for name in zero.keys() - {"model.wpe.weight"})


def test_the_preset_of_the_authors_starts_a_table_at_zero():
    learned = gao2025("unused", model=SMALL | dict(positions="learned")).model
    assert learned.position_init == "zero"
    assert (SparseGPT(learned).model.wpe.weight == 0).all()
    drawn = dict(positions="learned", position_init="normal")
    assert SparseGPT(gao2025("unused", model=SMALL | drawn).model).model.wpe.weight.std() > 0.01
    beside = SMALL | dict(positions="concatenated", position_channels=4)
    for fields in (SMALL, beside):  # the authors draw a table that stands beside the residual
        assert gao2025("unused", model=fields).model.position_init == "normal"


def test_a_table_of_zeros_trains(tmp_path):
    fields = SMALL | dict(positions="learned")
    preset = gao2025(str(tmp_path), 1, 0.5, steps=4, model=fields)
    model = SparseGPT(preset.model)
    ids = torch.randint(0, 30, (8, 8), generator=torch.Generator().manual_seed(0))
    pretrain(model, Batches(ids, 4), preset.pretrain)
    assert (model.model.wpe.weight[:8] != 0).any() and (model.model.wpe.weight[8:] == 0).all()


def test_it_is_no_part_of_what_a_model_is():
    a, b = build(), build(position_init="zero")
    assert a.config.architecture() == b.config.architecture()
    b.load_state_dict(a.state_dict())
    assert a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize("start", ["normal", "zero"])
def test_a_saved_model_comes_back_with_the_table_it_had(start, tmp_path):
    model = build(position_init=start)
    with torch.no_grad():
        model.model.wpe.weight.normal_()
    model.save_pretrained(tmp_path)
    for opened in (AutoModelForCausalLM, AutoModel):
        again = opened.from_pretrained(tmp_path)
        table = again.get_submodule("wpe" if opened is AutoModel else "model.wpe").weight
        assert torch.equal(table, model.model.wpe.weight) and again.config.position_init == start
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("position_init")  # as models were saved before the field was there
    (tmp_path / "config.json").write_text(json.dumps(values))
    again = SparseGPT.from_pretrained(tmp_path)
    assert again.config.position_init == "normal" and again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("start", ["normal", "zero"])
def test_a_table_that_is_missing_in_a_file_starts_as_the_config_says(start, tmp_path):
    """transformers builds without memory and starts what it did not find."""
    model = build(position_init=start)
    state = {n: p for n, p in model.state_dict().items() if n != "model.wpe.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    table = SparseGPT.from_pretrained(tmp_path).model.wpe.weight
    assert (table == 0).all() == (start == "zero") and table.isfinite().all()


def test_a_larger_vocabulary_leaves_the_table_and_is_not_started_at_zero():
    model = build(position_init="zero")
    with torch.no_grad():
        model.model.wpe.weight.fill_(3.0)
    model.resize_token_embeddings(40, mean_resizing=False)
    assert (model.model.wpe.weight == 3).all() and (model.model.wte.weight[30:] != 0).any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(position_init="zeros"), r"position_init='zeros' must be one of \('normal', 'zero'\)"),
        (dict(position_init="zero"), "'zero' needs positions='learned'.* positions='none'"),
        (
            dict(position_init="zero", positions="concatenated", position_channels=3),
            "needs positions='learned'.* positions='concatenated'",
        ),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        SparseGPTConfig(**fields)
