"""A model is proven once, and again where anything about it or about the code is another."""

import json

import pytest
import torch
from huggingface_hub import constants

from dense import DenseModel, model
from dense.opening import kept_proof


@pytest.fixture
def proofs(monkeypatch, tmp_path):
    """Proofs are kept for small models too, in a folder of this test; a list of those made."""
    made = []
    prove = model.prove
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept_proof, "SMALL", 0)
    monkeypatch.setattr(model, "prove", lambda *given: made.append(1) or prove(*given))
    return made


@pytest.fixture
def folder(tmp_path):
    dense = DenseModel.from_pretrained("tiny")
    dense.model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def files(tmp_path):
    return sorted((tmp_path / "home" / "sparse-bridges" / "proofs").glob("*.json"))


def test_the_second_opening_needs_no_proof_and_gives_the_same_model(folder, proofs, tmp_path):
    first, again = (DenseModel.from_pretrained(folder) for _ in range(2))
    assert len(proofs) == 1 and len(files(tmp_path)) == 1
    assert (first.pads_left, first.apart_because) == (again.pads_left, again.apart_because)
    assert first.pads_left is True
    ids = torch.tensor([[5, 6, 7]])
    for site, h in enumerate(first.residuals(ids)):
        assert torch.equal(again.resume(site, h, ids), first.resume(site, h, ids))
    joined = again.joined({2: h, 3: h}, {2: ids, 3: ids})
    assert torch.equal(joined[3], first.joined({2: h, 3: h}, {2: ids, 3: ids})[3])


def test_other_weights_another_config_or_another_version_are_proven_anew(
    folder, proofs, monkeypatch
):
    DenseModel.from_pretrained(folder)
    config = folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"scale_attn_by_inverse_layer_idx": True}))
    DenseModel.from_pretrained(folder)
    assert len(proofs) == 2
    config.write_text(json.dumps(values))
    changed = DenseModel.from_pretrained(folder)  # this one is known
    assert len(proofs) == 2
    with torch.no_grad():
        changed.model.transformer.wte.weight[0, 0] += 1
    changed.model.save_pretrained(folder)
    DenseModel.from_pretrained(folder)
    assert len(proofs) == 3
    monkeypatch.setattr(kept_proof, "version", lambda name: "0.0")
    DenseModel.from_pretrained(folder)
    assert len(proofs) == 4


def test_a_model_that_was_given_is_proven_whatever_is_kept(folder, proofs):
    dense = DenseModel.from_pretrained(folder)
    DenseModel(dense.model)  # somebody may have changed it since it was opened
    assert len(proofs) == 2


def test_a_broken_file_and_a_folder_that_cannot_be_made_cost_a_proof_and_no_error(
    folder, proofs, tmp_path
):
    DenseModel.from_pretrained(folder)
    (file,) = files(tmp_path)
    file.write_text('{"pads_left": ')
    DenseModel.from_pretrained(folder)
    assert len(proofs) == 2 and json.loads(file.read_text())["pads_left"] is True
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("a file is in the way")
    DenseModel.from_pretrained(folder)
    assert len(proofs) == 3


def test_small_models_are_proven_every_time(folder, proofs, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_proof, "SMALL", 10_000_000)
    for _ in range(2):
        DenseModel.from_pretrained(folder)
    assert len(proofs) == 2 and not files(tmp_path)
