import copy
from collections import Counter
from itertools import combinations

import pytest
import torch

from bridges.losses.quantities import ce_nats, kl_nats
from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.hybrid import (
    draw_positions,
    draw_sites,
    drawn_first,
    run_passes,
    score_passes,
)
from dense import DenseModel

SITES = (0, 1, 3, 4)


@pytest.fixture(scope="module")
def double(build):
    """A dense and a sparse model in float64 and bridges between them at four of the five sites."""
    dense = DenseModel(build.dense(seed=4).model.double())
    sparse = build.sparse(seed=3).double()
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7, sites=SITES), seed=1).double()
    return dense, sparse, bridges


def ours(models, ids, drawn=None, positions=None, coefficients=(1.0, 1.0, 1.0)):
    run = run_passes(*models, ids, drawn)
    return score_passes(models[0], models[1], run, ids, coefficients, positions)


def naive(models, ids, drawn=None, positions=None):
    """One pass per site and direction (and sequence, where sites are drawn), full logits."""
    dense, sparse, bridges = models
    y, own = dense.logits(ids), sparse(ids).logits
    terms = {"ce": ce_nats(own, ids).mean(), "kl": kl_nats(y, own).mean()}
    up, down = [], []
    rows = [list(range(len(ids)))] if drawn is None else [[b] for b in range(len(ids))]
    for b in rows:
        at = torch.arange(ids.shape[1]).expand(len(b), -1) if positions is None else positions[b]
        for s in bridges.config.sites if drawn is None else drawn[b[0]].tolist():
            h, z = dense.residuals(ids[b])[s], sparse.residuals(ids[b])[s]
            to_sparse = kl_nats(y[b], sparse.resume(s, bridges.encode(s, h), ids[b]))
            to_dense = kl_nats(y[b], dense.resume(s, bridges.decode(s, z), ids[b]))
            up.append(to_sparse.gather(1, at).mean())
            down.append(to_dense.gather(1, at).mean())
    return terms | {"up": torch.stack(up).mean(), "down": torch.stack(down).mean()}


def named(scored):
    main = scored.main
    return {"ce": main.ce, "kl": main.kl, "up": scored.up.kl, "down": scored.down.kl}


def gradient(total, *modules):
    params = [p for m in modules for p in m.parameters()]
    grads = torch.autograd.grad(total, params, allow_unused=True, retain_graph=True)
    zeros = (torch.zeros_like(p) for p in params)
    return torch.cat([(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)])


def test_draws_are_a_pure_function_of_seed_and_step():
    for draw in (
        lambda t=7, seed=3: draw_sites(SITES, 6, t, seed),
        lambda t=7, seed=3: draw_positions(6, 8, 0.5, t, seed),
    ):
        torch.manual_seed(1)
        first = draw()
        torch.manual_seed(2)
        assert torch.equal(draw(), first)
        assert len({str(draw(t=t)) for t in range(40)}) >= 4
        assert len({str(draw(seed=s)) for s in range(40)}) >= 4


@pytest.mark.parametrize("m", [1, 2, 5])
def test_every_site_is_equally_likely_and_each_draw_as_even_as_can_be(m):
    sites = (0, 1, 3, 4, 8)
    counts = torch.zeros(4, 9)
    for step in range(2000):
        drawn = draw_sites(sites, 12, step, 0, m)
        per_site = Counter(drawn.flatten().tolist())
        assert set(per_site) == set(sites) and max(per_site.values()) - min(per_site.values()) <= 1
        assert all(len(set(row)) == m for row in drawn.tolist()), "a sequence's sites differ"
        counts[torch.arange(4)[:, None], drawn[:4]] += 1
    # the marginal of every sequence; four standard errors of a share of m/5 in 2,000 draws
    share = m / 5
    bound = 4 * (share * (1 - share) / 2000) ** 0.5 + 1e-9
    assert ((counts[:, list(sites)] / 2000 - share).abs() < bound).all()


def test_more_sites_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="6 sites per sequence of 5; draw 1 to all"):
        draw_sites((0, 1, 2, 3, 4), 2, 0, 0, 6)


def test_fewer_sequences_than_sites_still_reach_every_site():
    seen = {s for t in range(60) for s in draw_sites(tuple(range(9)), 2, t, 0).flatten().tolist()}
    assert seen == set(range(9))


def test_positions_are_drawn_without_repetition_and_each_as_likely():
    counts = torch.zeros(3, 10)
    for step in range(2000):
        at = draw_positions(3, 10, 0.3, step, 0)
        assert at.shape == (3, 3) and (at.diff() > 0).all()
        counts.scatter_add_(1, at, torch.ones(3, 3))
    assert ((counts / 2000 - 0.3).abs() < 4 * (0.3 * 0.7 / 2000) ** 0.5).all()
    assert draw_positions(2, 10, 0.01, 0, 0).shape == (2, 1), "at least one"
    assert torch.equal(draw_positions(2, 4, 1.0, 0, 0), torch.arange(4).expand(2, 4))


def test_drawn_tokens_come_first_and_every_token_once():
    order = drawn_first(torch.tensor([[1, 3], [0, 2]]), 4)
    assert order.tolist() == [1, 3, 4, 6, 0, 2, 5, 7]


@pytest.mark.parametrize(
    "m, fraction, chunk",
    [(None, 1.0, 23 * 30), (1, 1.0, 2**22), (None, 0.5, 2**22), (2, 0.5, 23 * 30)],
)
def test_joined_passes_and_chunked_losses_are_the_naive_loop(
    double, ids, m, fraction, chunk, monkeypatch
):
    monkeypatch.setattr("bridges.losses.chunked.CHUNK", chunk)
    monkeypatch.setattr("bridges.losses.chunked.MIN_ROWS", 1)
    drawn = None if m is None else draw_sites(SITES, len(ids), 2, 0, m)
    positions = None if fraction == 1 else draw_positions(*ids.shape, fraction, 2, 0)
    got, want = named(ours(double, ids, drawn, positions)), naive(double, ids, drawn, positions)
    modules = double[1:]
    for name, value in want.items():
        assert (got[name] - value).abs() < 1e-12, name
    mine, theirs = sum(got.values()), sum(want.values())
    want_grad = gradient(theirs, *modules)
    assert want_grad.abs().max() > 0.01
    # the sum, whose gradient was formed with the logits; then terms apart and weighted anew
    assert (gradient(mine, *modules) - want_grad).abs().max() < 1e-12
    for name in want:
        apart = gradient(got[name], *modules) - gradient(want[name], *modules)
        assert apart.abs().max() < 1e-12, name
    mine, theirs = (sum((i + 1) * x for i, x in enumerate(t.values())) for t in (got, want))
    assert (gradient(mine, *modules) - gradient(theirs, *modules)).abs().max() < 1e-12


def test_the_values_per_site_are_those_of_the_naive_loop(double, ids):
    scored = ours(double, ids)
    for i, s in enumerate(SITES):
        here = torch.full((len(ids), 1), s)
        want = naive(double, ids, here)
        assert (scored.up.per_stream[i] - want["up"]).abs() < 1e-12
        assert (scored.down.per_stream[i] - want["down"]).abs() < 1e-12
    assert scored.up.per_stream.std() > 0.01  # control: sites differ
    assert not scored.up.per_stream.requires_grad


def test_coefficients_scale_the_terms_and_zero_leaves_them_out(double, ids):
    once, scaled = ours(double, ids), ours(double, ids, coefficients=(0.5, 0.0, 3.0))
    assert torch.allclose(scaled.main.ce, 0.5 * once.main.ce)
    assert torch.allclose(scaled.up.kl, 3 * once.up.kl)
    assert scaled.main.kl == 0 and torch.equal(scaled.main.per_stream, torch.zeros(1))
    got = gradient(sum(named(scaled).values()), *double[1:])
    terms = naive(double, ids)
    want = gradient(0.5 * terms["ce"] + 3 * terms["up"] + 3 * terms["down"], *double[1:])
    assert (got - want).abs().max() < 1e-12
    some = ours(double, ids, coefficients=(0.0, 0.0, 1.0))
    computed = {name for name, loss in some._asdict().items() if loss.kl.requires_grad}
    assert computed == {"up", "down"} and some.main.ce == some.main.kl == some.dense.ce == 0


def test_the_sampled_estimate_averaged_over_all_draws_is_the_whole_loss_and_gradient(double, ids):
    n, modules = len(SITES), double[1:]
    ids = torch.cat([ids, ids[:2].flip(1)])  # 7 rows: some sites get more of them than others
    whole = named(ours(double, ids))
    whole = whole["up"] + whole["down"]
    want = gradient(whole, *modules)
    for m in (1, 2):
        losses, grads = [], []
        for start in range(n):  # the offset of the draw is uniform over the sites
            at = (start + torch.arange(len(ids) * m)) % n
            some = named(ours(double, ids, torch.tensor(SITES)[at].view(-1, m)))
            losses.append(some["up"] + some["down"])
            grads.append(gradient(losses[-1], *modules))
        assert (torch.stack(losses).mean() - whole).abs() < 1e-12
        assert (torch.stack(grads).mean(0) - want).abs().max() < 1e-12
        assert (torch.stack(losses) - whole).abs().max() > 1e-3  # control: single draws differ
        assert (grads[0] - want).abs().max() > 1e-4
    offsets = {tuple(draw_sites(SITES, 7, t, 0).flatten().tolist()) for t in range(50)}
    every = {tuple(SITES[(u + b) % n] for b in range(7)) for u in range(n)}
    assert offsets == every


def test_drawn_tokens_averaged_over_all_draws_are_the_whole_loss_and_gradient(double, ids):
    modules, n_pos = double[1:], ids.shape[1]
    whole = named(ours(double, ids))
    want = gradient(sum(whole.values()), *modules)
    losses, grads = [], []
    for at in combinations(range(n_pos), 2):
        some = named(ours(double, ids, positions=torch.tensor(at).expand(len(ids), -1)))
        losses.append(sum(some.values()))
        grads.append(gradient(losses[-1], *modules))
        assert (some["kl"] - whole["kl"]).abs() < 1e-12, "the main KL is taken everywhere"
    assert (torch.stack(losses).mean() - sum(whole.values())).abs() < 1e-12
    assert (torch.stack(grads).mean(0) - want).abs().max() < 1e-12
    assert (grads[0] - want).abs().max() > 1e-4  # control


def test_every_model_is_run_once_and_nothing_for_what_is_left_out(double, ids, monkeypatch):
    dense, sparse, bridges = double
    calls = Counter()

    def counting(model, name):
        real = getattr(type(model), name)

        def count(self, *args, **kwargs):
            calls[f"{type(model).__name__}.{name}"] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(model), name, count)

    for name in ("residuals", "joined", "resume"):
        counting(dense, name)
    for name in ("residuals", "residuals_and_joined", "resume"):
        counting(sparse, name)
    run_passes(dense, sparse, bridges, ids)
    once = {"DenseModel.residuals": 1, "DenseModel.joined": 1, "SparseGPT.residuals_and_joined": 1}
    assert calls == once
    calls.clear()
    run = run_passes(dense, sparse, bridges, ids, hybrid=False)
    assert run.ends is None and calls == {"DenseModel.residuals": 1, "SparseGPT.residuals": 1}


def test_bridges_of_sites_that_nobody_drew_get_a_gradient_of_zero(double, ids):
    scored = ours(double, ids, torch.full((len(ids), 1), 3))
    bridges = double[2]
    total = scored.up.kl + scored.down.kl
    for i, site in enumerate(SITES):
        weights = [bridges.encoders[i].weight, bridges.decoders[i].weight]
        for g in torch.autograd.grad(total, weights, retain_graph=True):
            assert (g.abs().max() > 0) == (site == 3)


def test_perfect_bridges_cost_nothing_at_any_site(twice, ids):
    scored = ours((twice.dense, twice.sparse, twice.bridges), ids)
    for way in (scored.main, scored.up, scored.down):
        assert way.per_stream.abs().max() < 1e-6


def test_control_a_shuffled_bridge_costs_something_at_its_site_alone(twice, ids):
    shuffled = copy.deepcopy(twice.bridges)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shuffled.encoders[1].weight.copy_(torch.eye(20)[order])
        shuffled.decoders[3].weight.copy_(torch.eye(20)[order])
    scored = ours((twice.dense, twice.sparse, shuffled), ids)
    assert (scored.up.per_stream > 0.1).nonzero()[:, 0].tolist() == [1]
    assert (scored.down.per_stream > 0.1).nonzero()[:, 0].tolist() == [3]
