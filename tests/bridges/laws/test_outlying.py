"""Laws of outlying tokens: a planted attention sink touches no number and no edit of a bridge."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from bridges import Ablation, BridgeConfig, BridgeSet, CotrainConfig, DenseCircuit, LossWeights
from bridges.losses.moments import Moments, moments_of
from bridges.losses.quantities import nmse
from bridges.training.cotrain import Cotraining
from bridges.training.hybrid import draw_sites, run_passes
from bridges.training.objective import ALL_ROWS, Draw, bridge_errors, losses
from bridges.training.validate import calibrate
from dense import run_edited
from evals import evaluate_bridge
from evals.claims.bridge import ONE_BIT
from sparse import SparsityConfig, node_means
from sparse.training.config import TrainConfig
from tests.helpers.pair import build_dense

SINK = 300.0
ONLY_HYBRID = LossWeights(ce=0.0, kl=0.0, nmse=0.0)


@pytest.fixture(scope="module")
def sinking():
    """A dense model whose first position has a residual that is a hundred times too long."""
    dense = build_dense()
    with torch.no_grad():
        dense.model.transformer.wpe.weight[0, 3] += SINK
    return type(dense)(dense.model, dense.tokenizer)


@pytest.fixture
def joined(sinking, sparse, ids):
    made = BridgeSet(BridgeConfig.between(sinking, sparse, k=7), seed=1)
    made.calibrate(sinking.residuals(ids))
    return made


def test_limits_are_four_medians_and_only_the_sink_is_longer(sinking, joined, ids):
    for site, h in enumerate(sinking.residuals(ids)):
        ordinary = joined.ordinary(site, h)
        assert ordinary[:, 1:].all() and not ordinary[:, 0].any()
        assert joined.limits()[site] == pytest.approx(4 * float(h.norm(dim=-1).median()))


def test_centre_and_scale_are_those_of_the_other_tokens(sinking, sparse, joined, ids):
    rest = BridgeSet(BridgeConfig.between(sinking, sparse, k=7, outlying=0.0))
    rest.calibrate([h[:, 1:] for h in sinking.residuals(ids)])
    assert torch.allclose(joined.mean, rest.mean, atol=1e-5)
    assert torch.allclose(joined.scale, rest.scale, rtol=1e-5)
    rest.calibrate(sinking.residuals(ids))  # control: with the sink the scale is another
    assert (rest.scale > 4 * joined.scale).all()
    assert all(math.isinf(limit) for limit in rest.limits().values())


def test_where_no_token_is_outlying_nothing_changes(dense, sparse, ids):
    plain, told = (
        BridgeSet(BridgeConfig.between(dense, sparse, k=7, outlying=m), seed=1) for m in (0.0, 4.0)
    )
    for made in (plain, told):
        made.calibrate(dense.residuals(ids))
    assert all(math.isinf(limit) for limit in told.limits().values())
    a, b = (losses(dense, sparse, made, ids, LossWeights()) for made in (plain, told))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Twice:
    """A text of two batches, to be read again."""

    def __init__(self, ids):
        self.batches, self.at = ids.split(3), 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def __iter__(self):
        while True:
            self.at += 1
            yield self.batches[(self.at - 1) % 2]


def test_a_streamed_calibration_has_the_moments_of_all_its_ordinary_tokens(sinking, sparse, ids):
    made = BridgeSet(BridgeConfig.between(sinking, sparse, k=7), seed=1)
    calibrate(sinking, made, Twice(ids), ids.numel(), "cpu")
    for site, h in enumerate(sinking.residuals(ids)):
        assert torch.allclose(made.mean[site], h[:, 1:].flatten(0, 1).mean(0), atol=1e-5)


@pytest.mark.parametrize("by", ["fvu", "per_token", "uncentred"])
def test_errors_are_those_of_the_ordinary_tokens_alone(by):
    rng = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 4, 6, 5, generator=rng).double()
    where = torch.rand(4, 6, generator=rng) > 0.4
    assert nmse(x, target, by=by, where=where) == pytest.approx(
        float(nmse(x[where], target[where], by=by)), rel=1e-12
    )
    assert nmse(x, target, by=by) != pytest.approx(float(nmse(x, target, by=by, where=where)))


def test_moments_of_parts_and_of_marked_vectors_are_those_of_their_union():
    rng = torch.Generator().manual_seed(0)
    x, where = torch.randn(9, 5, generator=rng).double(), torch.rand(9, generator=rng) > 0.5
    whole = Moments.of(x[where])
    parts = [Moments.of(x[a], where[a]) for a in (slice(0, 4), slice(4, 9))]
    nothing = Moments.of(x, torch.zeros(9, dtype=torch.bool))
    for found in (
        Moments.of(x, where),
        parts[0].join(parts[1]),
        nothing.join(parts[0]).join(parts[1]),
    ):
        assert float(found.n) == whole.n
        assert torch.allclose(found.mean, whole.mean) and torch.allclose(found.spread, whole.spread)


def test_a_bridge_is_judged_and_trained_on_ordinary_tokens_alone(sinking, sparse, joined, ids):
    run = run_passes(sinking, sparse, joined, ids, hybrid=False)
    encode, decode = bridge_errors(joined, run, 1.0)
    numbers = encode.item(), decode.item()
    z = {s: run.z[s][:, 1:].detach() for s in joined.config.sites}
    by_hand = [nmse(run.down[s][:, 1:], run.h[s][:, 1:]) for s in z]
    assert numbers[1] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)
    by_hand = [nmse(run.up[s][:, 1:], z[s]) for s in z]
    assert numbers[0] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)
    for s in z:  # no gradient comes from the sink
        (g,) = torch.autograd.grad(decode, run.down[s], retain_graph=True)
        assert (g[:, 0] == 0).all() and (g[:, 1:] != 0).any()


@pytest.mark.parametrize("drawn", [False, True])
def test_a_sink_keeps_the_residual_of_its_own_model_in_both_directions(
    sinking, sparse, joined, ids, drawn
):
    sites = draw_sites(joined.config.sites, len(ids), 0, 0) if drawn else None
    run = run_passes(sinking, sparse, joined, ids, sites)
    to_sparse, to_dense = run.ends
    for stream in range(len(to_sparse)):
        for row in range(len(ids)):
            s = int(sites[row, 0]) if drawn else joined.config.sites[stream]
            one = slice(row, row + 1)
            own = torch.cat([run.z[s][one, :1], joined.encode(s, run.h[s][one, 1:])], 1)
            want = sparse.resume(s, own, ids[one])
            at = slice(row * ids.shape[1], (row + 1) * ids.shape[1])
            got = sparse.unembed(to_sparse[stream, at], ids[row])
            assert torch.allclose(got, want[0], atol=1e-4)
            own = torch.cat([run.h[s][one, :1], joined.decode(s, run.z[s][one, 1:])], 1)
            want = sinking.resume(s, own, ids[one])
            got = sinking.unembed(to_dense[stream, at], ids[row])
            assert torch.allclose(got, want[0], atol=1e-4)


def test_no_gradient_passes_to_the_twin_where_its_own_residual_goes_on(
    sinking, sparse, joined, ids
):
    everything = copy.deepcopy(joined)
    everything.limit.zero_()  # every token is outlying: nothing crosses at all
    terms = losses(sinking, sparse, everything, ids, ONLY_HYBRID)
    first = sparse.model.blocks[0].attn.out.weight
    g = torch.autograd.grad(terms["up"], first)[0]
    late = at_last(everything)
    terms = losses(sinking, sparse, late, ids, ONLY_HYBRID)
    assert (g != 0).any()  # control: rows that entered before the first block train it
    assert (torch.autograd.grad(terms["up"], first)[0] == 0).all()


def at_last(bridges):
    """The same bridges, at the last site only."""
    one = BridgeSet(
        BridgeConfig(
            d_dense=bridges.config.d_dense,
            d_sparse=bridges.config.d_sparse,
            n_dense_sites=bridges.config.n_dense_sites,
            n_sparse_sites=bridges.config.n_sparse_sites,
            k=bridges.config.k,
            sites=bridges.config.sites[-1:],
            sparse_sites=bridges.config.sparse_sites[-1:],
        )
    )
    one.limit.zero_()
    return one


@pytest.mark.parametrize("parts", [1, 5])
def test_the_parts_of_a_batch_add_up_to_the_whole(sinking, sparse, joined, ids, tmp_path, parts):
    config = CotrainConfig(
        train=TrainConfig(steps=4, folder=str(tmp_path)),
        sparsity=SparsityConfig(density=0.5),
        hybrid_sites="all",
    )
    module = Cotraining(sinking, sparse, joined, config)
    pieces = ids.split(len(ids) // parts)
    found = [module(x, 0, part) for x, part in zip(pieces, module.of_whole(pieces), strict=True)]
    whole = losses(sinking, sparse, joined, ids, config.weights)
    for name, want in whole.items():
        mean = torch.stack([f[name] for f in found]).mean()
        assert float(mean.detach()) == pytest.approx(float(want.detach()), rel=1e-4), name


def test_draws_of_sites_do_not_change_the_errors(sinking, sparse, joined, ids):
    sites = draw_sites(joined.config.sites, len(ids), 0, 0)
    a = losses(sinking, sparse, joined, ids, LossWeights(), draw=Draw(sites), share=ALL_ROWS)
    b = losses(sinking, sparse, joined, ids, LossWeights())
    assert torch.allclose(a["decode"], b["decode"]) and torch.allclose(a["encode"], b["encode"])


@pytest.fixture
def mapped(sinking, sparse, joined, circuit_of):
    return DenseCircuit(
        circuit=circuit_of(sparse), sparse=sparse, bridges=joined, dense=sinking, site=3
    )


def test_a_transfer_leaves_the_sink_as_it_is(mapped, ids):
    delta = mapped.delta(Ablation(), ids)
    assert (delta[:, 0] == 0).all() and (delta[:, 1:].norm(dim=-1) > 0).all()
    h = mapped.dense.residuals(ids)[3]
    want = mapped.dense.resume(3, h + delta, ids)
    assert torch.allclose(mapped.ablate(ids), want, atol=1e-4)
    live = run_edited(mapped.dense, ids, mapped.live_ablation())
    assert torch.allclose(live, want, atol=1e-4)
    free = copy.deepcopy(mapped.bridges)  # control: without limits the sink is edited too
    free.limit.fill_(math.inf)
    other = DenseCircuit(
        circuit=mapped.circuit, sparse=mapped.sparse, bridges=free, dense=mapped.dense, site=3
    )
    assert (other.delta(Ablation(), ids)[:, 0] != 0).any()


def test_node_means_leave_outlying_tokens_out(sinking, sparse, joined, ids):
    where = joined.ordinary_tokens(sinking, ids, batch_size=2)
    assert not where[:, 0].any() and where[:, 1:].all()
    means = node_means(sparse, ids, where=where)
    seen = []
    at = "1.mlp.post_act"
    handle = sparse.node(at).register_forward_hook(lambda m, i, o: seen.append(o))
    sparse.model(ids, use_cache=False)
    handle.remove()
    assert torch.allclose(means[at], seen[0][:, 1:].flatten(0, 1).mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="no tokens"):
        node_means(sparse, ids, where=torch.zeros_like(where))


def test_the_report_says_what_one_bit_would_explain(sinking, sparse, joined, ids):
    run = SimpleNamespace(dense=sinking, sparse=sparse, bridges=joined)
    rows = {row.key: row for row in evaluate_bridge(run, ids, draws=1, batch_size=2)}
    row = rows["bridge.site.2.decoder_fvu.all"]
    h = sinking.residuals(ids)[2].double()
    bit = torch.zeros(ids.shape, dtype=torch.bool)
    bit[:, 0] = True
    within = sum((h[m] - h[m].mean(0)).square().sum() for m in (bit, ~bit))
    about = (h - h.flatten(0, 1).mean(0)).square().sum()
    assert row.control_name == ONE_BIT
    assert row.draws[0] == pytest.approx(float(within / about), rel=1e-4) and row.draws[0] < 0.1
    z = sparse.residuals(ids)[2]
    error = (joined.decode(2, z).double() - h).square().sum()
    assert row.value == pytest.approx(float(error / about), rel=1e-4)
    assert row.detail["outlying tokens"] == pytest.approx(1 / ids.shape[1])
    assert row.detail["variance that they carry"] > 0.9
    plain = rows["bridge.site.2.decoder_fvu"]
    assert plain.value == pytest.approx(
        float(nmse(joined.decode(2, z)[:, 1:], h[:, 1:].float())), rel=1e-4
    )


def test_limits_are_saved_and_older_bridges_have_none(joined, tmp_path):
    joined.save(tmp_path)
    assert BridgeSet.load(tmp_path).limits() == joined.limits()
    assert all(math.isinf(limit) for limit in BridgeSet(joined.config).limits().values())
    joined.limit.fill_(7.0)  # a change is seen
    assert set(joined.limits().values()) == {7.0}


@pytest.mark.parametrize("m", [1.0, -2.0, 0.5, math.inf, math.nan])
def test_a_limit_that_makes_no_sense_is_refused(sinking, sparse, m):
    with pytest.raises(ValueError, match="outlying=.* must be above 1, or 0"):
        BridgeConfig.between(sinking, sparse, k=7, outlying=m)


def test_masks_are_given_for_every_target():
    x = torch.randn(2, 3, 4)
    where = torch.ones(2, 3, dtype=torch.bool)
    a, b = moments_of([x, x], 1, [where, None])
    assert float(a.n) == b.n and torch.allclose(a.mean, b.mean)
