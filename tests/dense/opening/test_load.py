import math
import socket
import time

import pytest
import torch
from huggingface_hub import constants

from dense import DenseModel, tiny
from dense.opening.load import TINY

TEXT = '''def mean(values):
    """Return the mean of the values."""
    total = 0
    for value in values:
        total += value
    return total / len(values)
'''


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nothing cached, and every connection but loopback refused; yields those attempted."""
    real, tried = socket.socket.connect, []

    def connect(self, address):
        if isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1"):
            return real(self, address)
        tried.append(address)
        raise OSError(101, "Network is unreachable")

    def resolve(host, *args, **kwargs):
        tried.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 443))]

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tried


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_names_the_file_and_what_to_do(
    no_network, monkeypatch, offline
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    started = time.monotonic()
    with pytest.raises(OSError) as error:
        DenseModel.from_pretrained("gpt2")
    assert time.monotonic() - started < 5
    for part in ("config.json of gpt2", "cache", "`--dense tiny`", "`--dense /a/folder`"):
        assert part in str(error.value)
    assert ("HF_HUB_OFFLINE is set" if offline else "does not answer") in str(error.value)
    assert bool(no_network) is not offline


def test_the_built_in_model_opens_without_a_network(no_network):
    dense = tiny()
    assert (dense.name, dense.n_sites, dense.vocab_size) == ("tiny", 5, 2048)
    ids = dense.tokenizer(TEXT, return_tensors="pt").input_ids
    assert dense.tokenizer.decode(ids[0]) == TEXT
    logits = dense.logits(ids)
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert nats < 0.6 * math.log(2048)  # chance is 7.62 nats per token
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    control = torch.nn.functional.cross_entropy(dense.logits(shuffled)[0, :-1], shuffled[0, 1:])
    assert control > nats + 1
    assert not no_network and DenseModel(dense.model).name == "tiny"


def test_a_folder_opens_without_a_network_and_without_a_tokenizer(no_network, make, tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "saved")
    dense = DenseModel.from_pretrained(tmp_path / "saved")
    assert dense.tokenizer is None and dense.name == str(tmp_path / "saved")
    assert dense.fingerprint == DenseModel(model).fingerprint
    assert not no_network


def test_a_name_that_is_cached_opens_without_a_network(no_network, make, tmp_path):
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--someone--model"
    make("gpt2").save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    dense = DenseModel.from_pretrained("someone/model", cache_dir=tmp_path / "cache")
    assert dense.name == "someone/model" and not no_network
    for file in (repo / "snapshots" / commit).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match=r"model.safetensors of someone/model is not on this"):
        DenseModel.from_pretrained("someone/model", cache_dir=tmp_path / "cache")


def test_a_folder_that_lacks_a_file_names_it(make, tmp_path):
    with pytest.raises(OSError, match="there is no folder .*absent.*--dense tiny"):
        DenseModel.from_pretrained(tmp_path / "absent")
    with pytest.raises(OSError, match="config.json is missing"):
        DenseModel.from_pretrained(tmp_path)
    make("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors is missing"):
        DenseModel.from_pretrained(tmp_path)


def test_damaged_and_partial_weights_are_refused(make, tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        DenseModel.from_pretrained(tmp_path)
    state = {k: v for k, v in model.state_dict().items() if "h.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights.*h\.1\.mlp"):
        DenseModel.from_pretrained(tmp_path)


def test_the_built_in_model_without_its_files_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr("dense.opening.load.TINY", tmp_path)
    with pytest.raises(OSError, match="config.json is missing.*reinstall"):
        tiny()
    assert TINY != tmp_path


def test_weights_are_read_as_fp32_unless_asked_otherwise(make, tmp_path):
    make("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    assert DenseModel.from_pretrained(tmp_path).model.dtype == torch.float32
    assert DenseModel.from_pretrained(tmp_path, dtype="auto").model.dtype == torch.bfloat16


def test_a_dtype_has_its_short_name_and_another_is_refused():
    assert DenseModel.from_pretrained("tiny", dtype="bf16").model.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int3' is none of .*bf16"):
        DenseModel.from_pretrained("tiny", dtype="int3")


def test_cuda_is_asked_for_in_vain_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device_map='cuda' needs CUDA.*leave device_map out"):
        DenseModel.from_pretrained("tiny", device_map="cuda")
