import nnsight
import pytest
import torch

from dense import DenseModel, Edit, apply_edits, as_dense, run_edited, trace_model


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
