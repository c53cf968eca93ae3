"""Laws of empty controls: rotations are uniform, lengths are kept, a mixed decoder is as wide."""

import pytest
import torch

from evals.scores.controls import of_length, rotated, rotation


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d", [2, 16, 128])
def test_a_rotation_is_orthogonal_and_drawn_by_its_seed(d):
    r = rotation(d, 0)
    torch.testing.assert_close(r @ r.T, torch.eye(d), atol=1e-5, rtol=0)
    assert torch.equal(r, rotation(d, 0)) and not torch.allclose(r, rotation(d, 1))


def test_rotations_are_uniform():
    """Every entry has mean 0 and mean square 1 / d, the diagonal too: a plain QR favours it."""
    d, n = 8, 1500
    drawn = torch.stack([rotation(d, seed) for seed in range(n)])
    error = (1 / d / n) ** 0.5
    assert drawn.mean(0).abs().max() < 4.5 * error
    torch.testing.assert_close(drawn.square().mean(0), torch.full((d, d), 1 / d), atol=0.02, rtol=0)
    assert abs(float(drawn.diagonal(dim1=1, dim2=2).mean())) < 4 * error / d**0.5
    plain = torch.stack([torch.linalg.qr(normal(seed, d, d))[0] for seed in range(300)])
    assert plain.mean(0).abs().max() > 4.5 * (1 / d / 300) ** 0.5  # control


def test_a_rotated_delta_keeps_all_inner_products_and_nothing_of_its_direction():
    delta = normal(0, 3, 5, 128)
    turned = rotated(delta, 3)
    a, b = delta.flatten(0, 1), turned.flatten(0, 1)
    torch.testing.assert_close(b @ b.T, a @ a.T, atol=1e-3, rtol=1e-4)
    assert torch.cosine_similarity(a, b, dim=-1).abs().max() < 0.4
    alone = torch.stack([rotated(x[None, None], i)[0, 0] for i, x in enumerate(a)])
    assert not torch.allclose(alone @ alone.T, a @ a.T, atol=1.0)  # control: one each


@pytest.mark.parametrize("d_sparse", [24, 64])
def test_a_decoder_of_mixed_channels_has_the_same_covariance(d_sparse):
    """D' = D R writes, for changes of equal size in all directions, the same covariance."""
    decoder, r = normal(0, 16, d_sparse), rotation(d_sparse, 5)
    mixed = decoder @ r
    torch.testing.assert_close(mixed @ mixed.T, decoder @ decoder.T, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed, decoder, atol=0.5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    permuted = decoder[order]  # control: outputs in another order have another covariance
    assert not torch.allclose(permuted @ permuted.T, decoder @ decoder.T, atol=1.0)


def test_a_delta_gets_the_length_of_another_at_every_token_and_keeps_its_direction():
    delta, like = normal(0, 4, 6, 16), normal(1, 4, 6, 16) * normal(2, 4, 6, 1).exp()
    made = of_length(delta, like)
    torch.testing.assert_close(made.norm(dim=-1), like.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(made, delta, dim=-1), torch.ones(4, 6))
    assert not torch.allclose(delta.norm(dim=-1), like.norm(dim=-1), rtol=0.1)  # control


def test_zero_stays_zero_whichever_of_the_two_it_is():
    delta, like = normal(0, 2, 5, 8), normal(1, 2, 5, 8)
    delta[0, 1], like[1, 2] = 0, 0
    made = of_length(delta, like)
    assert torch.equal(made[0, 1], torch.zeros(8)) and torch.equal(made[1, 2], torch.zeros(8))
    assert made.isfinite().all() and (made.norm(dim=-1) > 0).sum() == 8


def test_a_very_small_delta_still_gets_the_full_length():
    delta, like = 1e-6 * normal(0, 2, 5, 8), normal(1, 2, 5, 8)
    torch.testing.assert_close(of_length(delta, like).norm(dim=-1), like.norm(dim=-1))
