import pytest
import torch
import torch.nn.functional as F

from bridges.losses.chunked import CHUNK, Stream, score_streams
from bridges.losses.quantities import kl_nats, log_probs


def random(*shape, seed=0, scale=3.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=rng, dtype=dtype)


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


def test_a_stream_that_nothing_weighs_costs_nothing_and_has_no_gradient():
    head, h = random(VOCAB, WIDTH), random(2, TOKENS, WIDTH).requires_grad_()
    ids = torch.zeros(TOKENS, dtype=torch.long)
    tail = lambda x, _: x @ head.T  # noqa: E731
    (a,) = score_streams(Stream(tail, h[:1]), [Stream(tail, h)], ids, ids, VOCAB)
    (a.kl + a.ce).backward()
    assert a.kl == a.ce == 0 and h.grad is not None and not h.grad.any()


def test_under_autocast_the_kl_is_that_of_the_rounded_logits_and_is_not_rounded_again(scene):
    """Both models compute in bfloat16; what is made of their logits is made in float32."""
    heads = [random(VOCAB, WIDTH, seed=n).float() / 8 for n in (0, 1)]
    target, h = (random(1, TOKENS, WIDTH, seed=n).float() for n in (1, 2))
    p = (target[0].bfloat16() @ heads[0].bfloat16().T).float()
    q = (h[0].bfloat16() @ heads[1].bfloat16().T).float()
    want = kl_nats(p, q).mean()
    with torch.autocast("cpu", torch.bfloat16):
        tails = [lambda x, _, w=w: x @ w.T for w in heads]
        (found,) = score_streams(
            Stream(tails[0], target), [Stream(tails[1], h, kl=1.0)], scene[4], scene[5], VOCAB
        )
        again = kl_nats(p, q).mean()
        rounded = torch.einsum("tv,tv->t", log_probs(p).exp(), log_probs(p) - log_probs(q)).mean()
    assert abs(found.kl - want) < 1e-5 * want and abs(again - want) < 1e-6 * want
    assert abs(rounded - want) > 1e-4 * want  # control: a product under autocast
