import copy
from collections import Counter

import pytest
import torch

from bridges.bridge import BridgeConfig, BridgeSet
from bridges.hybrid import draw_sites, hybrid_kl, mean_over_sites
from bridges.losses import kl_nats


@pytest.fixture
def double(sparse):
    """Two sparse models in float64, the second as the dense one, and bridges between them."""
    sparse = sparse.double()
    dense = copy.deepcopy(sparse).requires_grad_(False)
    for p in dense.parameters():
        p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7), seed=1).double()
    return dense, sparse, bridges


def passes(dense, sparse, bridges, ids, drawn=None):
    with torch.no_grad():
        h = dense.residuals(ids)
        y = dense.resume(dense.n_sites - 1, h[-1], ids)
    z = sparse.residuals(ids)
    up = {s: bridges.encode(s, h[s]) for s in bridges.config.sites}
    down = {s: bridges.decode(s, z[s]) for s in bridges.config.sites}
    return hybrid_kl(dense, sparse, y, up, down, ids, drawn)


def gradient(total, *modules):
    params = [p for m in modules for p in m.parameters()]
    grads = torch.autograd.grad(total, params, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in params)
    return torch.cat([(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)])


def test_draws_are_a_pure_function_of_seed_and_step():
    def one(step=7, seed=3):
        return draw_sites((0, 2, 4, 5), 6, step, seed).tolist()

    torch.manual_seed(1)
    first = one()
    torch.manual_seed(2)
    assert one() == first
    assert len({tuple(one(step=t)) for t in range(40)}) == 4
    assert len({tuple(one(seed=s)) for s in range(40)}) == 4


def test_every_site_is_equally_likely_and_each_draw_as_even_as_can_be():
    sites = (0, 1, 3, 4, 8)
    counts = torch.zeros(4, 9)
    for step in range(2000):
        drawn = draw_sites(sites, 12, step, seed=0)
        per_site = Counter(drawn.tolist())
        assert set(per_site) == set(sites) and set(per_site.values()) == {2, 3}
        counts[torch.arange(4), drawn[:4]] += 1
    # the marginal of every sequence; four standard errors of a share of 1/5 in 2,000 draws
    assert ((counts[:, list(sites)] / 2000 - 0.2).abs() < 4 * (0.2 * 0.8 / 2000) ** 0.5).all()


def test_fewer_sequences_than_sites_still_reach_every_site():
    seen = {s for step in range(60) for s in draw_sites(tuple(range(9)), 2, step, 0).tolist()}
    assert seen == set(range(9))


def test_hybrid_passes_at_all_sites_are_the_naive_loop(dense, sparse, bridges, ids):
    up, down = passes(dense, sparse, bridges, ids)
    assert list(up) == list(down) == [0, 1, 2, 3, 4]
    y = dense.logits(ids)
    for s in range(5):
        for row in range(len(ids)):
            one = ids[row : row + 1]
            h, z = dense.residuals(one)[s], sparse.residuals(one)[s]
            want = kl_nats(y[row], sparse.resume(s, bridges.encode(s, h), one)[0])
            assert (up[s][row] - want).abs().max() < 1e-5
            want = kl_nats(y[row], dense.resume(s, bridges.decode(s, z), one)[0])
            assert (down[s][row] - want).abs().max() < 1e-5
    assert up[2].shape == ids.shape


def test_a_drawn_site_gives_that_row_of_the_pass_at_all_sites(dense, sparse, bridges, ids):
    drawn = torch.tensor([3, 0, 3, 1, 0])
    every, some = passes(dense, sparse, bridges, ids), passes(dense, sparse, bridges, ids, drawn)
    for whole, part in zip(every, some, strict=True):
        assert sorted(part) == [0, 1, 3]
        for s, kl in part.items():
            assert (kl - whole[s][drawn == s]).abs().max() < 1e-5


def test_the_sampled_estimate_averaged_over_all_draws_is_the_whole_loss_and_gradient(double, ids):
    dense, sparse, bridges = double
    n = 5  # the offset of the draw is uniform over the sites
    ids = torch.cat([ids, ids[:2].flip(1)])  # 7 rows: some sites get more of them than others
    up, down = passes(dense, sparse, bridges, ids)
    whole = mean_over_sites(up, False) + mean_over_sites(down, False)
    want = gradient(whole, sparse, bridges)
    losses, grads = [], []
    for start in range(n):
        drawn = (start + torch.arange(len(ids))) % n
        up, down = passes(dense, sparse, bridges, ids, drawn)
        losses.append(mean_over_sites(up, True) + mean_over_sites(down, True))
        grads.append(gradient(losses[-1], sparse, bridges))
    assert (torch.stack(losses).mean() - whole).abs() < 1e-12
    assert (torch.stack(grads).mean(0) - want).abs().max() < 1e-12
    assert (torch.stack(losses) - whole).abs().max() > 1e-3  # control: single draws differ
    assert (grads[0] - want).abs().max() > 1e-4
    offsets = {tuple(draw_sites(tuple(range(n)), len(ids), t, 0).tolist()) for t in range(50)}
    assert offsets == {tuple(((u + torch.arange(len(ids))) % n).tolist()) for u in range(n)}


def test_perfect_bridges_cost_nothing_at_any_site(twice, ids):
    for kl in passes(twice.dense, twice.sparse, twice.bridges, ids):
        assert all(x.abs().max() < 1e-6 for x in kl.values())


def test_control_a_shuffled_bridge_costs_something_at_its_site_alone(twice, ids):
    shuffled = copy.deepcopy(twice.bridges)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shuffled.encoders[1].weight.copy_(torch.eye(20)[order])
        shuffled.decoders[3].weight.copy_(torch.eye(20)[order])
    up, down = passes(twice.dense, twice.sparse, shuffled, ids)
    assert [s for s in up if up[s].mean() > 0.1] == [1]
    assert [s for s in down if down[s].mean() > 0.1] == [3]
