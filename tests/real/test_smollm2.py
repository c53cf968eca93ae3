"""The library on a real pretrained model: SmolLM2-135M-Instruct, which `make real` installs."""

import pytest
import torch

from dense import DenseModel
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
