"""A model whose weights accelerate has placed elsewhere is the model, bit for bit."""

from functools import cache

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from dense import DenseModel, Edit, generate_edited, run_edited, tiny, trace_model
from tests.helpers.placed import device_map
from tests.helpers.processes import run_helper

CPU = torch.device("cpu")
FAMILIES = ("gpt2", "llama", "gemma2", "bloom", "opt", "qwen3_moe", "gpt_neox")
WAYS = ("cpu offload", "disk offload", "device map")


def place(model, way, blocks, folder):
    if way == "cpu offload":
        return cpu_offload(model, execution_device=CPU)
    if way == "disk offload":
        return disk_offload(model, folder, execution_device=CPU)
    where = device_map(model, blocks, lambda k: "disk" if k != 1 else "cpu", "cpu")
    return dispatch_model(model, where, offload_dir=folder)


@pytest.fixture(scope="module")
def placed(make, opened, tmp_path_factory):
    """`placed(family, way)`: a model, and the same one placed, opened once."""

    @cache
    def open_both(family, way):
        plain, folder = opened(family), tmp_path_factory.mktemp("weights")
        return plain, DenseModel(place(make(family), way, plain.layout.path, folder), name=family)

    return open_both


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_placed_model_is_the_model_bit_for_bit(placed, ids, family, way):
    plain, dense = placed(family, way)
    assert any(p.is_meta for p in dense.model.parameters())  # control: weights are elsewhere
    assert dense.describe() == plain.describe() and dense.device == CPU
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(y, plain.logits(ids)) and torch.equal(dense.logits(ids), y)
    assert all(map(torch.equal, h, plain.residuals(ids)))
    assert torch.equal(dense.hookable()(**dense.inputs(ids)).logits, y)
    some = torch.tensor([[0, 3], [9, 2], [4, 4]])
    assert torch.equal(dense.logits(ids, positions=some), plain.logits(ids, positions=some))
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    for site, x in enumerate(h):
        a, b = ((2 * x).requires_grad_() for _ in range(2))
        got, want = dense.resume(site, a, ids), plain.resume(site, b, ids)
        assert torch.equal(got, want) and not torch.equal(got, y)
        (got * towards).sum().backward()
        (want * towards).sum().backward()
        assert torch.equal(a.grad, b.grad) and a.grad.norm() > 0
    entries, own = {1: h[1], 2: h[2]}, {1: ids, 2: ids}
    got, want = dense.joined(entries, own), plain.joined(entries, own)
    assert all(torch.equal(got[s], want[s]) for s in entries)
    assert any(p.is_meta for p in dense.model.parameters())  # and put away again


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_of_a_placed_model_are_those_of_the_model(placed, ids, family, way):
    plain, dense = placed(family, way)
    edits = [Edit(site=s, direction=torch.linspace(-1, 1, 32)) for s in (1, 2)]
    got = run_edited(dense, ids, edits)
    assert torch.equal(got, run_edited(plain, ids, edits))
    assert not torch.equal(got, plain.logits(ids))
    some = torch.tensor([[1], [2], [3]])
    got = run_edited(dense, ids, edits, positions=some)
    assert torch.equal(got, run_edited(plain, ids, edits, positions=some))
    how = dict(max_new_tokens=3, do_sample=False)
    got = generate_edited(dense, ids, edits, **how)
    assert torch.equal(got, generate_edited(plain, ids, edits, **how))
    traced = trace_model(dense)
    with traced.trace(**dense.inputs(ids)):
        h = traced.get(dense.site_path(1)).output.save()
    assert torch.equal(h, plain.residuals(ids)[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
def test_the_fingerprint_of_a_placed_model_is_that_of_its_weights(placed, ids, family, way):
    plain, dense = placed(family, way)
    assert dense.fingerprint == plain.fingerprint
    dense.logits(ids)
    assert dense.fingerprint == plain.fingerprint  # also after its weights have come and gone


def test_another_weight_on_the_disk_is_another_fingerprint(make, tmp_path):
    plain, other = make("gpt2"), make("gpt2")
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    marks = [
        DenseModel(disk_offload(m, tmp_path / str(i), execution_device=CPU)).fingerprint
        for i, m in enumerate((plain, other))
    ]
    assert marks[0] != marks[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_saved_folder_opens_where_device_map_says(make, opened, ids, tmp_path, family, dtype):
    make(family).save_pretrained(tmp_path / "saved")
    plain = DenseModel.from_pretrained(tmp_path / "saved", dtype=dtype)
    path = opened(family).layout.path
    spread = device_map(plain.model, path, lambda k: "disk" if k else "cpu", "cpu")
    for i, where in enumerate(("auto", {"": "cpu"}, {"": "disk"}, spread)):
        kwargs = dict(dtype=dtype, device_map=where, offload_folder=tmp_path / str(i))
        dense = DenseModel.from_pretrained(tmp_path / "saved", **kwargs)
        assert any(p.is_meta for p in dense.model.parameters()) == (i > 1)
        assert dense.model.dtype == plain.model.dtype
        assert torch.equal(dense.logits(ids), plain.logits(ids))
        assert dense.fingerprint == plain.fingerprint


@pytest.mark.parametrize("way", WAYS)
def test_text_goes_into_a_trace_of_a_placed_model(way, tmp_path):
    plain, other = tiny(), tiny()
    model = place(other.model, way, plain.layout.path, tmp_path)
    dense, text = DenseModel(model, other.tokenizer), "def f(x):"
    traced = trace_model(dense)
    with traced.trace(text):
        logits = traced.output.logits.save()
    ids = plain.tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(logits, plain.logits(ids))
    assert not hasattr(model, "hf_device_map") or model.hf_device_map != {"": CPU}


def test_a_placed_model_stays_where_it_is_and_is_not_compiled(placed, ids):
    plain, dense = placed("gpt2", "cpu offload")
    dense.to("meta")  # it would lose its weights
    assert torch.equal(dense.logits(ids), plain.logits(ids))
    with pytest.raises(ValueError, match="placed by accelerate.*open it on one device"):
        dense.compile()


def on_gpus(make, plain, devices, ids):
    """Assert that a model whose blocks are on `devices` in turn is the one on the first of them."""
    model = make(plain.model_type)
    where = device_map(model, plain.layout.path, lambda k: devices[k % 2], devices[0])
    dense = DenseModel(dispatch_model(model, where, main_device=devices[0]))
    assert {p.device for p in dense.model.parameters()} == set(map(torch.device, devices))
    assert dense.fingerprint == plain.fingerprint
    first = torch.device(devices[0])
    assert dense.device == first
    ids = ids.to(first)
    h, y = dense.residuals_and_logits(ids)
    want, y_want = plain.residuals_and_logits(ids.cpu())
    assert {x.device for x in (*h, y)} == {first}
    # other kernels on other devices
    torch.testing.assert_close(y.cpu(), y_want, atol=1e-4, rtol=1e-4)
    for site, x in enumerate(h):
        torch.testing.assert_close(x.cpu(), want[site], atol=1e-4, rtol=1e-4)
        assert torch.equal(dense.resume(site, x, ids), y)
    entries = {s: x.requires_grad_() for s, x in enumerate(h)}
    for site, x in dense.joined(entries, dict.fromkeys(entries, ids)).items():
        assert x.device == first
        torch.testing.assert_close(dense.unembed(x, ids), y, atol=1e-4, rtol=1e-4)
        x.sum().backward(retain_graph=True)
        assert entries[site].grad.device == first
    edits = [Edit(site=2, direction=torch.linspace(-1, 1, 32))]
    got = run_edited(dense, ids, edits)
    assert got.device == first
    torch.testing.assert_close(got.cpu(), run_edited(plain, ids.cpu(), edits), atol=1e-4, rtol=1e-4)


def test_no_operation_of_a_model_over_two_devices_mixes_them():
    """Where there are no two GPUs: on two devices that are only names (two_devices.py)."""
    run_helper("two_devices", "gpt2", "bloom", "gpt_neox")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_over_cpu_and_gpu_answers_on_the_device_of_its_embedding(make, opened, ids, family):
    on_gpus(make, opened(family), ("cpu", "cuda:0"), ids)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_over_two_gpus_answers_on_the_device_of_its_embedding(make, opened, ids, family):
    on_gpus(make, opened(family), ("cuda:0", "cuda:1"), ids)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights_run_on_the_gpu_as_those_that_stay_there(
    make, ids, tmp_path, family, way
):
    plain, ids = DenseModel(make(family).to("cuda")), ids.to("cuda")
    where = device_map(plain.model, plain.layout.path, lambda k: way if k else 0, 0)
    dense = DenseModel(dispatch_model(make(family), where, offload_dir=tmp_path))
    assert any(p.is_meta for p in dense.model.parameters()) and dense.device == ids.device
    h, y = dense.residuals_and_logits(ids)
    assert torch.equal(y, plain.logits(ids)) and all(map(torch.equal, h, plain.residuals(ids)))
    for site, x in enumerate(h):
        assert torch.equal(dense.resume(site, x, ids), y)
    assert dense.fingerprint == plain.fingerprint
