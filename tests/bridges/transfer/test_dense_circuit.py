import copy
import shutil
from dataclasses import replace

import nnsight
import pytest
import torch

from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.run_folder import save_run
from bridges.transfer.dense_circuit import DenseCircuit
from bridges.transfer.intervention import Ablation, Steering, bridged
from bridges.transfer.map_circuit import map_circuit
from dense import DenseModel, Edit, apply_edits, run_edited, trace_model
from sparse.circuits.circuit import Circuit
from sparse.circuits.graph import Node
from sparse.circuits.taps import edited, recorded
from sparse.tasks.batch import logit_difference

SOME = {"0.attn.v": (1, 6), "0.mlp.post_act": (0, 3, 7), "1.attn.resid_delta": (2,)}


@pytest.fixture
def other(ids):
    return ids.roll(1, dims=0)


@pytest.fixture
def mapped(dense, sparse, bridges, circuit_of):
    """A circuit of a few nodes, mapped; the site is given rather than chosen."""
    return DenseCircuit(
        circuit=circuit_of(sparse, SOME), sparse=sparse, bridges=bridges, dense=dense, site=3
    )


@pytest.fixture
def perfect(twice, circuit_of):
    def make(nodes=None):
        parts = dict(sparse=twice.sparse, bridges=twice.bridges, dense=twice.dense)
        return DenseCircuit(circuit=circuit_of(twice.sparse, nodes), site=4, **parts)

    return make


@pytest.fixture
def on_disk(dense, sparse, bridges, ids, circuit_of, tmp_path):
    """A run folder with a circuit in it."""
    dense.model.save_pretrained(tmp_path / "dense")
    dense.tokenizer.save_pretrained(tmp_path / "dense")
    opened = DenseModel.from_pretrained(tmp_path / "dense")
    run = save_run(tmp_path / "run", opened, sparse, bridges, heldout=ids, means_from=ids, facts={})
    circuit_of(run.sparse, SOME).save(run.circuit_folder("opening"))
    return run


def hooked_logits(dense, ids, site, delta):
    """The oracle: a plain torch hook that adds `delta` at the site of the hookable twin."""
    twin = dense.hookable()
    module = twin.get_submodule(dense.site_path(site))
    module.register_forward_hook(lambda _m, _a, h: h + delta)
    return twin(input_ids=ids, use_cache=False).logits


def moved(mapped, ids, values, site):
    """sigma D (z' - z), the sparse model run with hooks that put `values` on the nodes of SOME."""
    sparse, i = mapped.sparse, mapped.bridges.index(site)
    clean = sparse.residuals(ids)[site]
    handles = []
    for at, indices in SOME.items():

        def put(_m, _a, x, at=at, chosen=indices):
            x = x.clone()
            x[..., list(chosen)] = values[at][..., list(chosen)]
            return x

        handles.append(sparse.node(at).register_forward_hook(put))
    changed = sparse.residuals(ids)[site]
    for handle in handles:
        handle.remove()
    return mapped.bridges.scale[i] * (changed - clean) @ mapped.bridges.decoders[i].weight.T


@torch.no_grad()
@pytest.mark.parametrize("site", [1, 2, 3, 4])
def test_ablating_and_steering_are_what_plain_hooks_do(mapped, ids, other, site):
    dense = mapped.dense
    zeros = {at: torch.zeros(n) for at, n in mapped.sparse.node_widths().items()}
    with recorded(mapped.sparse) as there:
        mapped.sparse(other)
    for values, call in (
        (mapped.circuit.ablation, lambda w: mapped.ablate(ids, site=site, strength=w)),
        (zeros, lambda w: mapped.ablate(ids, kind="zero", site=site, strength=w)),
        (dict(there), lambda w: mapped.steer(ids, other, site=site, strength=w)),
    ):
        delta = moved(mapped, ids, values, site)
        for strength in (1.0, -0.5):
            want = hooked_logits(dense, ids, site, strength * delta)
            assert (call(strength) - want).abs().max() < 1e-4
            assert (want - dense.logits(ids)).abs().max() > 0.01


@torch.no_grad()
def test_the_wanted_logits_of_every_intervention_are_those_of_all(mapped, ids, other):
    n_rows, n_pos = ids.shape
    wanted = torch.stack([torch.arange(n_rows) % n_pos, torch.arange(n_rows) + 1], 1) % n_pos
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    reads = [Node("1.mlp.act_in", 3)]
    for call in (
        lambda **how: mapped.ablate(ids, **how),
        lambda **how: mapped.steer(ids, other, **how),
        lambda **how: mapped.steer(ids, other, reads, mode="read", **how),
        lambda **how: mapped.interchange(ids, other, **how),
    ):
        for given in (None, mask):
            want = call(attention_mask=given).take_along_dim(wanted[..., None], 1)
            got = call(attention_mask=given, positions=wanted)
            # other shapes, other order of summation in the kernels
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            plain = mapped.dense.logits(ids, given, positions=wanted)
            assert (got - plain).abs().max() > 1e-3  # control: it does something


@torch.no_grad()
def test_strength_zero_leaves_the_dense_logits_bit_for_bit(mapped, ids, other):
    want = mapped.dense.logits(ids)
    reads = [Node("1.mlp.act_in", 3)]
    for got in (
        mapped.ablate(ids, strength=0.0),
        mapped.steer(ids, other, strength=0.0),
        mapped.steer(ids, other, reads, strength=0.0, mode="read"),
        mapped.steer(ids, ids),  # and so does a counterfactual that is the prompt itself
        mapped.ablate(ids, nodes=[]),
    ):
        assert torch.equal(got, want)
    assert not torch.equal(mapped.steer(ids, other), want)  # control


def test_a_strength_that_is_no_number_is_refused(mapped, ids, other):
    reads = [Node("1.mlp.act_in", 3)]
    for strength in (float("nan"), float("inf"), torch.tensor(float("nan"))):
        for call in (
            lambda w: mapped.ablate(ids, strength=w),
            lambda w: mapped.steer(ids, other, strength=w),
            lambda w: mapped.steer(ids, other, reads, strength=w, mode="read"),
            lambda w: mapped.live_ablation(strength=w),
        ):
            with pytest.raises(ValueError, match="strength=.* must be a finite number"):
                call(strength)


@torch.no_grad()
def test_an_interchange_is_a_steering_of_strength_one(mapped, ids, other):
    nodes = [Node("0.attn.v", 1)]
    for site in (1, 4):
        got = mapped.interchange(ids, other, nodes, site)
        assert torch.equal(got, mapped.steer(ids, other, nodes, site, strength=1.0))
        assert not torch.equal(got, mapped.interchange(ids, other, site=site))


@torch.no_grad()
def test_only_the_nodes_named_are_moved(mapped, ids):
    node = [Node("0.mlp.post_act", 3)]
    z = mapped.sparse.residuals(ids)
    at = "0.mlp.post_act"
    value = mapped.circuit.ablation[at][3]

    def put(x):
        x = x.clone()
        x[..., 3] = value
        return x

    with edited(mapped.sparse, {at: put}):
        want = mapped.bridges.transport(4, mapped.sparse.residuals(ids)[4] - z[4])
    assert torch.allclose(mapped.delta(Ablation(node), ids, site=4), want, atol=1e-6)
    assert (mapped.delta(Ablation(node), ids, site=1) == 0).all(), "the node comes after site 1"


@torch.no_grad()
def test_the_edits_do_in_a_trace_of_ones_own_what_the_calls_do(mapped, ids, other):
    traced = nnsight.NNsight(mapped.dense.hookable())
    for edits, want in (
        (mapped.edits_of(Ablation(), ids, strength=0.7), mapped.ablate(ids, strength=0.7)),
        (mapped.edits_of(Steering(other), ids), mapped.steer(ids, other)),
    ):
        with traced.trace(**mapped.dense.inputs(ids)):
            apply_edits(traced, mapped.dense, edits)
            logits = traced.output.logits.save()
        assert torch.equal(logits, want)


@torch.no_grad()
def test_over_perfect_bridges_transport_is_the_sparse_intervention(perfect, ids, other):
    whole = perfect()
    with recorded(whole.sparse) as there:
        whole.sparse(other)
    swap = {at: (lambda x, at=at: there[at]) for at in whole.sparse.node_widths()}
    with edited(whole.sparse, swap):
        z, want = whole.sparse.residuals(ids), whole.sparse(ids).logits
    got = whole.steer(ids, other, site=4)
    assert (got - want).abs().max() < 1e-4
    assert (want - whole.sparse(ids).logits).abs().max() > 0.5
    for site in range(5):  # at an earlier site, what comes after it runs on undisturbed
        want = whole.sparse.resume(site, z[site], ids)
        assert (whole.steer(ids, other, site=site) - want).abs().max() < 1e-4
    widths = whole.sparse.node_widths()
    layer_0 = {at: tuple(range(n)) for at, n in widths.items() if at[0] == "0"}
    first = perfect(layer_0)
    mean = first.circuit.ablation
    with edited(first.sparse, {at: (lambda x, at=at: mean[at].expand_as(x)) for at in layer_0}):
        want = first.sparse(ids).logits
    for site in (2, 4):  # the nodes are all before these sites
        assert (first.ablate(ids, site=site) - want).abs().max() < 1e-4


@torch.no_grad()
def test_the_chosen_site_is_the_one_where_steering_moves_the_task_most(
    dense, sparse, bridges, circuit_of, task
):
    mapped = map_circuit(circuit_of(sparse, SOME), dense, bridges, sparse_model=sparse)
    batch = task.batch(dense.tokenizer, "validation")
    ids, other = batch.ids, batch.counterfactual()
    before = logit_difference(batch.scored(dense.logits(ids)), batch)
    effects = {}
    for s in range(5):
        after = logit_difference(batch.scored(mapped.steer(ids, other, site=s)), batch)
        effects[s] = (before - after).mean().item()
    assert effects.pop(0) == 0  # no node is before site 0: it is no candidate
    assert mapped.site_effects == pytest.approx(effects, abs=1e-5)
    assert mapped.site == max(effects, key=effects.get)
    assert max(map(abs, effects.values())) > 1e-3
    assert torch.equal(mapped.steer(ids, other), mapped.steer(ids, other, site=mapped.site))


def bumped(sparse, ids, node, eps):
    """Change of the residuals when eps is added to a node's value at every token."""
    bump = torch.zeros(sparse.node_widths()[node.location])
    bump[node.index] = eps
    with edited(sparse, {node.location: lambda x: x + bump}):
        after = sparse.residuals(ids)
    return [b - a for a, b in zip(sparse.residuals(ids), after, strict=True)]


@pytest.fixture
def linear(build, dense, circuit_of):
    """Bridges to a sparse model in float64 that keeps all activations and has no sinks."""
    sparse = build.sparse(activation_fraction=1.0, attention_sinks=False).double()
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=5), seed=2).double()
    circuit = circuit_of(sparse, SOME)
    return DenseCircuit(circuit=circuit, sparse=sparse, bridges=bridges, dense=dense, site=1)


@torch.no_grad()
def test_the_directions_of_nodes_that_write_are_their_finite_differences(linear, ids):
    for at in ("0.attn.resid_delta", "1.mlp.resid_delta", "1.mlp.post_act", "0.attn.v"):
        node, eps = Node(at, 3), 0.01
        (edit,) = linear.edits(node)
        site = 2 * int(at[0]) + (2 if "mlp" in at else 1)
        assert edit.site == site and edit.amount == 1.0
        delta = linear.bridges.transport(site, bumped(linear.sparse, ids, node, eps)[site])
        assert (delta - eps * edit.direction).abs().max() < 1e-9, at
        assert edit.direction.norm() > 1e-3


@torch.no_grad()
def test_through_sinks_a_value_writes_its_direction_by_the_share_attended(mapped, ids):
    node = Node("0.attn.v", 3)
    (edit,) = mapped.edits(node)
    bump = torch.zeros(8)
    bump[3] = 1.0
    sparse, attn = mapped.sparse, mapped.sparse.model.blocks[0].attn
    y = {}
    attn.out.register_forward_hook(lambda _m, args, out: y.__setitem__(len(y), out))
    sparse.residuals(ids)
    with edited(sparse, {"0.attn.v": lambda x: x + bump}):
        sparse.residuals(ids)
    delta = mapped.bridges.transport(1, y[1] - y[0])  # before AbsTopK chooses
    share = delta @ edit.direction / edit.direction.square().sum()
    assert ((share > 0) & (share < 1)).all()
    assert (delta - share.unsqueeze(-1) * edit.direction).abs().max() < 1e-5


@torch.no_grad()
def test_the_direction_of_a_read_is_the_change_of_the_stream_that_moves_its_node(linear, ids):
    """(norm(z + eps rms e_j / gamma_j) - norm(z))_j = eps, up to what holding the rms neglects."""
    for at, norm in (("1.attn.act_in", "norm_1"), ("0.mlp.act_in", "norm_2")):
        into, out = linear.edits(Node(at, 3))
        site = 2 * int(at[0]) + ("mlp" in at)
        assert (into.site, out.site, into.amount, out.amount) == (site, site + 1, 1.0, -1.0)
        assert torch.equal(into.direction, out.direction)
        read = getattr(linear.sparse.model.blocks[int(at[0])], norm)
        unit = torch.zeros(20, dtype=torch.float64)
        unit[3] = 1 / read.weight[3]
        assert torch.allclose(into.direction, linear.bridges.transport(site, unit))
        z, eps = linear.sparse.residuals(ids)[site], 1e-5
        rms = z.square().mean(-1, keepdim=True).sqrt()
        change = (read(z + eps * rms * unit) - read(z))[..., 3] / eps
        neglected = (z[..., 3] / rms[..., 0]).square() / 20
        assert (change - 1 + neglected).abs().max() < 1e-3


@torch.no_grad()
def test_the_edits_of_a_read_are_seen_by_its_sublayer_alone(mapped, ids):
    dense = mapped.dense
    for at in ("0.attn.act_in", "1.mlp.act_in"):
        into, out = mapped.edits(Node(at, 2))
        block = dense.model.transformer.h[int(at[0])]
        norm = block.ln_2 if "mlp" in at else block.ln_1
        handle = norm.register_forward_pre_hook(lambda _m, args, d=into.direction: (args[0] + d,))
        want = dense.logits(ids)  # the oracle: the norm's input is moved, the stream is not
        handle.remove()
        got = run_edited(dense, ids, [into, out])
        assert (got - want).abs().max() < 1e-4
        assert (want - dense.logits(ids)).abs().max() > 1e-3
        carried = run_edited(dense, ids, [into])
        assert (carried - want).abs().max() > 1e-3  # control: without the second edit


@torch.no_grad()
def test_for_small_changes_the_read_rule_is_the_exact_difference(
    build, dense, ids, bridges, circuit_of
):
    """Gao et al. 2025, Appendix A.4, against decoding both runs (docs/method.md#read-nodes)."""
    sparse = build.sparse(activation_fraction=1.0)
    wte, rng = sparse.model.wte.weight, torch.Generator().manual_seed(8)
    wte[6] = wte[5] + 0.02 * torch.randn(20, generator=rng)
    sparse.model.blocks[0].norm_1.weight.copy_(torch.linspace(0.2, 4, 20))
    prompt = torch.where(ids % 2 == 0, 5, ids)
    swapped = torch.where(prompt == 5, 6, prompt)
    changed = prompt == 5
    circuit = circuit_of(sparse, {"0.attn.act_in": tuple(range(20))})
    mapped = DenseCircuit(circuit=circuit, sparse=sparse, bridges=bridges, dense=dense, site=4)
    into, out = mapped.edits_of(Steering(swapped, mode="read"), prompt, strength=0.5)
    assert (into.site, out.site, into.amount, out.amount) == (0, 1, 0.5, -0.5)
    before, after = (sparse.residuals(x)[0] for x in (prompt, swapped))
    exact = bridges.decode(0, after) - bridges.decode(0, before)
    cosine = torch.cosine_similarity(into.direction[changed], exact[changed], dim=-1)
    assert cosine.min() > 0.95
    ratio = into.direction[changed].norm(dim=-1) / exact[changed].norm(dim=-1)
    assert (ratio - 1).abs().max() < 0.2
    # what the dense sublayer reads: dz = gamma * centred(dh) / std, the paper's linear form
    h, ln = dense.residuals(prompt)[0], dense.model.transformer.h[0].ln_1
    got = ln(h + into.direction) - ln(h)
    centred = into.direction - into.direction.mean(-1, keepdim=True)
    linear = ln.weight * centred / h.std(-1, correction=0, keepdim=True)
    assert torch.cosine_similarity(got.flatten(), linear.flatten(), dim=0) > 0.95  # holds the std
    # control: without the gains of the sparse norm the direction is another
    wrong = bridges.transport(0, (after - before) * sparse.model.blocks[0].norm_1.weight)
    assert torch.cosine_similarity(wrong[changed], exact[changed], dim=-1).max() < 0.95


def test_read_mode_is_for_reads(mapped, ids, other):
    with pytest.raises(ValueError, match="mode='read' is for residual read nodes.*'0.attn.v'"):
        mapped.steer(ids, other, mode="read")
    with pytest.raises(ValueError, match="mode='read' has no one delta"):
        mapped.delta(Steering(other, mode="read"), ids)


def test_a_node_without_a_fixed_direction_says_so(mapped):
    for at in ("0.attn.q", "1.attn.k"):
        with pytest.raises(ValueError, match=f"{at}.2 has no fixed direction: .*use steer or"):
            mapped.edits(Node(at, 2))


def test_nodes_and_sites_that_do_not_exist_are_refused(mapped, ids, other, dense, sparse):
    for node in (Node("7.attn.v", 0), Node("0.attn.y", 0)):
        with pytest.raises(ValueError, match="no node location"):
            mapped.edits(node)
        with pytest.raises(ValueError, match="no node location"):
            mapped.ablate(ids, [node])
    for call in (mapped.edits, lambda node: mapped.ablate(ids, [node])):
        with pytest.raises(ValueError, match=r"0.attn.v has nodes 0\.\.7, got 8"):
            call(Node("0.attn.v", 8))
    for site in (5, -1):
        with pytest.raises(ValueError, match=f"site {site} is not bridged"):
            mapped.steer(ids, other, site=site)
    some = BridgeSet(BridgeConfig.between(dense, sparse, k=5, sites=(1, 4)))
    parts = dict(circuit=mapped.circuit, sparse=sparse, dense=dense, bridges=some)
    with pytest.raises(ValueError, match=r"site 2 is not bridged; .*\[1, 4\]"):
        DenseCircuit(**parts, site=4).ablate(ids, site=2)
    with pytest.raises(ValueError, match="site 3 is not bridged"):
        DenseCircuit(**parts, site=4).edits(Node("1.mlp.act_in", 0))
    for site in (True, "1", 1.0):  # past the suite's checker of types
        with pytest.raises(ValueError, match="must be an int, the index of a residual site"):
            bridged.__wrapped__(mapped.bridges, site)
    with pytest.raises(ValueError, match="no site was chosen"):
        DenseCircuit(**parts, site=None).ablate(ids)


def test_prompts_of_unequal_shape_are_refused(mapped, ids):
    with pytest.raises((ValueError, TypeError)):  # the suite's checker of shapes comes first
        mapped.steer(ids, torch.cat([ids, ids]))


def test_tokens_and_modes_that_do_not_exist_are_refused(mapped, ids):
    for call in (
        lambda: mapped.steer(ids, ids + 999),
        lambda: mapped.steer(ids + 999, ids),
        lambda: mapped.ablate(ids + 999),
    ):
        with pytest.raises(ValueError, match="made by another model's tokenizer"):
            call()
    with pytest.raises((ValueError, TypeError), match="raed"):
        mapped.edits_of(Steering(ids, mode="raed"), ids)


@torch.no_grad()
def test_a_circuit_of_zeros_takes_its_means_from_the_run(on_disk, ids, circuit_of):
    run, nodes = on_disk, {"0.mlp.post_act": (1, 2)}
    parts = dict(sparse=run.sparse, bridges=run.bridges, dense=run.dense, site=4)
    zero = DenseCircuit(circuit=circuit_of(run.sparse, nodes, kind="zero"), **parts)
    with recorded(run.sparse) as values:
        run.sparse(ids)  # the run's means were taken on these very ids
    mean = values["0.mlp.post_act"].mean((0, 1))

    def hold(x):
        x = x.clone()
        x[..., 1:3] = mean[1:3]
        return x

    with edited(run.sparse, {"0.mlp.post_act": hold}):
        changed = run.sparse.residuals(ids)[4]
    want = run.bridges.transport(4, changed - run.sparse.residuals(ids)[4])
    assert torch.allclose(zero.delta(Ablation(kind="mean"), ids), want, atol=1e-5)
    assert not torch.allclose(zero.delta(Ablation(kind="zero"), ids), want, atol=1e-3)
    lost = DenseCircuit(circuit=replace(zero.circuit, source=None), **parts)
    with pytest.raises(ValueError, match="does not know which run"):
        lost.delta(Ablation(kind="mean"), ids)


@torch.no_grad()
def test_a_circuit_finds_its_bridges_wherever_the_run_is_moved(on_disk, ids, tmp_path, monkeypatch):
    want = map_circuit(on_disk.circuits()["opening"], on_disk.dense)
    shutil.move(tmp_path / "run", tmp_path / "other place")
    monkeypatch.chdir(tmp_path / "other place")
    for folder in (tmp_path / "other place" / "circuits" / "opening", "circuits/opening"):
        mapped = map_circuit(Circuit.load(folder), on_disk.dense)
        assert mapped.site == want.site and mapped.site_effects == want.site_effects
        assert torch.equal(mapped.ablate(ids), want.ablate(ids))
        for a, b in zip(mapped.bridges.parameters(), on_disk.bridges.parameters(), strict=True):
            assert torch.equal(a, b) and not a.requires_grad


@torch.no_grad()
def test_the_dense_model_may_come_in_any_form(on_disk, ids, tmp_path):
    circuit = on_disk.circuits()["opening"]
    want = map_circuit(circuit, on_disk.dense).ablate(ids, site=3)
    plain = copy.deepcopy(on_disk.dense.model)
    for form in (str(tmp_path / "dense"), plain, trace_model(on_disk.dense)):
        assert torch.equal(map_circuit(circuit, form).ablate(ids, site=3), want)


def test_another_dense_model_other_weights_and_other_bridges_are_refused(
    on_disk, build, bridges, tmp_path
):
    circuit = on_disk.circuits()["opening"]
    with pytest.raises(ValueError, match="the dense model's weights .* load that dense model"):
        map_circuit(circuit, build.dense(seed=1))
    with pytest.raises(ValueError, match="circuit belongs to"):
        map_circuit(circuit, on_disk.dense, sparse_model=build.sparse(seed=1))
    changed = copy.deepcopy(bridges)
    changed.sparse_fingerprint = "another"
    with pytest.raises(ValueError, match="the sparse model's weights"):
        map_circuit(circuit, on_disk.dense, changed)


def test_a_run_that_is_not_there_is_told_with_the_remedy(on_disk, circuit_of, build, tmp_path):
    circuit, dense = on_disk.circuits()["opening"], on_disk.dense
    with pytest.raises(ValueError, match="does not know which run .*; pass sparse_model="):
        map_circuit(circuit_of(build.sparse(), SOME), dense)
    with pytest.raises(ValueError, match="does not know which run .*; pass bridges="):
        map_circuit(circuit_of(build.sparse(), SOME), dense, sparse_model=build.sparse())
    shutil.rmtree(tmp_path / "run" / "bridges")
    with pytest.raises(ValueError, match="no bridges beside the sparse model.*pass bridges="):
        map_circuit(circuit, dense)
    shutil.rmtree(tmp_path / "run" / "sparse")
    with pytest.raises(ValueError, match="came from .*sparse, which is not there; pass"):
        map_circuit(circuit, dense)


def test_mapping_changes_nothing_on_what_it_is_given(dense, sparse, bridges, circuit_of):
    sparse.train()
    map_circuit(circuit_of(sparse, SOME), dense, bridges, sparse_model=sparse)
    assert sparse.training and all(p.requires_grad for p in sparse.parameters())
    assert all(p.requires_grad for p in bridges.parameters())


def test_edits_are_edits(mapped, ids):
    assert all(isinstance(e, Edit) for e in mapped.edits_of(Ablation(), ids))
