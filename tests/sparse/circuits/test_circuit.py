import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from sparse.circuits.circuit import Circuit
from sparse.circuits.extract.circuit_module import extract
from sparse.circuits.graph import Node
from sparse.circuits.mask import masked
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.storage.hub import Source
from sparse.tasks.suite import get_task


def blank(n_layers: int, width: int, d_mlp: int, n_head: int = 1) -> SparseGPT:
    """A model whose every matrix is zero."""
    config = SparseGPTConfig(
        vocab_size=4,
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_head,
        head_dim=1,
        intermediate_size=d_mlp,
        activation_fraction=1.0,
    )
    model = SparseGPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def circuit_of(model: SparseGPT, nodes: dict, **fields) -> Circuit:
    rng = torch.Generator().manual_seed(0)
    ablation = {at: torch.randn(w, generator=rng) for at, w in model.node_widths().items()}
    values = dict(
        task=get_task("while_return_true"),
        nodes=nodes,
        ablation=ablation,
        ablation_kind="mean",
        model_fingerprint=model.fingerprint(),
        d_head=model.config.head_dim,
        target_loss=0.15,
    )
    return Circuit(**(values | fields))


@pytest.fixture
def full(small, tmp_path) -> Circuit:
    nodes = {"0.attn.act_in": (0, 3), "0.attn.v": (1, 6), "1.mlp.post_act": (0, 5, 31)}
    return circuit_of(
        small,
        nodes,
        loss={"circuit/validation": 0.1234567890123, "full/test": 0.05},
        calibration=(1.5, -0.25),
        source=Source(str(tmp_path / "run" / "sparse"), "abc"),
        config={"seed": 3, "curve": [[0, 0.7], [1, 0.1]]},
        notes=("a note",),
    )


def test_the_toy_circuit_of_the_method_has_9_nodes_and_5_edges():
    model = blank(1, 3, 2)
    block = model.model.blocks[0]
    with torch.no_grad():
        block.mlp.fc.weight[1] = torch.tensor([0.5, 0.7, 0.0])
        block.mlp.proj.weight[:, 1] = torch.tensor([-1.2, 0.3, 0.0])
        block.attn.qkv.bias[0] = 4.0
        block.attn.qkv.weight[1] = torch.tensor([1.56, 0.2, 0.1])
        block.attn.qkv.weight[2] = torch.tensor([-2.5, 0.2, 0.1])
        block.attn.out.weight[1, 0] = -0.8
    nodes = {
        "0.attn.act_in": (0,),
        "0.attn.q": (0,),
        "0.attn.k": (0,),
        "0.attn.v": (0,),
        "0.attn.resid_delta": (1,),
        "0.mlp.act_in": (0, 2),
        "0.mlp.post_act": (1,),
        "0.mlp.resid_delta": (0,),
    }
    circuit = circuit_of(model, nodes)
    edges = circuit.edges(model)
    assert (len(circuit), len(edges)) == (9, 5)
    read = Node("0.attn.act_in", 0)
    assert [(e.source, e.target) for e in edges if e.source == read] == [
        (read, Node("0.attn.k", 0)),
        (read, Node("0.attn.v", 0)),
    ]
    weights = sorted(e.weight for e in edges)
    assert weights == pytest.approx([-2.5, -1.2, -0.8, 0.5, 1.56])


def test_the_string_closing_pattern_has_12_nodes_and_9_edges():
    model = blank(2, 6, 3)
    mlp, attn = model.model.blocks[0].mlp, model.model.blocks[1].attn
    with torch.no_grad():
        mlp.fc.weight[0, 0], mlp.fc.weight[1, 1] = 1.0, -1.0
        mlp.proj.weight[2:4, 0:2] = 0.5
        attn.qkv.bias[0] = 2.0
        attn.qkv.weight[1, 2], attn.qkv.weight[2, 3] = 1.0, 1.0
        attn.out.weight[4, 0] = 1.0
    nodes = {
        "0.mlp.act_in": (0, 1),
        "0.mlp.post_act": (0, 1),
        "0.mlp.resid_delta": (2, 3),
        "1.attn.act_in": (2, 3),
        "1.attn.q": (0,),
        "1.attn.k": (0,),
        "1.attn.v": (0,),
        "1.attn.resid_delta": (4,),
    }
    circuit = circuit_of(model, nodes)
    assert (len(circuit), len(circuit.edges(model))) == (12, 9)


def test_all_nodes_have_as_many_edges_as_the_model_has_nonzero_weights(small):
    everything = {at: tuple(range(w)) for at, w in small.node_widths().items()}
    expected = sum(
        int((p != 0).sum()) for n, p in small.model.blocks.named_parameters() if p.ndim == 2
    )
    assert len(circuit_of(small, everything).edges(small)) == expected
    assert circuit_of(small, {}).edges(small) == []


def test_saving_and_loading_is_the_identity(full, tmp_path):
    full.save(tmp_path / "c")
    loaded = Circuit.load(tmp_path / "c")
    assert loaded.to_dict() == full.to_dict() and list(loaded) == list(full)
    assert list(loaded.ablation) == list(full.ablation)
    assert all(torch.equal(loaded.ablation[at], full.ablation[at]) for at in full.ablation)
    assert json.loads(full.to_json()) == json.loads(loaded.to_json())
    assert sorted(os.listdir(tmp_path / "c")) == ["circuit.json", "circuit.safetensors"]


def test_a_moved_run_still_finds_its_model(full, tmp_path):
    (tmp_path / "run" / "sparse").mkdir(parents=True)
    full.save(tmp_path / "run" / "circuits" / "c")
    assert str(tmp_path) not in (tmp_path / "run/circuits/c/circuit.json").read_text()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    source = Circuit.load(tmp_path / "moved" / "circuits" / "c").source
    assert source == Source(str(tmp_path / "moved" / "sparse"), "abc")


def test_a_full_disk_leaves_the_old_circuit_intact(full, tmp_path, monkeypatch):
    full.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = full.with_nodes([Node("0.attn.q", 0)], "test")

    def no_space(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="untouched: free some space") as failed:
            other.save(tmp_path)
    assert failed.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    other.save(tmp_path)
    assert Circuit.load(tmp_path).nodes == {"0.attn.q": (0,)}


def test_files_of_two_saves_and_broken_files_are_refused(full, tmp_path):
    full.save(tmp_path / "a")
    changed = {at: value + 1 for at, value in full.ablation.items()}
    replace(full, ablation=changed).save(tmp_path / "b")
    shutil.copy(tmp_path / "b/circuit.safetensors", tmp_path / "a/circuit.safetensors")
    with pytest.raises(ValueError, match="two saves"):
        Circuit.load(tmp_path / "a")
    text = (tmp_path / "b/circuit.json").read_text()
    for broken, says in (
        (text[:100], "is broken"),
        (text.replace('"schema_version": 1', '"schema_version": 99'), "version 99"),
        (text.replace('"d_head"', '"d_heads"'), "unknown keys"),
    ):
        (tmp_path / "b/circuit.json").write_text(broken)
        with pytest.raises(ValueError, match=says):
            Circuit.load(tmp_path / "b")
    with pytest.raises(ValueError, match="circuit.json is missing"):
        Circuit.load(tmp_path)


def test_circuits_combine_as_sets_of_nodes(full):
    other = full.with_nodes([Node("0.attn.v", 6), Node("0.attn.q", 2)], "test")
    assert list(full & other) == [Node("0.attn.v", 6)]
    assert len(full | other) == len(full) + len(other) - len(full & other)
    assert list(other - full) == [Node("0.attn.q", 2)]
    assert len(full - full) == 0 and len((full - other) & other) == 0
    assert Node("0.attn.q", 2) in other and Node("0.attn.q", 2) not in full
    assert (full | other).loss == {} and not (full | other).met  # measured for neither
    stranger = replace(full, model_fingerprint="0" * 16)
    with pytest.raises(ValueError, match="two models"):
        full & stranger


def test_masks_mark_exactly_the_nodes(full):
    masks = full.masks()
    assert list(masks) == list(full.ablation)
    marked = [Node(at, int(i)) for at, mask in masks.items() for i in mask.nonzero()]
    assert marked == list(full)


def test_the_control_has_as_many_nodes_at_every_location(full, small):
    draws = [full.random(small, seed) for seed in range(20)]
    sizes = {at: len(indices) for at, indices in full.nodes.items()}
    for draw in draws:
        assert {at: len(indices) for at, indices in draw.nodes.items()} == sizes
    assert full.random(small, 0).nodes == draws[0].nodes
    assert len({json.dumps(d.nodes) for d in draws}) == 20
    assert any(len(d & full) for d in draws)  # drawn from all nodes
    assert not any(len(full.random(small, seed, outside=True) & full) for seed in range(20))


def test_the_control_outside_takes_own_nodes_only_when_the_others_run_out(small):
    nodes = {"0.attn.q": tuple(range(6))}  # of 8
    draw = circuit_of(small, nodes).random(small, 0, outside=True)
    assert len(draw) == 6 and {6, 7} <= set(draw.nodes["0.attn.q"])
    with pytest.raises(ValueError, match="other node locations"):
        circuit_of(small, nodes).random(blank(1, 3, 2), 0)


def test_a_circuit_knows_its_model(full, small):
    full.check(small)
    with torch.no_grad():
        small.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="load that model, or prune this one"):
        full.check(small)


def test_names_say_head_and_channel_and_printing_says_whether_the_target_is_met(full):
    assert [full.name(n) for n in full] == [
        "0.attn.act_in.0",
        "0.attn.act_in.3",
        "0.attn.v.head0.ch1",
        "0.attn.v.head1.ch2",
        "1.mlp.post_act.0",
        "1.mlp.post_act.5",
        "1.mlp.post_act.31",
    ]
    assert full.met and "7 of 240 nodes" in str(full) and "a note" in str(full)
    missed = replace(full, loss={"circuit/validation": 0.2})
    assert not missed.met and "NOT met" in str(missed) and '"met": false' in missed.to_json()


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ({"2.attn.q": (0,)}, "no node location '2.attn.q'"),
        ({"0.attn.q": (0, 8)}, r"0.attn.q has nodes 0..7, got 0..8"),
        ({"0.attn.q": (-1, 2)}, r"got -1..2"),
        ({"0.attn.q": (3, 1)}, "sorted and distinct"),
        ({"0.attn.q": (1, 1)}, "sorted and distinct"),
    ],
)
def test_nodes_that_cannot_be_are_refused(small, nodes, says):
    with pytest.raises(ValueError, match=says):
        circuit_of(small, nodes)


@pytest.mark.parametrize("node", ["0.mlp.post_act.1", ("0.mlp.post_act", 1.5), ("0.mlp.post_act",)])
def test_what_is_no_node_is_told_how_to_write_one(full, node):
    with pytest.raises(ValueError, match="is no node; give each as a pair"):
        full.with_nodes(iter([node]), "chosen")  # which the suite's checker of types cannot see


def test_a_circuit_compiles_the_model_it_belongs_to_and_no_other(full, small):
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    with masked(small, full.masks(), full.ablation), torch.no_grad():
        expected = small(ids).logits
    torch.testing.assert_close(extract(full, small)(ids), expected, rtol=1e-5, atol=1e-5)
    assert extract(full, small, "sliced").mode == "sliced"
    with torch.no_grad():
        small.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="load that model, or prune this one"):
        extract(full, small)


def test_the_repr_is_one_short_line(full):
    assert repr(full) == "Circuit('while_return_true', 7 of 240 nodes, target 0.15 nats met)"
    assert "not met" in repr(replace(full, loss={}))


def test_a_ranking_is_saved_and_gives_circuits_of_any_size(full, tmp_path):
    rng = torch.Generator().manual_seed(5)
    ranking = {at: torch.randn(len(x), generator=rng) for at, x in full.ablation.items()}
    ranked = replace(full, ranking=ranking)
    order = sorted(((-t, n) for n, t in enumerate(torch.cat(list(ranking.values())).tolist())))
    everything = [Node(at, i) for at, x in full.ablation.items() for i in range(len(x))]
    for n in (0, 1, 17, full.n_total):
        assert set(ranked.resized(n)) == {everything[i] for _, i in order[:n]}
    assert ranked.resized(9).resized(17).nodes == ranked.resized(17).nodes
    assert ranked.resized(9).loss == {} and ranked.resized(9).config["from"] == full.config
    tied = replace(full, ranking={at: torch.zeros_like(t) for at, t in ranking.items()})
    assert list(tied.resized(3)) == everything[:3]  # the earlier node first
    ranked.save(tmp_path)
    loaded = Circuit.load(tmp_path)
    assert all(torch.equal(loaded.ranking[at], ranking[at]) for at in ranking)
    assert list(loaded.ablation) == list(full.ablation)
    assert loaded.resized(17).nodes == ranked.resized(17).nodes


def test_a_circuit_without_a_ranking_has_no_other_size(full, tmp_path):
    full.save(tmp_path)
    assert Circuit.load(tmp_path).ranking == {}  # as every file was before there were rankings
    with pytest.raises(ValueError, match="its ranking is not known"):
        full.resized(3)
    with pytest.raises(ValueError, match=r"n=241, but the sizes it can have are 0\.\.240"):
        replace(full, ranking=full.ablation).resized(241)
    with pytest.raises(ValueError, match="must rank every node"):
        replace(full, ranking={"0.attn.q": torch.zeros(8)})
    ranked = replace(full, ranking=full.ablation)
    assert ranked.with_nodes([], "other").ranking == {}  # not what those nodes came from
