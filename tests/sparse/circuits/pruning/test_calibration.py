import pytest
import torch
from torch.nn import functional as F

from sparse.circuits.pruning.calibration import calibrate, calibrated_nats


def miscalibrated(alpha: float, beta: float, n: int = 20_000) -> torch.Tensor:
    """Logit differences that are right after alpha delta + beta: labels drawn from them."""
    rng = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(8 * n, generator=rng, dtype=torch.float64)
    first = torch.rand(8 * n, generator=rng, dtype=torch.float64) < torch.sigmoid(true)
    delta = (true - beta) / alpha
    return torch.cat([delta[first][:n], delta[~first][:n]]).float()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.25, 1.5), (4.0, -2.0)])
def test_calibration_recovers_a_planted_miscalibration(alpha, beta):
    got = calibrate(miscalibrated(alpha, beta))
    assert got == (pytest.approx(alpha, rel=0.05), pytest.approx(beta, abs=0.05))


def test_calibrated_nats_are_the_loss_that_was_minimised_and_the_identity_is_no_change():
    delta = miscalibrated(0.25, 1.5, n=500)
    n = len(delta) // 2
    plain = torch.cat([F.softplus(-delta[:n]), F.softplus(delta[n:])])
    assert torch.equal(calibrated_nats(delta, 1.0, 0.0), plain)
    best = calibrate(delta)
    least = calibrated_nats(delta, *best).mean()
    for alpha, beta in ((best[0] * 1.1, best[1]), (best[0], best[1] + 0.1), (1.0, 0.0)):
        assert least < calibrated_nats(delta, alpha, beta).mean()
