"""A dense and a sparse model of unequal depth, from the training loss to the last report.

Every map of sites that a test relies on is written out here: {dense site: sparse site}.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bridges.losses.quantities import ce_nats, kl_nats
from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.run_folder import load_run, save_run
from bridges.training.config import CotrainConfig, LossWeights
from bridges.training.cotrain import Cotraining, cotrain
from bridges.training.objective import Draw, losses
from bridges.training.validate import validate
from bridges.transfer.dense_circuit import DenseCircuit
from bridges.transfer.directions import read_at, written_at
from bridges.transfer.intervention import Steering
from bridges.transfer.map_circuit import map_circuit
from dense import DenseModel, run_edited
from evals import evaluate_bridge
from sparse.circuits.graph import Node
from sparse.circuits.taps import edited
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.sparsity import SparsityConfig

CASES = {  # dense family, its layers, layers of the sparse model, the map asked for, the map
    "4 over 2": ("gpt2", 4, 2, {}, {0: 0, 2: 1, 4: 2, 6: 3, 8: 4}),
    "2 over 3": ("gpt2", 2, 3, {}, {0: 0, 1: 2, 2: 3, 3: 4, 4: 6}),
    "a map given": ("gpt2", 4, 2, {0: 0, 3: 1, 4: 3}, {0: 0, 3: 1, 4: 3}),
    "boundaries, 2 over 2": ("neox", 2, 2, {}, {0: 0, 1: 2, 2: 4}),
    "boundaries, 3 over 1": ("neox", 3, 1, {}, {0: 0, 2: 1, 3: 2}),
}
SPARSITY = SparsityConfig(density=0.4, embedding_density=0.6, floor=1, anneal_start=0.0)
TERMS = ("ce", "kl", "encode", "decode", "up", "down")


def neox(n_layer):
    """A parallel model: L+1 sites."""
    torch.manual_seed(6)
    shape = dict(vocab_size=23, hidden_size=12, intermediate_size=24, num_attention_heads=2)
    config = GPTNeoXConfig(**shape, num_hidden_layers=n_layer, max_position_embeddings=16)
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", params=CASES)
def double(request, build):
    """Dense, sparse and bridges in float64, and the map they should have."""
    family, n_dense, n_sparse, asked, pairs = CASES[request.param]
    model = neox(n_dense) if family == "neox" else build.dense(n_layer=n_dense).model
    dense = DenseModel(model.double())
    sparse = build.sparse(seed=3, num_hidden_layers=n_sparse).double()
    config = BridgeConfig.between(dense, sparse, k=7, sites=asked)
    return dense, sparse, BridgeSet(config, seed=1).double(), pairs


def unexplained(x, target):
    centred = target - target.mean((0, 1))
    return (x - target).square().sum() / centred.square().sum().detach()


def naive(dense, sparse, bridges, pairs, ids, drawn=None):
    """One pass per site and direction, per sequence where sites are drawn; full logits."""
    h, z, y, x = dense.residuals(ids), sparse.residuals(ids), dense.logits(ids), sparse(ids).logits
    terms = {name: [] for name in TERMS}
    terms["ce"], terms["kl"] = [ce_nats(x, ids).mean()], [kl_nats(y, x).mean()]
    for s, t in pairs.items():
        up, down = bridges.encode(s, h[s]), bridges.decode(s, z[t])
        terms["encode"].append(unexplained(up, z[t].detach()))
        terms["decode"].append(unexplained(down, h[s]))
        for b, row in enumerate(ids):
            if drawn is None or s in drawn[b]:
                b, row = slice(b, b + 1), row[None]
                to_sparse, to_dense = sparse.resume(t, up[b], row), dense.resume(s, down[b], row)
                terms["up"].append(kl_nats(y[b], to_sparse).mean())
                terms["down"].append(kl_nats(y[b], to_dense).mean())
    return {name: torch.stack(values).mean() for name, values in terms.items()}


def gradient(total, *modules):
    params = [p for m in modules for p in m.parameters()]
    grads = torch.autograd.grad(total, params, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in params)
    return torch.cat([(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)])


@pytest.mark.parametrize("how", ["all", "drawn"])
def test_the_joint_loss_and_its_gradients_are_those_of_the_naive_loop(double, ids, how):
    dense, sparse, bridges, pairs = double
    assert bridges.config.pairs == pairs
    sites = torch.tensor(list(pairs))
    drawn = None if how == "all" else sites[torch.arange(len(ids)) % len(sites)][:, None]
    got = losses(dense, sparse, bridges, ids, LossWeights(), draw=Draw(drawn))
    want = naive(dense, sparse, bridges, pairs, ids, drawn)
    for name in TERMS:
        assert abs(got[name].item() - want[name].item()) < 1e-10, name
    mine, theirs = (gradient(sum(x.values()), sparse, bridges) for x in (got, want))
    assert (mine - theirs).abs().max() < 1e-10 and theirs.abs().max() > 0.01
    # control: the same bridges, each at the sparse site one before or after
    last = sparse.n_sites - 1
    away = {s: t + 1 if t < last else t - 1 for s, t in pairs.items()}
    other = naive(dense, sparse, bridges, away, ids, drawn)
    assert abs(other["decode"] - want["decode"]) > 1e-3 and abs(other["up"] - want["up"]) > 1e-4


def test_parts_of_a_batch_average_to_the_whole(double, ids, tmp_path):
    dense, sparse, bridges, _ = double
    config = CotrainConfig(
        train=TrainConfig(steps=9, folder=str(tmp_path)), sparsity=SPARSITY, hybrid_sites="all"
    )
    module, rows = Cotraining(dense, sparse, bridges, config), torch.cat([ids, ids[:1]])
    want = module(rows, 3)
    parts = rows.chunk(2)
    terms = [module(x, 3, of) for x, of in zip(parts, module.of_whole(parts), strict=True)]
    for name in TERMS:
        assert sum(t[name].item() for t in terms) / 2 == pytest.approx(want[name].item(), rel=1e-10)
    alone = sum(module(x, 3)["decode"].item() for x in parts) / 2
    assert abs(alone - want["decode"].item()) > 1e-5  # control


@torch.no_grad()
def test_what_validation_says_of_a_site_is_of_its_bridge(double, ids):
    dense, sparse, bridges, pairs = double
    scores = validate(dense, sparse, bridges, [ids])
    keys = {f"{name}.{s}" for name in ("encode", "decode", "up", "down") for s in pairs}
    assert {name for name in scores if "." in name} == keys
    want = naive(dense, sparse, bridges, pairs, ids)
    for name in TERMS:
        assert scores[name] == pytest.approx(want[name].item(), abs=1e-10)
    for s, t in pairs.items():
        one = naive(dense, sparse, bridges, {s: t}, ids)
        for name in ("encode", "decode", "up", "down"):
            assert scores[f"{name}.{s}"] == pytest.approx(one[name].item(), abs=1e-10)


# ---- perfect bridges: a model, and the same one with layers that write next to nothing between


@pytest.fixture(scope="module")
def padded(build):
    """Layers 0 and 2 of the dense model are 0 and 1 of the sparse one; 1 and 3 write 1e-5.

    (With nothing at all no sites could be found inside them.) So dense sites 2, 3 and 4 are sparse
    site 2, and 6, 7 and 8 are 4.
    """
    plain = dict(activation_fraction=1.0, bigram_table=False)
    sparse = build.sparse(seed=2, **plain)
    deep = build.sparse(seed=5, num_hidden_layers=4, **plain)
    for name in ("wte", "wpe", "norm"):
        getattr(deep.model, name).load_state_dict(getattr(sparse.model, name).state_dict())
    deep.lm_head.load_state_dict(sparse.lm_head.state_dict())
    with torch.no_grad():
        for i, block in enumerate(deep.model.blocks):
            block.load_state_dict(sparse.model.blocks[i // 2].state_dict())
            for out in (block.attn.out, block.mlp.proj) if i % 2 else ():
                for p in out.parameters():
                    p.mul_(1e-5)
    dense = DenseModel(deep, copy.deepcopy(build.dense().tokenizer))

    def joined(sites):
        bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=20, sites=sites))
        with torch.no_grad():
            for layer in [*bridges.encoders, *bridges.decoders]:
                layer.weight.copy_(torch.eye(20))
        return bridges

    return SimpleNamespace(dense=dense, sparse=sparse, joined=joined)


@torch.no_grad()
@pytest.mark.parametrize("sites", [{0: 0, 1: 1, 2: 2, 5: 3, 6: 4}, {0: 0, 1: 1, 4: 2, 5: 3, 8: 4}])
def test_perfect_bridges_cost_nothing_at_any_site(padded, ids, sites):
    terms = losses(padded.dense, padded.sparse, padded.joined(sites), ids, LossWeights())
    assert terms["ce"] > 1 and all(terms[name].abs() < 1e-6 for name in TERMS[1:])
    wrong = validate(padded.dense, padded.sparse, padded.joined({0: 0, 2: 1, 4: 2, 8: 4}), [ids])
    costs = {s: min(wrong[f"up.{s}"], wrong[f"down.{s}"]) for s in (0, 2, 4, 8)}
    assert costs[2] > 1e-3 and max(costs[s] for s in (0, 4, 8)) < 1e-6  # control: 2 is no 1


@torch.no_grad()
def test_over_perfect_bridges_transport_is_the_sparse_intervention(padded, ids, circuit_of):
    sites = {0: 0, 1: 1, 3: 2, 5: 3, 8: 4}
    parts = dict(sparse=padded.sparse, dense=padded.dense, bridges=padded.joined(sites))
    whole = DenseCircuit(circuit=circuit_of(padded.sparse), site=8, **parts)
    mean = whole.circuit.ablation
    hold = {at: (lambda x, at=at: mean[at].expand_as(x)) for at in padded.sparse.node_widths()}
    with edited(padded.sparse, hold):
        z = padded.sparse.residuals(ids)
    for s, t in sites.items():
        want = padded.sparse.resume(t, z[t], ids)
        assert (whole.ablate(ids, site=s) - want).abs().max() < 1e-4
    assert (want - padded.dense.logits(ids)).abs().max() > 0.5
    with pytest.raises(ValueError, match="site 2 is not bridged"):  # a sparse site, no dense one
        whole.ablate(ids, site=2)


@torch.no_grad()
@pytest.mark.parametrize("sites", [{0: 0, 1: 1, 4: 2, 5: 3, 8: 4}, {0: 0, 1: 1, 2: 2, 5: 3}])
def test_the_edits_of_a_read_are_seen_by_what_answers_its_sublayer_alone(
    padded, ids, circuit_of, sites
):
    sparse, node = padded.sparse, Node("1.attn.act_in", 3)
    parts = dict(sparse=sparse, dense=padded.dense, bridges=padded.joined(sites))
    mapped = DenseCircuit(circuit=circuit_of(sparse), site=5, **parts)
    into, out = mapped.edits(node)
    bridged = {t: s for s, t in sites.items()}
    assert (into.site, out.site, into.amount, out.amount) == (bridged[2], 5, 1.0, -1.0)
    norm = sparse.model.blocks[1].norm_1
    handle = norm.register_forward_pre_hook(lambda _m, args: (args[0] + into.direction,))
    want = sparse(ids).logits  # the oracle: the norm's input is moved, the stream is not
    handle.remove()
    assert (run_edited(padded.dense, ids, [into, out]) - want).abs().max() < 1e-4
    assert (run_edited(padded.dense, ids, [into]) - want).abs().max() > 1e-3  # control: carried on
    assert (want - sparse(ids).logits).abs().max() > 1e-3
    steered = mapped.edits_of(Steering(ids.roll(1, 0), [node], "read"), ids)
    assert [e.site for e in steered] == [bridged[2], 5]


@torch.no_grad()
def test_the_edit_of_a_write_is_at_the_first_bridge_that_comes_after_it(padded, circuit_of):
    parts = dict(sparse=padded.sparse, dense=padded.dense)
    parts["bridges"] = padded.joined({0: 0, 4: 2, 8: 4})
    mapped = DenseCircuit(circuit=circuit_of(padded.sparse), site=8, **parts)
    places = {"0.attn.v": 4, "0.mlp.post_act": 4, "1.attn.resid_delta": 8, "1.mlp.resid_delta": 8}
    for at, site in places.items():
        (edit,) = mapped.edits(Node(at, 1))
        assert edit.site == site
    unit = torch.zeros(20)
    unit[1] = 1.0
    assert torch.equal(edit.direction, parts["bridges"].transport(8, unit))
    with pytest.raises(ValueError, match=r"reads sparse site 1, and site 1 is not bridged"):
        mapped.edits(Node("0.mlp.act_in", 0))
    early = DenseCircuit(**vars(mapped) | {"bridges": padded.joined({0: 0, 4: 2})})
    with pytest.raises(ValueError, match="writes at sparse site 4, after the last bridged one, 2"):
        early.edits(Node("1.mlp.post_act", 0))


def test_where_reads_and_writes_are_edited():
    def config(n_dense, n_sparse, pairs=None):
        shape = dict(d_dense=3, d_sparse=3, n_dense_sites=n_dense, n_sparse_sites=n_sparse, k=1)
        given = {} if pairs is None else dict(sites=(*pairs,), sparse_sites=(*pairs.values(),))
        return BridgeConfig(**shape, **given)

    same, part = config(5, 5), config(5, 5, {1: 1, 4: 4})
    assert [read_at(same, t) for t in range(4)] == [(t, t + 1) for t in range(4)]
    assert [written_at(same, t) for t in range(5)] == [0, 1, 2, 3, 4]
    assert read_at(part, 1) == (1, 2) and read_at(config(5, 5, {1: 1}), 1) == (1, 2)
    assert [written_at(part, t) for t in range(5)] == [1, 1, 4, 4, 4]
    deep = config(9, 5, {0: 0, 4: 2, 7: 3})  # one sparse sublayer is answered by about two
    assert [read_at(deep, t) for t in (0, 2, 3)] == [(0, 2), (4, 7), (7, 8)]
    shallow = config(5, 9)  # two sparse sublayers are answered by one, the least there is
    assert [read_at(shallow, t) for t in (0, 2, 6)] == [(0, 1), (1, 2), (3, 4)]
    assert [written_at(shallow, t) for t in (1, 2, 3, 8)] == [1, 1, 2, 4]
    with pytest.raises(ValueError, match="site 1 is not bridged; .*sparse model are .0, 2, 4, 6"):
        read_at(shallow, 1)
    with pytest.raises(ValueError, match="bridged to dense site 4, the last, which no dense"):
        read_at(config(5, 9, {4: 6}), 6)


@torch.no_grad()
@pytest.mark.parametrize("nodes, candidates", [("0.attn.v", {2, 4, 6, 8}), ("1.mlp.act_in", {8})])
def test_a_site_is_chosen_among_those_that_come_after_a_node(build, circuit_of, nodes, candidates):
    dense, sparse = build.dense(n_layer=4), build.sparse()
    circuit = circuit_of(sparse, {nodes: (1, 2, 3)})
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7))
    mapped = map_circuit(circuit, dense, bridges, sparse_model=sparse)
    assert set(mapped.site_effects) == candidates
    early = BridgeSet(BridgeConfig.between(dense, sparse, k=7, sites=(0,)))
    with pytest.raises(ValueError, match="the last bridged one is 0; bridge a later site"):
        map_circuit(circuit, dense, early, sparse_model=sparse)


# ---- from training to report


def hooked(mapped, ids, site, delta):
    """The dense logits with `delta` added by a plain hook at a site of the hookable twin."""
    twin = mapped.dense.hookable()
    module = twin.get_submodule(mapped.dense.site_path(site))
    module.register_forward_hook(lambda _m, _a, h: h + delta)
    return twin(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("case", ["4 over 2", "boundaries, 3 over 1"])
def test_a_run_of_unequal_depth_goes_from_training_to_report(
    case, build, ids, circuit_of, tmp_path
):
    family, n_dense, n_sparse, asked, pairs = CASES[case]
    model = neox(n_dense) if family == "neox" else build.dense(n_layer=n_dense).model
    dense = DenseModel(model, build.dense().tokenizer)
    sparse = build.sparse(num_hidden_layers=n_sparse)
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7, sites=asked))
    config = CotrainConfig(
        train=TrainConfig(steps=3, folder=str(tmp_path / "run")),
        sparsity=SPARSITY,
        calibration_tokens=60,
    )
    before = copy.deepcopy(bridges.state_dict())
    cotrain(dense, sparse, bridges, Batches(ids, 4), config, [ids])
    trained = {name: v for name, v in bridges.state_dict().items() if name != "limit"}
    assert not any(torch.equal(v, before[name]) for name, v in trained.items())
    keep = dict(heldout=ids, means_from=ids, facts={})
    save_run(tmp_path / "run", dense, sparse, bridges, **keep).export(tmp_path / "given")
    run = load_run(tmp_path / "given", dense)
    assert run.bridges.config.pairs == pairs
    circuit_of(run.sparse, {"0.attn.v": (1, 6), "0.mlp.post_act": (0, 3)}).save(
        run.circuit_folder("opening")
    )
    mapped = map_circuit(run.circuits()["opening"], dense)
    first = {"4 over 2": 2, "boundaries, 3 over 1": 2}[case]
    assert set(mapped.site_effects) == {s for s in pairs if s >= first}
    with torch.no_grad():
        put, clean = mapped.circuit.ablation, run.sparse.residuals(ids)
        hold = {at: hold_at(put[at], chosen) for at, chosen in mapped.circuit.nodes.items()}
        with edited(run.sparse, hold):
            changed = run.sparse.residuals(ids)
        for s in mapped.site_effects:
            d = run.bridges.decoders[list(pairs).index(s)].weight
            delta = (
                run.bridges.scale[list(pairs).index(s)]
                * (changed[pairs[s]] - clean[pairs[s]])
                @ d.T
            )
            want = hooked(mapped, ids, s, delta)
            assert (mapped.ablate(ids, site=s) - want).abs().max() < 1e-4
        assert (want - dense.logits(ids)).abs().max() > 1e-3
    moved = mapped.steer(ids, ids.roll(1, 0)) - dense.logits(ids)
    assert moved.abs().max() > 1e-4 and torch.isfinite(moved).all()
    names = {row.name.split(":")[0] for row in evaluate_bridge(run, ids, draws=1)}
    assert {f"site {s}" for s in pairs} == {name for name in names if name.startswith("site ")}


def hold_at(values, chosen):
    def put(x):
        x = x.clone()
        x[..., list(chosen)] = values[list(chosen)]
        return x

    return put
