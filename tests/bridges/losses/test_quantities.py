import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from bridges.losses.chunked import CHUNK, Stream, score_streams
from bridges.losses.moments import Moments, moments_of
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


VOCAB, WIDTH, TOKENS = 13, 5, 12


class Tail:
    """The end of a model with a norm's gain, a biased head, a table by token and a soft cap."""

    def __init__(self, seed=0):
        shapes = ((WIDTH,), (VOCAB, WIDTH), (VOCAB,), (VOCAB, VOCAB))
        self.params = [random(*s, seed=seed + i, scale=1.0) for i, s in enumerate(shapes)]
        self.params = [p.requires_grad_() for p in self.params]
        self.largest = 0

    def __call__(self, h, ids):
        gain, head, bias, table = self.params
        logits = F.layer_norm(h, h.shape[-1:]) * gain @ head.T + bias + table[ids]
        self.largest = max(self.largest, logits.numel())
        return 4 * torch.tanh(logits / 4)


@pytest.fixture
def scene():
    """Two models' ends, a target, three streams of all tokens and two of the first seven."""
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1)
    labels[[3, TOKENS - 1]] = -1
    hs = [random(n, t, WIDTH, seed=9 + n).requires_grad_() for n, t in ((3, TOKENS), (2, 7))]
    return Tail(), Tail(seed=50), random(1, TOKENS, WIDTH, seed=4), hs, ids, labels


def scored(scene, params=True):
    dense, sparse, target, (main, some), ids, labels = scene
    ends = [Stream(sparse, main, kl=0.7, ce=0.4), Stream(dense, some, kl=2.0)]
    params = sparse.params if params else ()
    a, b = score_streams(Stream(dense, target), ends, ids, labels, VOCAB, params)
    return {"kl": a.kl, "ce": a.ce, "hybrid": b.kl}, (a.per_stream, b.per_stream)


def plainly(scene):
    dense, sparse, target, (main, some), ids, labels = scene
    y = dense(target, ids)[0]
    logits, hybrid = sparse(main, ids), dense(some, ids[:7])
    nll = -logits.log_softmax(-1)[:, labels >= 0]
    ce = nll.gather(-1, labels[labels >= 0].expand(3, -1).unsqueeze(-1)).mean()
    kl, far = kl_nats(y.expand(3, -1, -1), logits), kl_nats(y[:7].expand(2, -1, -1), hybrid)
    terms = {"kl": 0.7 * kl.mean(), "ce": 0.4 * ce, "hybrid": 2 * far.mean()}
    return terms, (kl.mean(-1), far.mean(-1))


@pytest.mark.parametrize("chunk", [1, 2 * VOCAB, 7 * VOCAB, CHUNK])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 3), (0, 1, 0), (0, 0, 1)])
def test_scores_in_chunks_are_kl_and_ce_in_value_and_gradient(scene, chunk, weights, monkeypatch):
    monkeypatch.setattr("bridges.losses.chunked.CHUNK", chunk)
    monkeypatch.setattr("bridges.losses.chunked.MIN_ROWS", 1)
    (got, streams), (want, want_streams) = scored(scene), plainly(scene)
    for term, value in want.items():
        assert (got[term] - value).abs() < 1e-12, term
    for mine, theirs in zip(streams, want_streams, strict=True):
        assert (mine - theirs).abs().max() < 1e-12 and not mine.requires_grad
    leaves = [*scene[3], *scene[1].params]
    grads = []
    for terms in (got, want):
        total = sum(w * x for w, x in zip(weights, terms.values(), strict=True) if w)
        if set(weights) == {1}:
            total = torch.stack(list(terms.values())).sum()
        parts = torch.autograd.grad(total, leaves, allow_unused=True)
        zeros = map(torch.zeros_like, leaves)
        grads.append([z if g is None else g for g, z in zip(parts, zeros, strict=True)])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 1e-12
    assert max(g.abs().max() for g in grads[0]) > 0.01


def test_no_more_logits_exist_at_once_than_a_chunk(scene, monkeypatch):
    monkeypatch.setattr("bridges.losses.chunked.CHUNK", 6 * VOCAB)
    monkeypatch.setattr("bridges.losses.chunked.MIN_ROWS", 1)
    scored(scene)
    assert scene[0].largest <= 6 * VOCAB and scene[1].largest == 6 * VOCAB
    plainly(scene)
    assert scene[1].largest == 3 * TOKENS * VOCAB  # control


def test_the_sum_is_formed_once_and_what_is_weighted_anew_is_swept_again(scene):
    dense, sparse, *_ = scene
    calls = []
    real = Tail.__call__
    counting = lambda self, h, ids: calls.append(self) or real(self, h, ids)  # noqa: E731
    Tail.__call__ = counting
    try:
        terms, _ = scored(scene)
        n = len(calls)
        torch.stack(list(terms.values())).sum().backward(retain_graph=True)
        assert len(calls) == n == 3  # the target, and each of the two streams
        sum(terms.values()).backward(retain_graph=True)
        assert len(calls) == n
        (terms["kl"] + 2 * terms["ce"]).backward()
        assert len(calls) == 2 * n
    finally:
        Tail.__call__ = real


def test_without_gradients_none_are_formed(scene):
    with torch.no_grad():
        terms, _ = scored(scene)
    assert not any(x.requires_grad for x in terms.values())
    terms, _ = scored(scene, params=False)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in scene[1].params) and scene[3][0].grad is not None


def test_under_autocast_both_ways_to_the_gradient_are_one(scene):
    head = random(VOCAB, WIDTH).float().requires_grad_()
    h, target = (random(n, TOKENS, WIDTH, seed=n).float().requires_grad_() for n in (2, 1))
    ids, labels = scene[4], scene[5]

    def gradient(*weights):
        seen = []

        def tail(h, ids):
            seen.append((h @ head.T).dtype)
            return h @ head.T

        with torch.autocast("cpu", torch.bfloat16):
            (a,) = score_streams(
                Stream(tail, target), [Stream(tail, h, kl=1.0, ce=1.0)], ids, labels, VOCAB, [head]
            )
        total = a.kl + a.ce
        if weights != (1.0, 1.0):
            total = weights[0] * a.kl + weights[1] * a.ce
        grads = torch.autograd.grad(total, [h, head])
        assert set(seen) == {torch.bfloat16} and a.kl.dtype == torch.float32
        return grads

    both = gradient(1.0, 1.0)
    apart = [a + b for a, b in zip(gradient(1.0, 0.0), gradient(0.0, 1.0), strict=True)]
    for x, y in zip(both, apart, strict=True):
        assert (x - y).abs().max() < 0.02 * y.abs().max()  # bfloat16 rounds to 1/256


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
def test_with_the_moments_of_the_whole_the_errors_of_parts_add_up(by):
    x, target = random(4, 3, 5), random(4, 3, 5, seed=1) + 2
    (whole,) = moments_of([target])
    parts = sum(nmse(x[i : i + 2], target[i : i + 2], whole, by) for i in (0, 2))
    assert parts.item() == pytest.approx(nmse(x, target, by=by).item(), rel=1e-12)
    alone = sum(nmse(x[i : i + 2], target[i : i + 2], by=by) for i in (0, 2)) / 2
    assert abs(alone - nmse(x, target, by=by)) > 1e-4  # control: ratios of parts are not


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
