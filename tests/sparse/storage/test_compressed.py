import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.storage.compressed import (
    HEADER,
    LONG,
    MARK,
    compress,
    expand,
    is_compressed,
    load_compressed,
    mark,
    save_compressed,
)
from sparse.storage.hub import Source
from sparse.training.sparsity import SparsityConfig, budgets, project_model_

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def same_bits(a, b):
    bits = INTS[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def n_bytes(entries):
    return sum(x.numel() * x.element_size() for x in entries.values())


def random_sparse(shape, density, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    drop = torch.rand(shape, generator=g) >= density
    return torch.randn(shape, generator=g).to(dtype).masked_fill(drop, 0.0)


def by_hand(entries, name):
    """The format as its description says it, byte by byte."""
    shape, values = entries[f"{name}/shape"].tolist(), iter(entries[f"{name}/values"])
    flat = torch.zeros(shape, dtype=entries[f"{name}/values"].dtype).flatten()
    if f"{name}/bitmap" in entries:
        for i in range(len(flat)):
            if entries[f"{name}/bitmap"][i // 8] >> (i % 8) & 1:
                flat[i] = next(values)
    else:
        i = 0
        for byte in entries[f"{name}/gaps"].tolist():
            i += byte
            if byte < 255:
                flat[i] = next(values)
                i += 1
        assert 0 <= len(flat) - i < 255
    assert next(values, None) is None
    return flat.view(shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0, 1 / 500, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 0.6, 1])
@pytest.mark.parametrize("shape", [(70, 31), (1999,), (3, 5, 140), (1, 4096), (7,), (0, 5), ()])
def test_expanding_what_was_compressed_gives_the_same_bits(shape, density, dtype):
    x = random_sparse(shape, density, dtype)
    entries = compress({"x": x})
    assert same_bits(expand(entries)["x"], x)
    if "x" not in entries:
        assert same_bits(by_hand(entries, "x"), x)
        assert n_bytes(entries) + HEADER < n_bytes({"x": x})
        assert all(entry.numel() for entry in entries.values())
    else:
        assert entries["x"] is x and (density > 0.2 or x.numel() < 500)


def test_every_bit_pattern_survives_and_only_plus_zero_is_left_out():
    x = torch.zeros(4000)
    x[:6] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    x.view(torch.int32)[6] = 0x7FA00001  # a signalling NaN with a payload
    entries = compress({"x": x})
    assert len(entries["x/values"]) == 7 and same_bits(expand(entries)["x"], x)
    masked = random_sparse(4000, 1.0) * (torch.arange(4000) % 50 == 0)  # a product leaves -0.0
    entries = compress({"x": masked})
    assert same_bits(expand(entries)["x"], masked) and len(entries["x/values"]) > 1000
    assert len(compress({"x": masked + 0.0})["x/values"]) == 80


@pytest.mark.parametrize("n", [800, 254 * 4, 255 * 4, 256 * 4, 100_000])
def test_runs_around_the_longest_byte_are_coded_exactly(n):
    for places in ([0], [n - 1], [n // 2], [LONG - 1], [LONG], [LONG + 1], [2 * LONG], [0, n - 1]):
        x = torch.zeros(n)
        x[places] = 3.0
        entries = compress({"x": x})
        assert set(entries) <= {"x/shape", "x/values", "x/gaps", "x/bitmap"}
        assert torch.equal(expand(entries)["x"], x) and torch.equal(by_hand(entries, "x"), x)
        assert len(entries["x/values"]) == len(places)
        if n == 100_000:
            assert "x/bitmap" not in entries and len(entries["x/gaps"]) < 400


def test_the_index_is_the_smaller_of_the_two_codes():
    for density in (1 / 64, 1 / 16, 1 / 9, 1 / 7, 1 / 4):
        x = random_sparse((200, 200), density)
        entries = compress({"x": x})
        at = np.flatnonzero(x.numpy())
        runs = np.diff(at, prepend=-1) - 1
        gaps = len(at) + (runs // 255).sum() + (x.numel() - 1 - at[-1]) // 255
        index = entries.get("x/gaps", entries.get("x/bitmap"))
        assert len(index) == min(gaps, x.numel() // 8)
        assert ("x/gaps" in entries) == (density < 1 / 8)


def test_tensors_keep_their_order_and_what_is_no_float_stays_plain():
    ids = torch.zeros(5000, dtype=torch.int64)
    flags = torch.zeros(5000, dtype=torch.bool)
    tensors = {"b": random_sparse(5000, 0.01), "ids": ids, "flags": flags, "a": torch.ones(9)}
    entries = compress(tensors)
    assert entries["ids"] is ids and entries["flags"] is flags and "a" in entries
    assert list(expand(entries)) == list(tensors)
    assert compress({}) == expand({}) == {}
    view = random_sparse((60, 90), 0.05).T  # not contiguous
    assert torch.equal(expand(compress({"x": view}))["x"], view)


def test_a_name_that_looks_like_a_part_is_refused():
    for name in ("x/values", "a/b/gaps", "x/bitmap", "x/shape"):
        with pytest.raises(ValueError, match=f"{name}.*rename it"):
            compress({name: torch.zeros(3)})
    assert set(compress({"values": torch.ones(3), "/gaps": torch.ones(3)})) == {"values", "/gaps"}


def spoiled(**changes):
    x = torch.zeros(40, 50)
    x[[3, 20, 39], [0, 7, 49]] = torch.tensor([1.0, 2.0, 3.0])
    entries = compress({"w": x})
    assert set(entries) == {"w/shape", "w/values", "w/gaps"}
    entries = {name: entry.clone() for name, entry in entries.items()}
    for part, change in changes.items():
        entry = change(entries.get(f"w/{part}"))
        entries.pop(f"w/{part}", None)
        if entry is not None:
            entries[f"w/{part}"] = entry
    return entries


DAMAGE = {
    "a part is missing": (dict(shape=lambda _: None), "its parts are"),
    "no index": (dict(gaps=lambda _: None), "its parts are"),
    "two indices": (dict(bitmap=lambda _: torch.zeros(250, dtype=torch.uint8)), "its parts are"),
    "beyond the end": (dict(shape=lambda s: s - 1), "lead to 2000 of 1911"),
    "short of the end": (dict(shape=lambda s: s + 5), "lead to 2000 of 2475"),
    "too many values": (dict(values=lambda v: torch.cat([v, v])), "3 indices stand beside 6"),
    "too few values": (dict(values=lambda v: v[:2]), "3 indices stand beside 2"),
    "a negative side": (dict(shape=lambda s: -s), "its shape is"),
    "an overflow": (dict(shape=lambda s: s + 2**62), "its gaps lead to 2000 of 2126764793255865"),
    "an empty index": (dict(gaps=lambda g: g[:0]), "lead to 0 of 2000"),
    "a wide index": (dict(gaps=lambda g: g.long()), "its dtypes are"),
    "integer values": (dict(values=lambda v: v.int()), "its dtypes are"),
    "a matrix of values": (dict(values=lambda v: v[None]), "not 1-D"),
    "a fractional shape": (dict(shape=lambda s: s.float()), "its dtypes are"),
    "a bitmap of another length": (
        dict(gaps=lambda _: None, bitmap=lambda _: torch.zeros(249, dtype=torch.uint8)),
        "249 bytes for 2000 entries",
    ),
    "bits beyond the end": (
        dict(
            gaps=lambda _: None,
            shape=lambda _: torch.tensor([1999]),
            bitmap=lambda _: torch.full((250,), 255, dtype=torch.uint8),
        ),
        "points beyond entry 1998",
    ),
    "more bits than values": (
        dict(gaps=lambda _: None, bitmap=lambda _: torch.full((250,), 255, dtype=torch.uint8)),
        "2000 indices stand beside 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_file_and_tensor(damage):
    assert expand(spoiled())["w"].sum() == 6  # control: the same entries, not spoiled
    changes, message = DAMAGE[damage]
    with pytest.raises(ValueError, match=f"(?s)f.safetensors: .* tensor w is damaged.*{message}"):
        expand(spoiled(**changes), where="f.safetensors")


def test_a_tensor_is_not_there_twice():
    with pytest.raises(ValueError, match="f: w is there twice"):
        expand(spoiled() | {"w": torch.zeros(2)}, where="f")


def test_a_random_file_raises_or_expands_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(300):
        gaps = torch.randint(256 - 8 * (len(outcomes) % 2), (6,), generator=g).to(torch.uint8)
        n = (
            int(gaps.long().sum())
            + int((gaps < 255).sum())
            + int(torch.randint(3, (), generator=g))
        )
        entries = {"w/shape": torch.tensor([n - 1]), "w/gaps": gaps, "w/values": torch.ones(6)}
        try:
            outcomes.add(expand(entries)["w"].sum().item())
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"refused", 6.0}


def test_a_file_says_its_version_and_plain_entries_stay_readable(tmp_path):
    tensors = {"w": random_sparse((90, 90), 1 / 16), "b": torch.arange(9.0)}
    path = tmp_path / "m.safetensors"
    save_compressed(tensors, path, {"seed": "3"})
    header = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
    assert json.loads(header)["__metadata__"] == {"format": "pt", MARK: "1", "seed": "3"}
    assert len(header) % 8 == 0 and list(json.loads(header)["__metadata__"])[0] == "format"
    once = path.read_bytes()
    for _ in range(5):  # equal tensors, equal bytes
        save_compressed(tensors, path, {"seed": "3"})
        assert path.read_bytes() == once
    assert torch.equal(load_file(path)["b"], tensors["b"]) and "w" not in load_file(path)
    for name, tensor in load_compressed([path]).items():
        assert same_bits(tensor, tensors[name])
    assert is_compressed(path) and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    save_file(tensors, path)
    assert not is_compressed(path) and set(load_compressed([path])) == {"w", "b"}


def test_shards_are_one_set_of_tensors_wherever_the_parts_fell(tmp_path):
    tensors = {"w": random_sparse((90, 90), 1 / 16), "b": torch.arange(9.0)}
    paths = []
    for name, entry in compress(tensors).items():
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        save_file({name: entry}, paths[-1], {"format": "pt", "kept": "yes"})
        mark(paths[-1])
    again = load_compressed(paths)
    assert all(same_bits(again[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="both hold w/"):
        save_file(load_file(paths[0]), tmp_path / "twin.safetensors", {MARK: "1"})
        load_compressed([*paths, tmp_path / "twin.safetensors"])
    with pytest.raises(ValueError, match="[12].safetensors.*tensor w is damaged: its parts are"):
        load_compressed(paths[1:])


def test_files_that_cannot_be_trusted_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    entries = compress({"w": random_sparse((90, 90), 1 / 16)})
    save_file(entries, path)
    with pytest.raises(ValueError, match=r"m.safetensors holds w/.*not written to the end"):
        load_compressed([path])
    save_file(entries, path, {MARK: "2"})
    with pytest.raises(ValueError, match="in version 2, and this library reads version 1; update"):
        load_compressed([path])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="m.safetensors cannot be read"):
        load_compressed([path])
    with pytest.raises(ValueError, match="cannot be read"):
        load_compressed([tmp_path / "absent.safetensors"])


@pytest.fixture(scope="module")
def projected():
    """A SparseGPT at density 1/64, embeddings 1/16; biases, norms and sinks as they are."""
    torch.manual_seed(0)
    config = SparseGPTConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    model = SparseGPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += torch.randn_like(p)
    how = SparsityConfig(density=1 / 64, embedding_density=1 / 16, floor=2, sparse_biases=False)
    project_model_(budgets(model, how), how.densities(9, 10))
    return model


def test_a_projected_model_is_a_tenth_of_its_dense_file_and_loads_to_the_same_bits(
    projected, tmp_path
):
    projected.save_pretrained(tmp_path / "dense")
    projected.save_pretrained(tmp_path / "sparse", sparse=True)
    size = {f: (tmp_path / f / "model.safetensors").stat().st_size for f in ("dense", "sparse")}
    assert size["sparse"] <= size["dense"] / 10
    torch.manual_seed(1)
    full = SparseGPT(projected.config)  # control: nothing to leave out, nothing gained
    full.save_pretrained(tmp_path / "full", sparse=True)
    assert (tmp_path / "full" / "model.safetensors").stat().st_size > 0.99 * size["dense"]
    for loader in (SparseGPT, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "sparse")
        for name, p in projected.state_dict().items():
            assert same_bits(again.state_dict()[name], p), name
    assert again.source == Source(str(tmp_path / "sparse"), projected.fingerprint())
    trunk = AutoModel.from_pretrained(tmp_path / "sparse")
    assert same_bits(trunk.blocks[1].attn.qkv.weight, projected.model.blocks[1].attn.qkv.weight)


def test_a_sparse_file_loads_as_a_dense_one_does(projected, tmp_path):
    projected.save_pretrained(tmp_path / "dense")
    projected.save_pretrained(tmp_path / "sparse", sparse=True)
    for how in (dict(dtype=torch.bfloat16), dict(dtype="float16"), dict(device_map="cpu")):
        a, b = (SparseGPT.from_pretrained(tmp_path / f, **how) for f in ("dense", "sparse"))
        assert a.dtype == b.dtype and a.fingerprint() == b.fingerprint()
    half = SparseGPT.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", sparse=True)
    assert SparseGPT.from_pretrained(tmp_path / "half").fingerprint() == half.fingerprint()
    _, info = SparseGPT.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(info.values())
    path = tmp_path / "sparse" / "model.safetensors"
    tensors = load_compressed([path])
    tensors["other"] = tensors.pop("model.norm.weight")
    save_compressed(tensors, path)
    _, info = SparseGPT.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert info["missing_keys"] == {"model.norm.weight"} and info["unexpected_keys"] == {"other"}
    with pytest.raises(ValueError, match="cannot be offloaded to the disk"):
        SparseGPT.from_pretrained(tmp_path / "sparse", device_map={"": "disk"}, offload_folder="x")


def test_saving_again_in_another_way_leaves_nothing_stale(projected, tmp_path):
    mark_of = projected.fingerprint()
    torch.manual_seed(1)
    other = SparseGPT(projected.config)
    ways = [dict(), dict(max_shard_size="1MB"), dict(sparse=True, max_shard_size="100KB")]
    ways += [dict(sparse=True), dict(max_shard_size="2MB"), dict(sparse=True)]
    for i, how in enumerate(ways):
        model = (projected, other)[i % 2]
        model.save_pretrained(tmp_path, **how)
        files = sorted(p.name for p in tmp_path.glob("model*"))
        assert ("model.safetensors.index.json" in files) == ("max_shard_size" in how)
        assert ("model.safetensors" in files) == ("max_shard_size" not in how)
        assert len(files) > 3 or "max_shard_size" not in how
        weights = [tmp_path / name for name in files if name.endswith(".safetensors")]
        sparse = "sparse" in how and model is projected
        assert any(map(is_compressed, weights)) == ("sparse" in how)
        assert sparse or sum(p.stat().st_size for p in weights) > 9e6
        assert SparseGPT.from_pretrained(tmp_path).fingerprint() == model.fingerprint()
    assert projected.fingerprint() == mark_of
    projected.save_pretrained(tmp_path / "v", variant="tiny", sparse=True)
    again = SparseGPT.from_pretrained(tmp_path / "v", variant="tiny")
    assert again.fingerprint() == mark_of


def test_a_damaged_model_file_is_an_error_and_never_random_weights(projected, tmp_path):
    projected.save_pretrained(tmp_path, sparse=True)
    path = tmp_path / "model.safetensors"
    entries = load_file(path)
    name = "model.wte.weight"
    save_file(entries | {f"{name}/values": entries[f"{name}/values"][1:]}, path, {MARK: "1"})
    with pytest.raises(ValueError, match=f"model.safetensors: the compressed tensor {name} is dam"):
        SparseGPT.from_pretrained(tmp_path)
    save_file(entries, path, {"format": "pt"})
    with pytest.raises(ValueError, match="was not written to the end"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
