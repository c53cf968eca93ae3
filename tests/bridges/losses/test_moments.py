import pytest
import torch

from bridges.losses.moments import Moments, moments_of
from bridges.losses.quantities import nmse


def random(*shape, seed=0, scale=3.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=rng, dtype=dtype)


def test_moments_of_parts_join_to_those_of_the_whole():
    x = random(4, 10, 3) + 100
    whole = Moments.of(x)
    assert (whole.mean - x.mean((0, 1))).abs().max() < 1e-12
    assert whole.spread.item() == pytest.approx((x - whole.mean).square().sum().item(), rel=1e-12)
    parts = [Moments.of(part) for part in (x[:1], x[1:3], x[3:, :4], x[3:, 4:])]
    joined = parts[0].join(parts[1]).join(parts[2].join(parts[3]))
    assert joined.n == 40 and (joined.mean - whole.mean).abs().max() < 1e-12
    assert joined.spread.item() == pytest.approx(whole.spread.item(), rel=1e-12)
    apart = sum(p.spread for p in parts)
    assert apart < 0.99 * whole.spread  # control: parts differ in their means


@pytest.mark.parametrize("by", ["fvu", "per_token", "uncentred"])
def test_with_the_moments_of_the_whole_the_errors_of_parts_add_up(by):
    x, target = random(4, 3, 5), random(4, 3, 5, seed=1) + 2
    (whole,) = moments_of([target])
    parts = sum(nmse(x[i : i + 2], target[i : i + 2], whole, by) for i in (0, 2))
    assert parts.item() == pytest.approx(nmse(x, target, by=by).item(), rel=1e-12)
    alone = sum(nmse(x[i : i + 2], target[i : i + 2], by=by) for i in (0, 2)) / 2
    assert abs(alone - nmse(x, target, by=by)) > 1e-4  # control: ratios of parts are not
