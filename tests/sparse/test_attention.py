import pytest
import torch
import torch.nn.functional as F

from sparse.attention import ALL_ATTENTION_FUNCTIONS, eager_sink, flash_sink, masked_sink, sdpa_sink

SHAPE = (2, 3, 7, 4)  # batch n_head pos d_head
SCALE = 0.5


def inputs(dtype=torch.float32, shape=SHAPE, grad=False):
    rng = torch.Generator().manual_seed(0)
    qkv = [torch.randn(*shape, generator=rng, dtype=torch.float64) * 2 for _ in range(3)]
    sink = torch.randn(shape[1], generator=rng, dtype=torch.float64)
    return [x.to(dtype).requires_grad_(grad) for x in (*qkv, sink)]


def formula(q, k, v, sink, allowed=None):
    """A_tu = exp(s_tu) / (exp(b) + sum over w <= t of exp(s_tw)), written with loops."""
    weights = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = [u for u in range(t + 1) if allowed is None or allowed[b, u]]
        if not seen:
            continue
        scores = torch.stack([(SCALE * (q[b, h, t] * k[b, h, u]).sum()).exp() for u in seen])
        weights[b, h, t, seen] = scores / (sink[h].exp() + scores.sum())
    return weights @ v, weights


def three_forms(q, k, v, sink, mask=None):
    module = torch.nn.Module().eval()
    masked = masked_sink(q, k, v, mask, sink, SCALE).transpose(1, 2)
    eager = eager_sink(module, q, k, v, mask, SCALE, s_aux=sink)[0].transpose(1, 2)
    return {"masked": masked, "eager": eager} | (
        {"flash": flash_sink(q, k, v, sink, SCALE)} if mask is None else {}
    )


def test_all_three_forms_are_the_formula():
    q, k, v, sink = inputs(torch.float64)
    want, _ = formula(q, k, v, sink)
    for name, got in three_forms(q, k, v, sink).items():
        assert (got - want).abs().max() < 1e-12, name
    without, _ = formula(q, k, v, torch.full_like(sink, -torch.inf))
    assert (without - want).abs().max() > 0.1  # control: the sink matters here


def test_in_float32_the_three_forms_agree_within_1e_5():
    # longer than the flash kernel's blocks, so that its bookkeeping is in play
    q, k, v, sink = inputs(shape=(1, 2, 700, 16))
    forms = three_forms(q, k, v, sink)
    assert max((a - b).abs().max() for a in forms.values() for b in forms.values()) < 1e-5


def test_the_weights_of_a_row_sum_to_one_less_the_share_of_the_sink():
    q, k, v, sink = inputs(torch.float64)
    _, weights = eager_sink(torch.nn.Module().eval(), q, k, v, None, SCALE, s_aux=sink)
    scores = (SCALE * q @ k.transpose(2, 3)).exp().tril().sum(-1)
    share = sink.exp().view(1, -1, 1) / (sink.exp().view(1, -1, 1) + scores)
    assert torch.allclose(weights.sum(-1), 1 - share, atol=1e-12)
    assert torch.allclose(weights, formula(q, k, v, sink)[1], atol=1e-12)
    assert torch.equal(weights, weights.tril())


@pytest.mark.parametrize("never", [-1e4, -torch.inf])
def test_a_sink_at_minus_infinity_is_plain_causal_attention(never):
    q, k, v, sink = inputs()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    for name, got in three_forms(q, k, v, torch.full_like(sink, never)).items():
        assert (got - plain).abs().max() < 1e-6, name


def test_without_sinks_it_is_plain_causal_attention():
    q, k, v, _ = inputs()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    module = torch.nn.Module().eval()
    module.is_causal = True
    assert torch.equal(sdpa_sink(module, q, k, v, None, SCALE)[0].transpose(1, 2), plain)
    eager, _ = eager_sink(module, q, k, v, None, SCALE)
    assert (eager.transpose(1, 2) - plain).abs().max() < 1e-6


def test_a_sink_at_plus_infinity_silences_the_head():
    q, k, v, sink = inputs()
    for got in three_forms(q, k, v, torch.full_like(sink, 1e4)).values():
        assert got.abs().max() == 0


def test_flash_is_differentiated_rightly_in_every_input():
    assert torch.autograd.gradcheck(
        lambda *x: flash_sink(*x, SCALE), inputs(torch.float64, (1, 2, 5, 4), grad=True)
    )


def test_the_three_forms_have_the_same_gradients():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = {}
    for name in ("flash", "masked", "eager"):
        x = inputs(torch.float64, grad=True)
        (three_forms(*x)[name] * weight).sum().backward()
        grads[name] = [leaf.grad for leaf in x]
    for name in ("flash", "masked"):
        for got, want in zip(grads[name], grads["eager"], strict=True):
            assert (got - want).abs().max() < 1e-12 and want.abs().max() > 0.01


def test_the_gradient_of_a_float32_sink_is_float32_under_bfloat16_inputs():
    q, k, v, sink = inputs()
    half = [x.bfloat16() for x in (q, k, v)]
    exact = sink.double().requires_grad_()
    flash_sink(*(x.double() for x in half), exact, SCALE).sum().backward()
    sink.requires_grad_()
    flash_sink(*half, sink, SCALE).sum().backward()
    assert sink.grad.dtype == torch.float32
    assert (sink.grad - exact.grad).abs().max() < 0.02 * exact.grad.abs().max()


def test_padded_positions_are_not_attended_to():
    q, k, v, sink = inputs(torch.float64)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, :3] = False
    want, _ = formula(q, k, v, sink, allowed=real)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = causal[None, None] & real[:, None, None]
    added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    for form in (mask, added):
        for name, got in three_forms(q, k, v, sink, form).items():
            shown = real[:, None, :, None].expand_as(got)
            assert (got - want)[shown].abs().max() < 1e-12, name
            # a row that may attend to nothing leaves everything to the sink
            assert got[0, :, :3].abs().max() == 0, name
    assert (want - formula(q, k, v, sink)[0]).abs().max() > 0.1


def test_fewer_queries_than_keys_are_the_last_ones():
    q, k, v, sink = inputs(torch.float64)
    want, _ = formula(q, k, v, sink)
    module = torch.nn.Module().eval()
    for n in (1, 3):
        got, _ = sdpa_sink(module, q[:, :, -n:], k, v, None, SCALE, s_aux=sink)
        eager, _ = eager_sink(module, q[:, :, -n:], k, v, None, SCALE, s_aux=sink)
        assert (got.transpose(1, 2) - want[:, :, -n:]).abs().max() < 1e-12
        assert (eager.transpose(1, 2) - want[:, :, -n:]).abs().max() < 1e-12


def test_unpadded_batches_take_the_flash_form_and_padded_ones_the_masked(monkeypatch):
    q, k, v, sink = inputs()
    taken = []
    for name in ("flash_sink", "masked_sink"):
        form = getattr(__import__("sparse.attention", fromlist=[name]), name)
        monkeypatch.setattr(
            f"sparse.attention.{name}", lambda *a, f=form, n=name: taken.append(n) or f(*a)
        )
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    module = torch.nn.Module()
    sdpa_sink(module, q, k, v, None, SCALE, s_aux=sink)
    sdpa_sink(module, q, k, v, mask, SCALE, s_aux=sink)
    sdpa_sink(module, q[:, :, -1:], k, v, None, SCALE, s_aux=sink)
    assert taken == ["flash_sink", "masked_sink", "masked_sink"]


def test_the_registry_is_ours_alone():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as THEIRS

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_sink
    assert THEIRS["sdpa"] is not sdpa_sink
