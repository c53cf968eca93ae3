"""Laws of the bridge scores."""

import copy
from types import SimpleNamespace

import pytest
import torch

from bridges.losses.quantities import kl_nats, nmse
from bridges.maps.bridge import BridgeConfig, BridgeSet
from evals.claims.bridge import evaluate_bridge, untrained
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT


def named(rows):
    return {row.name: row for row in rows}


@pytest.fixture
def shallow(dense):
    """Bridges from dense sites 0, 2 and 4 to a sparse model of one layer, sites 0, 1 and 2."""
    torch.manual_seed(4)
    shape = dict(vocab_size=dense.vocab_size, hidden_size=24, num_hidden_layers=1, head_dim=4)
    shape |= dict(num_attention_heads=4, intermediate_size=32, initializer_range=0.2)
    sparse = SparseGPT(SparseGPTConfig(**shape)).eval()
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=12)).eval()
    return SimpleNamespace(dense=dense, sparse=sparse, bridges=bridges)


@torch.no_grad()
@pytest.mark.parametrize("depth", ["equal", "unequal"])
def test_the_numbers_are_those_of_the_definitions_whatever_the_batch_size(
    run, shallow, blocks, depth
):
    run = {"equal": run, "unequal": shallow}[depth]
    rows = named(evaluate_bridge(run, blocks, draws=1, batch_size=5))
    h, z = run.dense.residuals(blocks), run.sparse.residuals(blocks)
    y = run.dense.logits(blocks)
    pairs = {s: s for s in range(5)} if depth == "equal" else {0: 0, 2: 1, 4: 2}
    recovered = rows["loss recovered, dense to sparse"].detail
    assert {name.split(":")[0] for name in rows if name.startswith("site")} == set(recovered)
    assert set(recovered) == {f"site {s}" for s in pairs}
    for s, t in pairs.items():
        up, down = run.bridges.encode(s, h[s]), run.bridges.decode(s, z[t])
        expected = {
            "encoder FVU": nmse(up, z[t]),
            "decoder FVU": nmse(down, h[s]),
            "KL, dense to sparse": kl_nats(y, run.sparse.resume(t, up, blocks)).mean(),
            "KL, sparse to dense": kl_nats(y, run.dense.resume(s, down, blocks)).mean(),
        }
        for name, value in expected.items():
            assert rows[f"site {s}: {name}"].value == pytest.approx(float(value), rel=1e-4)
            assert rows[f"site {s}: {name}"].n == len(blocks)


def test_a_decoder_fitted_to_the_data_beats_untrained_ones_and_an_untrained_one_does_not(
    run, blocks
):
    site = 2
    fitted = SimpleNamespace(**vars(run) | {"bridges": copy.deepcopy(run.bridges)})
    z = run.sparse.residuals(blocks)[site].flatten(0, 1)
    h = run.dense.residuals(blocks)[site].flatten(0, 1)
    ones = torch.ones(len(z), 1)
    w = torch.linalg.lstsq(torch.cat([z, ones], 1), h).solution
    fitted.bridges.decoders[site].weight.data = w[:-1].T.contiguous()
    fitted.bridges.decoders[site].bias.data = w[-1]
    row = named(evaluate_bridge(fitted, blocks, draws=4))[f"site {site}: decoder FVU"]
    assert row.value < 1 and row.outcome == "beats"
    fresh = untrained(run.bridges, 50)
    null = SimpleNamespace(**vars(run) | {"bridges": fresh})
    rows = named(evaluate_bridge(null, blocks[:6], draws=20))
    found = [r.outcome == "beats" for n, r in rows.items() if n.startswith("site")]
    assert sum(found) <= len(found) // 4


def test_untrained_bridges_share_centring_and_scale_and_nothing_else(run, blocks):
    run.bridges.calibrate(run.dense.residuals(blocks))
    fresh = untrained(run.bridges, 7)
    assert torch.equal(fresh.mean, run.bridges.mean) and fresh.scale[0] != 1
    assert not torch.equal(fresh.decoders[0].weight, run.bridges.decoders[0].weight)
    assert torch.equal(fresh.decoders[0].weight, untrained(run.bridges, 7).decoders[0].weight)


def test_a_trained_model_beats_unigrams_and_a_task_model_does_not(run, blocks):
    rows = named(evaluate_bridge(run, blocks, draws=1))
    assert rows["cross entropy, dense"].outcome == "beats"
    assert rows["cross entropy, sparse"].outcome == "worse"
    sites = {f"site {s}" for s in run.bridges.config.sites}
    assert set(rows["loss recovered, dense to sparse"].detail) == sites


def test_a_prefix_that_nothing_predicts_is_not_counted_by_the_unigram_control(run, blocks):
    bos = 5
    begun = blocks.clone()
    begun[:, 0] = bos
    run.prefix = (bos,)
    text = begun[:, 1:]
    counts = (text.flatten().bincount(minlength=run.dense.vocab_size) + 1).double()
    want = -(counts / counts.sum()).log()[text].mean()
    of = "cross entropy, sparse"
    assert named(evaluate_bridge(run, begun, draws=1))[of].control == pytest.approx(
        float(want), rel=1e-6
    )
    run.prefix = ()
    counted = named(evaluate_bridge(run, begun, draws=1))[of].control  # the control
    assert counted > want + 0.003  # 12 of 384 tokens are wasted on what nothing predicts
    run.prefix = (bos + 1,)
    with pytest.raises(ValueError, match=r"block 0 begins with \[5\]"):
        evaluate_bridge(run, begun, draws=1)


def test_no_share_of_the_loss_is_recovered_where_the_dense_model_is_worse_than_unigrams(
    run, blocks
):
    worse = copy.deepcopy(run)
    worse.dense.model.lm_head = copy.deepcopy(run.dense.model.lm_head)
    with torch.no_grad():
        worse.dense.model.lm_head.weight.neg_()  # confidently wrong
    rows = named(evaluate_bridge(worse, blocks, draws=1))
    dense = rows["cross entropy, dense"]
    assert dense.value > dense.control
    assert not [name for name in rows if name.startswith("loss recovered")]
    better = named(evaluate_bridge(run, blocks, draws=1))  # the control
    assert len([name for name in better if name.startswith("loss recovered")]) == 2


def test_one_block_is_too_few(run, blocks):
    with pytest.raises(ValueError, match="at least 2"):
        evaluate_bridge(run, blocks[:1])
