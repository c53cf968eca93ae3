import torch

from sparse.circuits.mask import masked, straight_through
from sparse.circuits.taps import recorded


def random_ids(n: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))


def filled(model, value: float) -> dict[str, torch.Tensor]:
    return {at: torch.full((width,), value) for at, width in model.node_widths().items()}


def test_a_mask_of_ones_is_the_model_bit_for_bit(small):
    ids = random_ids()
    clean = small(ids).logits
    with masked(small, filled(small, 1.0), filled(small, 3.0)):
        assert torch.equal(small(ids).logits, clean)
    with masked(small, {}, {}):
        assert torch.equal(small(ids).logits, clean)


def test_a_mask_of_zeros_sees_only_the_current_token_and_position(small):
    ids, other = random_ids(seed=1), random_ids(seed=2)
    other[:, -1] = ids[:, -1]
    with masked(small, filled(small, 0.0), filled(small, 0.7)):
        one, two = small(ids).logits, small(other).logits
    assert torch.equal(one[:, -1], two[:, -1])
    assert not torch.equal(one[:, 0], two[:, 0])  # the embedding and the bigram table remain


def test_control_the_open_model_sees_the_earlier_tokens(small):
    ids, other = random_ids(seed=1), random_ids(seed=2)
    other[:, -1] = ids[:, -1]
    assert not torch.allclose(small(ids).logits[:, -1], small(other).logits[:, -1])


def test_a_mask_holds_exactly_the_nodes_it_names(small):
    keep = {"1.mlp.post_act": torch.arange(32) % 3 > 0}
    ablation = {"1.mlp.post_act": torch.randn(32)}
    ids = random_ids()
    with recorded(small, ["1.mlp.post_act"]) as before:
        small(ids)
    with masked(small, keep, ablation), recorded(small, ["1.mlp.post_act"]) as after:
        small(ids)
    m = keep["1.mlp.post_act"]
    was, now = before["1.mlp.post_act"], after["1.mlp.post_act"]
    assert torch.equal(now[..., m], was[..., m])
    assert torch.equal(now[..., ~m], ablation["1.mlp.post_act"][~m].expand_as(now[..., ~m]))


def test_the_straight_through_gradient_equals_its_formula():
    tau = torch.tensor([-1.0, -0.2, 0.0, 0.3, 1.0], requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0])
    for theta in (0.1, 0.5, 2.0):
        m = straight_through(tau, theta)
        assert m.tolist() == [0, 0, 1, 1, 1]
        (grad,) = torch.autograd.grad((m * weight).sum(), tau)
        z = (tau.detach() / theta).requires_grad_()
        (slope,) = torch.autograd.grad(torch.sigmoid(z).sum(), z)
        torch.testing.assert_close(grad, weight * slope / theta)


def test_the_gradient_of_a_mask_is_that_of_the_blend(small):
    """d loss / dm by autograd against a finite difference of the same blend m x + (1 - m) mu."""
    small.double()
    ids, at = random_ids(), "0.mlp.post_act"
    mu = torch.randn(32, dtype=torch.float64)

    def loss(m):
        with masked(small, {at: m}, {at: mu}):
            return small(ids).logits.square().mean()

    m = torch.rand(32, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(loss(m), m)
    eps, bump = 1e-6, torch.zeros(32, dtype=torch.float64)
    bump[int(grad.abs().argmax())] = 1e-6
    slope = (loss(m + bump) - loss(m - bump)) / (2 * eps)
    torch.testing.assert_close(slope, grad[bump > 0].squeeze(), rtol=1e-4, atol=1e-8)
