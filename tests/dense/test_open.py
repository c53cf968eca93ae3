import nnsight
import pytest
import torch

from dense import (
    DenseModel,
    Edit,
    SiteError,
    apply_edits,
    as_dense,
    config_of,
    run_edited,
    trace_model,
)


def test_whatever_holds_the_model_opens_as_the_same_dense_model(make):
    model = make("gpt2")
    dense = DenseModel(model)
    assert as_dense(dense) is dense
    for wrapped in (model, nnsight.NNsight(model), trace_model(dense), dense.hookable()):
        assert as_dense(wrapped).model is model
        assert as_dense(wrapped).fingerprint == dense.fingerprint
    with pytest.raises(ValueError, match="dict is no dense model"):
        as_dense({})


def test_a_name_opens_and_text_goes_in_where_there_is_a_tokenizer():
    dense = as_dense("tiny")
    traced = trace_model(dense)
    edits = [Edit(site=2, direction=torch.ones(dense.d_resid))]
    with traced.trace("def f(x):"):
        apply_edits(traced, dense, edits)
        logits = traced.output.logits.save()
    ids = dense.tokenizer("def f(x):", return_tensors="pt").input_ids
    assert torch.equal(logits, run_edited(dense, ids, edits))


def test_the_config_of_whatever_holds_a_model_is_read_without_opening_it(
    make, monkeypatch, tmp_path
):
    model = make("gpt2")
    dense = DenseModel(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")  # it would not open
    for held in (model, dense, nnsight.NNsight(model), trace_model(dense), dense.hookable()):
        assert config_of(held) is model.config
    assert config_of(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    assert config_of("tiny").hidden_size == 128
    with pytest.raises(ValueError, match="dict is no dense model"):
        config_of({})
    with pytest.raises(SiteError, match="no config"):
        config_of(torch.nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        config_of(tmp_path.parent)
