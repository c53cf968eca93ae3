"""Maps between the sites of models of unequal depth."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from bridges.maps.bridge import BridgeConfig
from bridges.maps.site_map import best_map, even_sites, fit_sites

VOCAB = 3000


def stub(tables):
    """A model whose residual at each site is looked up by token alone: (site, token, d)."""
    names = ("resume", "last_logits", "joined", "unembed")
    return SimpleNamespace(
        n_sites=len(tables),
        d_resid=tables.shape[-1],
        vocab_size=tables.shape[1],
        residuals=lambda ids, mask=None: list(tables[:, ids]),
        **{name: (lambda *args: None) for name in names},
    )


def random(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def text(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, VOCAB, (3, n, 10), generator=rng))


def maps(n_dense, n_sparse):
    """Every strictly monotone map that holds all sites of the smaller side."""
    n = min(n_dense, n_sparse)
    for a in combinations(range(n_dense), n):
        for b in combinations(range(n_sparse), n):
            yield dict(zip(a, b, strict=True))


def test_even_maps_are_the_identity_or_take_every_other_site():
    assert even_sites(5, 5) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
    assert even_sites(9, 5) == {0: 0, 2: 1, 4: 2, 6: 3, 8: 4}
    assert even_sites(4, 7) == {0: 0, 1: 2, 2: 4, 3: 6}  # L+1 sites and 2L+1: block to block
    assert even_sites(5, 7) == {0: 0, 1: 2, 2: 3, 3: 4, 4: 6}
    assert even_sites(1, 4) == {0: 0}


def test_even_maps_are_strictly_monotone_from_end_to_end_and_within_half_a_site():
    for n in range(2, 28):
        for larger in range(n, 60):
            pairs = even_sites(n, larger)
            assert list(pairs) == list(range(n)) and pairs[0] == 0 and pairs[n - 1] == larger - 1
            assert all(pairs[i] < pairs[i + 1] for i in range(n - 1))
            assert all(abs(s - i * (larger - 1) / (n - 1)) <= 0.5 + 1e-12 for i, s in pairs.items())
            assert even_sites(larger, n) == {s: i for i, s in pairs.items()}


@pytest.mark.parametrize("shape", [(1, 4), (3, 3), (3, 8), (8, 4), (5, 7)])
def test_the_best_map_is_the_one_that_trying_all_maps_finds(shape):
    greedy = []
    for seed in range(20):
        cost = random(*shape, seed=seed)
        totals = [(sum(float(cost[p]) for p in m.items()), m) for m in maps(*shape)]
        assert best_map(cost) == min(totals, key=lambda x: x[0])[1]
        greedy.append({d: int(s) for d, s in enumerate(cost.argmin(1))} == best_map(cost))
    assert shape[0] in (1, 8) or not all(greedy)  # control: sites cannot each choose alone


def test_a_cost_that_is_not_finite_has_no_best_map():
    for cost in (torch.full((2, 3), torch.nan), torch.tensor([[0.0, torch.inf]]), torch.ones(0, 3)):
        with pytest.raises(ValueError, match="finite number for every pair"):
            best_map(cost)


def explicit(x, y, ridge, x_seen, y_seen):
    """Affine least squares with ridge: rows sqrt(lambda) I beneath the centred data."""
    mx, my, d = x.mean(0), y.mean(0), x.shape[1]
    lift = ((x - mx).square().sum() / d * ridge).sqrt()
    a = torch.cat([x - mx, lift * torch.eye(d).to(x)])
    b = torch.cat([y - my, torch.zeros(d, y.shape[1]).to(y)])
    w = torch.linalg.lstsq(a, b).solution
    error = (my + (x_seen - mx) @ w - y_seen).square().sum()
    return (error / (y_seen - y_seen.mean(0)).square().sum()).item()


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("held", [False, True])
def test_the_costs_are_those_of_explicit_ridge_regressions(build, ridge, held):
    dense, sparse = build.dense(n_layer=4), build.sparse()
    rng = torch.Generator().manual_seed(2)
    ids, other = torch.randint(0, 23, (2, 40, 6), generator=rng)
    parts = [ids[:7], ids[7:]]  # in pieces of unequal size
    fit = fit_sites(dense, sparse, parts, other.split(16) if held else None, ridge=ridge)
    assert fit.in_sample != held and fit.cost.shape == (9, 5)
    seen = other if held else ids
    rows = lambda model, of: [x.flatten(0, 1).double() for x in model.residuals(of)]  # noqa: E731
    x, y, x_seen, y_seen = (rows(m, of) for of in (ids, seen) for m in (dense, sparse))
    for d in range(9):
        for s in range(5):
            up = explicit(x[d], y[s], ridge, x_seen[d], y_seen[s])
            down = explicit(y[s], x[d], ridge, y_seen[s], x_seen[d])
            assert fit.encoder_fvu[d, s].item() == pytest.approx(up, abs=1e-9)
            assert fit.decoder_fvu[d, s].item() == pytest.approx(down, abs=1e-9)
    totals = [sum(float(fit.cost[p]) for p in m.items()) for m in maps(9, 5)]
    assert fit.total == pytest.approx(min(totals)) and fit.total < fit.even_total
    assert fit.even == even_sites(9, 5)
    assert BridgeConfig.between(dense, sparse, 7, fit.sites).pairs == fit.sites


def test_a_planted_map_is_recovered_and_from_shuffled_text_it_is_not():
    planted = {0: 0, 1: 1, 5: 2, 6: 3}
    tables = 100 + random(8, VOCAB, 6, seed=1)  # far from 0: the maps are affine
    images = torch.stack([tables[d] @ random(6, 9, seed=d) for d in planted])
    images = images + 0.1 * random(4, VOCAB, 9, seed=2)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
    found, shuffled = (
        fit_sites(stub(tables), stub(of), text(60), text(60, seed=1))
        for of in (images, images[:, order])
    )
    assert found.sites == planted != found.even
    assert found.total < 0.1 < 4 < found.even_total
    assert shuffled.sites != planted
    assert shuffled.total > 0.97 * shuffled.even_total > 7.5  # nothing explains anything
    backward = fit_sites(stub(images), stub(tables), text(60), text(60, seed=1))
    assert backward.sites == {s: d for d, s in planted.items()}
    assert torch.allclose(backward.encoder_fvu, found.decoder_fvu.T)


def test_in_sample_fractions_are_too_low():
    x, y = stub(random(3, VOCAB, 20)), stub(random(2, VOCAB, 20, seed=1))
    within = fit_sites(x, y, text(4))
    outside = fit_sites(x, y, text(4), text(4, seed=1))
    assert (within.cost < 1.9).all() and (outside.cost > 2).all()


def test_text_that_decides_nothing_is_refused():
    x, y = stub(random(3, VOCAB, 20)), stub(random(2, VOCAB, 5, seed=1))
    with pytest.raises(ValueError, match="no batch of text"):
        fit_sites(x, y, [])
    with pytest.raises(ValueError, match="no batch of text"):
        fit_sites(x, y, text(4), [])
    with pytest.raises(ValueError, match="10 tokens do not tell apart the 20 channels of dense"):
        fit_sites(x, y, text(1)[:1], ridge=0.0)
    with pytest.raises(ValueError, match="or a residual is constant"):
        fit_sites(x, stub(torch.ones(2, VOCAB, 5)), text(4))


def test_a_sink_at_one_site_changes_nothing_unless_it_is_counted():
    dense, sparse = random(3, VOCAB, 6), random(3, VOCAB, 4, seed=1)
    sparse[1] += dense[1] @ random(6, 4, seed=2)
    sinking = dense.clone()
    sinking[1, 7] *= 100
    ids = [torch.cat([part.flatten(), torch.tensor([7])])[:, None] for part in text(400)]
    free = [part[part != 7][:, None] for part in ids]
    want = fit_sites(stub(dense), stub(sparse), free, outlying=0.0)
    left_out = fit_sites(stub(sinking), stub(sparse), ids)
    torch.testing.assert_close(left_out.cost, want.cost, atol=1e-9, rtol=0)
    counted = fit_sites(stub(sinking), stub(sparse), ids, outlying=0.0)
    assert (counted.decoder_fvu[1] - want.decoder_fvu[1]).abs().max() > 0.05
