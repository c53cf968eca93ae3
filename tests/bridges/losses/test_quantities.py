import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from bridges.losses.moments import moments_of
from bridges.losses.quantities import ce_nats, kl_nats, log_probs, nmse


def random(*shape, seed=0, scale=3.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=rng, dtype=dtype)


def test_kl_is_that_of_torch_distributions_at_every_position():
    p, q = random(2, 5, 11), random(2, 5, 11, seed=1)
    want = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    assert kl_nats(p, q).shape == (2, 5)
    assert (kl_nats(p, q) - want).abs().max() < 1e-12
    swapped = kl_divergence(Categorical(logits=q), Categorical(logits=p))
    assert (kl_nats(p, q) - swapped).abs().max() > 0.1  # control: the direction matters


def test_kl_is_zero_for_equal_logits_up_to_a_shift_and_positive_otherwise():
    p = random(4, 9)
    assert kl_nats(p, p + 5).abs().max() < 1e-12
    assert (kl_nats(p, random(4, 9, seed=2)) > 0).all()


def test_kl_takes_log_probabilities_as_it_takes_logits():
    p, q = random(3, 8), random(3, 8, seed=1)
    want = kl_nats(p, q)
    assert torch.allclose(kl_nats(p.log_softmax(-1), q.log_softmax(-1)), want, atol=1e-12)


def test_the_gradient_in_closed_form_is_that_of_autograd():
    p, weight = random(2, 3, 7), random(2, 3, seed=5)
    grads = []
    for how in (
        kl_nats,
        lambda p, q: (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1),
    ):
        q = random(2, 3, 7, seed=1).requires_grad_()
        (how(p, q) * weight).sum().backward()
        grads.append(q.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-12 and grads[0].abs().max() > 0.1
    leaf = random(2, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: kl_nats(p[0, :2], q), leaf)


def test_no_gradient_reaches_the_target():
    p, q = random(3, 7).requires_grad_(), random(3, 7, seed=1).requires_grad_()
    kl_nats(p, q).sum().backward()
    assert p.grad is None and q.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    p, q = random(3, 500).to(dtype), random(3, 500, seed=1).to(dtype).requires_grad_()
    got = kl_nats(p, q)
    want = kl_nats(p.double(), q.detach().double())
    assert got.dtype == log_probs(p).dtype == torch.float32
    assert (got - want).abs().max() < 1e-5
    got.sum().backward()
    assert q.grad.dtype == dtype


def test_cross_entropy_is_that_of_torch_at_the_predicted_positions():
    logits = random(3, 6, 9)
    ids = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(2))
    want = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert ce_nats(logits, ids).shape == (3, 5)
    assert torch.allclose(ce_nats(logits, ids), want, atol=1e-12)
    moved = logits.clone()
    moved[:, -1] += random(9)
    assert torch.equal(ce_nats(moved, ids), ce_nats(logits, ids)), "the last has no next token"


def test_nmse_is_the_ratio_of_sums():
    x, target = random(2, 4, 5).float(), random(2, 4, 5, seed=1).float()
    above = sum((x[b, t] - target[b, t]).square().sum() for b in range(2) for t in range(4))
    mean = sum(target[b, t] for b in range(2) for t in range(4)) / 8
    below = sum((target[b, t] - mean).square().sum() for b in range(2) for t in range(4))
    assert nmse(x, target).item() == pytest.approx((above / below).item(), rel=1e-5)
    per_token = ((x - target).square().sum(-1) / (target - mean).square().sum(-1)).mean()
    assert abs(nmse(x, target) - per_token) > 0.05  # control: definition B is another number


def test_nmse_is_zero_when_perfect_and_one_at_the_mean():
    target = random(3, 4, 5).float()
    assert nmse(target, target) == 0
    mean = target.mean((0, 1)).expand_as(target)
    assert nmse(mean, target).item() == pytest.approx(1, abs=1e-6)


def test_nmse_does_not_feel_a_shift_or_a_scale_of_both():
    x, target = random(3, 4, 5).float(), random(3, 4, 5, seed=1).float()
    moved = nmse(7 * x + random(5).float(), 7 * target + random(5).float())
    assert moved.item() == pytest.approx(nmse(x, target).item(), rel=1e-4)


def test_the_target_cannot_lower_its_nmse_by_growing():
    x, target = random(3, 4, 5).float(), random(3, 4, 5, seed=1).float().requires_grad_()
    nmse(x, target).backward()
    flat = target.detach().flatten(0, 1)
    below = (flat - flat.mean(0)).square().sum()
    assert torch.allclose(target.grad, 2 * (target.detach() - x) / below, atol=1e-6)
    # control: with the denominator in the graph the gradient would be another
    free = target.detach().clone().requires_grad_()
    spread = (free - free.mean((0, 1))).square().sum()
    ((x - free).square().sum() / spread).backward()
    assert (free.grad - target.grad).abs().max() > 0.01


def definitions(x, target):
    """A, B and C as loops over the tokens."""
    tokens = list(zip(x.flatten(0, 1), target.flatten(0, 1), strict=True))
    mean = sum(h for _, h in tokens) / len(tokens)
    errors = [(a - h).square().sum() for a, h in tokens]
    around = [(h - mean).square().sum() for _, h in tokens]
    each = [e / v for e, v in zip(errors, around, strict=True)]
    return {
        "fvu": sum(errors) / sum(around),
        "per_token": sum(each) / len(each),
        "uncentred": sum(errors) / sum(h.square().sum() for _, h in tokens),
    }


def test_each_definition_of_the_nmse_is_its_equation():
    x, target = random(2, 4, 5), random(2, 4, 5, seed=1)
    want = definitions(x, target)
    for by, value in want.items():
        assert nmse(x, target, by=by).item() == pytest.approx(value.item(), rel=1e-6), by
    values = sorted(v.item() for v in want.values())
    assert values[1] - values[0] > 0.01 and values[2] - values[1] > 0.01  # control: three numbers


@pytest.mark.parametrize("by", ["fvu", "per_token", "uncentred"])
def test_no_definition_lets_the_target_grow(by):
    x, target = random(2, 4, 5), random(2, 4, 5, seed=1).requires_grad_()
    nmse(x, target, by=by).backward()
    fixed = target.detach()
    (whole,) = moments_of([fixed])
    free = fixed.clone().requires_grad_()
    away = (fixed - whole.mean).square().sum(-1) * whole.n
    below = {"fvu": whole.spread, "per_token": away, "uncentred": fixed.square().sum()}[by]
    ((x - free).square().sum(-1) / below).sum().backward()
    assert torch.allclose(target.grad, free.grad, rtol=1e-6)
