from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.ops import attention_sink as attention
from sparse.ops.attention_sink import (
    ALL_ATTENTION_FUNCTIONS,
    KERNELS,
    Kernel,
    eager_sink,
    flash_sink,
    kernel_for,
    masked_sink,
    sdpa_sink,
)

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


def test_without_a_mask_one_query_sees_all_keys_and_several_begin_at_the_first():
    q, k, v, sink = inputs(torch.float64)
    want, _ = formula(q, k, v, sink)
    module = torch.nn.Module().eval()
    for at in (slice(-1, None), slice(0, 3), slice(0, 6)):  # as Hugging Face's masks mean None
        got, _ = sdpa_sink(module, q[:, :, at], k, v, None, SCALE, s_aux=sink)
        eager, _ = eager_sink(module, q[:, :, at], k, v, None, SCALE, s_aux=sink)
        theirs, _ = sdpa_sink(module, q[:, :, at], k, v, None, SCALE)  # without sinks
        none, _ = sdpa_sink(module, q[:, :, at], k, v, None, SCALE, s_aux=sink * 0 - torch.inf)
        assert (got.transpose(1, 2) - want[:, :, at]).abs().max() < 1e-12
        assert (eager.transpose(1, 2) - want[:, :, at]).abs().max() < 1e-12
        assert (none - theirs).abs().max() < 1e-12


def test_unpadded_batches_take_the_flash_form_and_padded_ones_the_masked(monkeypatch):
    q, k, v, sink = inputs()
    taken = []
    for name in ("flash_sink", "masked_sink"):
        form = getattr(__import__("sparse.ops.attention_sink", fromlist=[name]), name)
        monkeypatch.setattr(
            f"sparse.ops.attention_sink.{name}", lambda *a, f=form, n=name: taken.append(n) or f(*a)
        )
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    module = torch.nn.Module()
    sdpa_sink(module, q, k, v, None, SCALE, s_aux=sink)
    sdpa_sink(module, q, k, v, mask, SCALE, s_aux=sink)
    sdpa_sink(module, q[:, :, -1:], k, v, None, SCALE, s_aux=sink)
    sdpa_sink(module, q[:, :, :3], k, v, None, SCALE, s_aux=sink)  # a static cache being filled
    assert taken == ["flash_sink", "masked_sink", "masked_sink", "flash_sink"]


def test_the_registry_is_ours_alone():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as THEIRS

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_sink
    assert THEIRS["sdpa"] is not sdpa_sink


class Recorder(TorchDispatchMode):
    """Keep the names of the operators that run and the shape of the largest tensor they return."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], torch.Size()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        shapes = [x.shape for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *shapes], key=lambda shape: shape.numel())
        return out


def model(**changes) -> SparseGPT:
    torch.manual_seed(0)
    small = dict(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    small |= dict(head_dim=4, intermediate_size=32, attention_sinks=True, initializer_range=0.3)
    built = SparseGPT(SparseGPTConfig(**small | changes))
    with torch.no_grad():
        for block in built.model.blocks:
            if block.attn.sinks is not None:
                block.attn.sinks.normal_()
    return built


def trained(module: SparseGPT, ids: torch.Tensor, **call) -> torch.Size:
    """The largest tensor of a training step."""
    with Recorder() as seen:
        module(ids, labels=ids, **call).loss.backward()
    return seen.largest


def test_training_with_sinks_never_makes_a_tensor_of_all_pairs_of_tokens():
    n, batch = 200, 2
    ids = torch.randint(11, (batch, n))
    assert trained(model(), ids).numel() == batch * n * 32  # the widest vectors, those of the MLP
    # controls: the masked form for padded batches, and the form with weights
    real = torch.ones_like(ids)
    real[0, -3:] = 0
    assert trained(model(), ids, attention_mask=real).numel() >= batch * n * n
    assert trained(model(), ids, output_attentions=True).numel() >= batch * n * n


def flash_in_words(padded: bool) -> Kernel:
    """A flash attention by its contract, lse padded with infinities as the efficient kernel's."""

    def forward(q, k, v, scale):
        n = q.shape[2]
        scores = (scale * q @ k.transpose(2, 3)).masked_fill(~torch.ones(n, n).tril().bool(), -1e9)
        lse = scores.logsumexp(-1)
        rows = F.pad(lse, (0, -n % 32), value=torch.inf) if padded else lse
        return (scores - lse.unsqueeze(-1)).exp() @ v, rows, torch.tensor(0), torch.tensor(0)

    def backward(dy, q, k, v, o, lse, scale, seed, offset):
        assert not padded or (
            lse.shape[-1] % 32 == 0 and (lse[..., q.shape[2] :] == torch.inf).all()
        )
        p = (scale * q @ k.transpose(2, 3) - lse[..., : q.shape[2], None]).exp().tril()
        ds = p * (dy @ v.transpose(2, 3) - (dy * o).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ dy

    return Kernel(forward, backward)


@pytest.mark.parametrize("name", ["flash", "efficient"])
@pytest.mark.parametrize("d_head", [5, 8])
def test_any_kernel_that_keeps_the_contract_gives_the_sink(monkeypatch, name, d_head):
    monkeypatch.setitem(KERNELS, name, flash_in_words(padded=name == "efficient"))
    x = inputs(torch.float64, (2, 3, 7, d_head), grad=True)
    want, _ = formula(*x)
    wanted = torch.autograd.grad(want.square().sum(), x)
    monkeypatch.setattr(attention, "kernel_for", lambda q: name)
    got = flash_sink(*x, SCALE)
    assert (got - want).abs().max() < 1e-12
    for a, b in zip(torch.autograd.grad(got.square().sum(), x), wanted, strict=True):
        assert (a - b).abs().max() < 1e-11 and b.abs().max() > 0.01


@pytest.mark.parametrize(
    ("dtype", "d_head", "called"),
    [
        (torch.bfloat16, 16, "flash_attention"),
        (torch.float16, 64, "flash_attention"),
        (torch.float32, 16, "efficient_attention"),
        (torch.bfloat16, 264, "efficient_attention"),
    ],
)
def test_on_cuda_the_kernels_are_called_as_torch_declares_them(dtype, d_head, called):
    """With tensors that have a device and no values: nothing is computed, every call is checked."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, 7, 3, d_head, device="cuda", dtype=dtype).transpose(1, 2)
            for _ in range(3)
        )
        sink, ctx = torch.empty(3, device="cuda"), SimpleNamespace()
        ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
        with Recorder() as seen:
            y = attention._FlashSink.forward(ctx, q, k, v, sink, SCALE, kernel_for(q))
            grads = attention._FlashSink.backward(ctx, torch.empty_like(y))
    names = [name for name in seen.names if "attention" in name]
    assert names == [
        f"_scaled_dot_product_{called}.default",
        f"_scaled_dot_product_{called}_backward.default",
    ]
    for got, like in zip((y, *grads), (q, q, k, v, sink), strict=False):
        assert (got.shape, got.dtype, got.device) == (like.shape, like.dtype, like.device)


def test_where_no_flash_kernel_is_the_masked_form_serves(monkeypatch):
    with FakeTensorMode():
        q = torch.empty(1, 3, 7, 4, device="cuda", dtype=torch.float64)
        assert kernel_for(q) is None
        with pytest.raises(ValueError, match="no flash kernel for torch.float64 on cuda; use mask"):
            flash_sink(q, q, q, torch.empty(3, device="cuda"), SCALE)
    q, k, v, sink = inputs()
    flash, _ = sdpa_sink(None, q, k, v, None, SCALE, s_aux=sink)
    monkeypatch.setattr(attention, "kernel_for", lambda q: None)
    masked, _ = sdpa_sink(None, q, k, v, None, SCALE, s_aux=sink)
    assert torch.equal(masked, masked_sink(q, k, v, None, sink, SCALE))
    assert 0 < (masked - flash).abs().max() < 1e-5


def test_dropout_takes_the_masked_form():
    q, k, v, sink = inputs()
    torch.manual_seed(0)
    got, _ = sdpa_sink(None, q, k, v, None, SCALE, dropout=0.5, s_aux=sink)
    torch.manual_seed(0)
    assert torch.equal(got, masked_sink(q, k, v, None, sink, SCALE, 0.5))
    assert not torch.allclose(got, masked_sink(q, k, v, None, sink, SCALE))


@pytest.mark.parametrize("sinks", [True, False])
def test_the_attention_weights_can_be_asked_for_under_sdpa(sinks):
    module = model(attention_sinks=sinks).eval()
    ids = torch.randint(11, (2, 9))
    real = torch.ones_like(ids)
    real[0, :3] = 0
    for call in ({}, {"attention_mask": real}):
        assert module.config._attn_implementation == "sdpa"
        plain, asked = module(ids, **call), module(ids, output_attentions=True, **call)
        module.set_attn_implementation("eager")
        eager = module(ids, output_attentions=True, **call)
        module.set_attn_implementation("sdpa")
        shown = call.get("attention_mask", torch.ones_like(ids)).bool()
        assert (asked.logits - plain.logits)[shown].abs().max() < 1e-5
        assert plain.attentions is None and len(asked.attentions) == 2
        for a, b in zip(asked.attentions, eager.attentions, strict=True):
            assert a.shape == (2, 2, 9, 9) and (a - b).abs().max() < 1e-6
            total = a.sum(-1).transpose(1, 2)[shown]
            assert (total < 0.999).all() if sinks else (total - 1).abs().max() < 1e-5


def test_under_autocast_attention_is_fed_bfloat16_and_masters_stay_float32(monkeypatch):
    fed = []
    real = attention.flash_sink
    monkeypatch.setattr(attention, "flash_sink", lambda *x: fed.append(x) or real(*x))
    module, ids = model(), torch.randint(11, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(ids, labels=ids).loss
    loss.backward()
    assert len(fed) == 2
    assert {x.dtype for call in fed for x in call[:3]} == {torch.bfloat16}
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    exact = model()
    exact(ids, labels=ids).loss.backward()
    for p, q in zip(module.parameters(), exact.parameters(), strict=True):
        if p.ndim > 1:
            assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_head", [5, 16, 64])
def test_on_a_gpu_flash_is_the_formula_forward_and_backward(dtype, d_head):
    x = [t.to("cuda", dtype) for t in inputs(torch.float64, (2, 3, 77, d_head))]
    scale = d_head**-0.5
    exact = [t.double().requires_grad_() for t in x]
    got = [t.detach().requires_grad_() for t in x]
    want = masked_sink(*exact[:3], None, exact[3], scale).transpose(1, 2)
    y = flash_sink(*got, scale)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (y - want).abs().max() < tolerance * want.abs().max()
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    (y.double() * weight).sum().backward()
    for a, b in zip(got, exact, strict=True):
        assert (a.grad - b.grad).abs().max() < tolerance * b.grad.abs().max()
