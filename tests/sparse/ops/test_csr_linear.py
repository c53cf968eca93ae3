from copy import deepcopy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse.ops import csr_linear
from sparse.ops.csr_linear import Products, csr_products, fastest_products

COMPRESSED = [
    "scipy",
    pytest.param("mkl", marks=pytest.mark.skipif(fastest_products() != "mkl", reason="no MKL")),
]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-14}  # rounding of sums of about 10 terms


def sparse_linear(out=40, width=64, density=0.08, bias=True, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, width, generator=rng))
        layer.weight.masked_fill_(torch.rand(out, width, generator=rng) >= density, 0.0)
        layer.weight[3], layer.weight[:, 5] = 0.0, -0.0  # a dead row; zeros of both signs
    return layer


def run(layer, x, g):
    """Output, and the gradients of the input, the weight and the bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], g)


def is_compressed(y):
    return type(y.grad_fn).__name__ == "_LinearBackward"


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 7, 64), (0, 64), (2, 300, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("products", COMPRESSED)
def test_output_and_gradients_are_those_of_the_dense_product(dtype, shape, bias, products):
    layer = sparse_linear(bias=bias, dtype=dtype)
    x, g = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 40, dtype=dtype)
    x[..., ::7], g[..., 2:5] = 1.0, 0.0  # ties, and zeros of both signs
    x[..., 1::7] *= 0.0
    want = run(layer, x, g)
    with csr_products(layer, products=products) as names:
        got = run(layer, x, g)
    assert names == ("",) and is_compressed(got[0]) and not is_compressed(want[0])
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        assert b.numel() == 0 or close(a, b, EXACT[dtype])


@pytest.mark.parametrize("products", COMPRESSED)
def test_control_another_weight_in_one_place_is_seen(products):
    layer, x = sparse_linear(), torch.randn(9, 64)
    other = deepcopy(layer)
    with torch.no_grad():
        i, j = other.weight.nonzero()[7]
        other.weight[i, j] *= 1.0001
    with torch.no_grad(), csr_products(other, products=products):
        y = other(x)
    assert not close(y, layer(x), EXACT[torch.float32]) and close(y, layer(x), 1e-3)


@pytest.mark.parametrize("products", COMPRESSED)
def test_the_gradient_is_the_derivative(products):
    layer = sparse_linear(out=5, width=6, density=0.11, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with csr_products(layer, products=products) as names:
        assert names and torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("products", COMPRESSED)
def test_a_weight_of_zeros_alone_gives_the_bias_and_the_whole_gradient(products):
    layer, x, g = sparse_linear(), torch.randn(5, 64), torch.randn(5, 40)
    nn.init.zeros_(layer.weight)
    want = run(layer, x, g)
    with csr_products(layer, products=products) as names:
        got = run(layer, x, g)
    assert names == ("",) and want[2].abs().min() > 0
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_dense_products_compress_nothing():
    layer, x, g = sparse_linear(), torch.randn(5, 64), torch.randn(5, 40)
    with csr_products(layer, products="dense") as names:
        got = run(layer, x, g)
    assert names == () and all(map(torch.equal, got, run(layer, x, g)))


def test_a_torch_without_the_libraries_takes_scipy_and_refuses_mkl_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fastest_products() == "scipy"
    with pytest.raises(ValueError, match='"mkl", but this torch .* take "scipy" or "dense"'):
        with csr_products(sparse_linear(), products="mkl"):
            pass
    with csr_products(nn.Linear(8, 8), products="mkl") as names:  # control: none is sparse
        assert names == ()


def test_every_compressed_kind_of_products_has_its_library():
    assert {*csr_linear._LIBRARIES, "dense"} == {*get_args(Products)}


def test_only_sparse_weights_of_linears_are_compressed():
    at_the_limit = nn.Linear(64, 8)
    with torch.no_grad():
        at_the_limit.weight.fill_(1.0).view(-1)[64:] = 0.0
    model = nn.ModuleDict(
        {
            "sparse": sparse_linear(width=64),
            "full": nn.Linear(64, 8),
            "limit": at_the_limit,
            "empty": nn.Linear(64, 8),
            "lower": sparse_linear().to(torch.bfloat16),
            "meta": nn.Linear(64, 8, device="meta"),
            "table": nn.Embedding.from_pretrained(sparse_linear().weight.detach()),
        }
    )
    nn.init.zeros_(model["empty"].weight)  # pyright: ignore
    x = torch.randn(5, 64)
    want = {name: model[name](x) for name in ("full", "limit", "empty")}
    with csr_products(model) as names:
        assert names == ("sparse", "empty")
        for name, y in want.items():
            assert torch.equal(model[name](x), y)
            assert is_compressed(model[name](x)) == (name in names)
        assert not is_compressed(model["lower"](x.bfloat16()))
    with torch.no_grad():
        at_the_limit.weight[0, 0] = 0.0
    with csr_products(model) as names:
        assert "limit" in names


def test_weights_below_the_asked_size_are_left_as_they_are():
    layer = sparse_linear(out=40, width=64)
    with csr_products(layer, min_entries=2560) as names:
        assert names == ("",)
    with csr_products(layer, min_entries=2561) as names:
        assert names == () and not is_compressed(layer(torch.randn(5, 64)))


def test_under_autocast_the_product_is_the_dense_one():
    layer, x = sparse_linear(), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = layer(x)
        with csr_products(layer):
            got = layer(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_frozen_weights_get_no_gradient_and_keep_no_input():
    layer, x = sparse_linear().requires_grad_(False), torch.randn(5, 64, requires_grad=True)
    with csr_products(layer):
        y = layer(x)
        assert y.grad_fn.saved_tensors == (None,)
        (dx,) = torch.autograd.grad(y.sum(), x)
        with torch.no_grad():
            silent = layer(x)
    assert close(dx, torch.autograd.grad(layer(x).sum(), x)[0], 1e-6)
    assert not silent.requires_grad and torch.equal(silent, y)


def test_the_backward_pass_may_come_after_the_context_and_after_a_change():
    layer, x, g = sparse_linear(), torch.randn(5, 64), torch.randn(5, 40)
    want = run(layer, x, g)
    x.requires_grad_()
    with csr_products(layer):
        y = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    y.backward(g)
    assert close(x.grad, want[1], 1e-6) and close(layer.weight.grad, want[2], 1e-6)


def test_a_weight_changed_inside_is_refused_by_name():
    model, x = nn.Sequential(sparse_linear(width=64), nn.ReLU()), torch.randn(5, 64)
    with csr_products(model):
        model(x)
        with torch.no_grad():
            model[0].weight.mul_(2)  # pyright: ignore
        with pytest.raises(ValueError, match="weight of 0 was changed .* close the context"):
            model(x)
    assert torch.isfinite(model(x)).all()


def test_nothing_is_left_behind_and_hooks_see_what_the_layer_gives():
    layer, x, seen = sparse_linear(), torch.randn(5, 64), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    before, want = set(vars(layer)), layer(x)
    with pytest.raises(RuntimeError, match="stop"), csr_products(layer):
        y = layer(x)
        raise RuntimeError("stop")
    assert seen[-1] is y and is_compressed(y) and set(vars(layer)) == before
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), want) and not is_compressed(layer(x))


@pytest.mark.parametrize("products", COMPRESSED)
def test_the_same_product_twice_has_the_same_bits(products):
    layer, x, g = sparse_linear(200, 300, 0.05), torch.randn(700, 300), torch.randn(700, 200)
    runs = []
    for _ in range(2):
        with csr_products(layer, products=products):
            runs.append(run(layer, x.clone(), g.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_tied_weight_and_another_way_of_calling_are_found():
    layer, x = sparse_linear(bias=False), torch.randn(5, 64)
    with csr_products(layer):
        assert is_compressed(F.linear(x, layer.weight))
        assert is_compressed(F.linear(input=x, weight=layer.weight, bias=torch.ones(40)))
        assert not is_compressed(F.linear(x, layer.weight.clone()))
        with pytest.raises(RuntimeError):  # torch's own words for a wrong width
            layer(torch.randn(5, 63))


@pytest.mark.parametrize("products", COMPRESSED)
def test_a_whole_model_gives_the_same_losses_and_gradients(small, products):
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) < 0.1)
    ids = torch.randint(50, (3, 9))
    results = []
    for model in (small, deepcopy(small)):
        if model is small:
            with csr_products(model, products=products) as names:
                loss = model(ids, labels=ids).loss
            assert len(names) == 9 and "lm_head" in names
        else:
            loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # several layers of rounding


def test_under_gradient_checkpointing_the_products_are_the_dense_ones(small):
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) < 0.1)
    small.train().model.gradient_checkpointing = True
    ids = torch.randint(50, (2, 9))
    with csr_products(small) as names:
        loss = small(ids, labels=ids).loss
    loss.backward()
    with csr_products(small.eval()) as later:
        assert not names and len(later) == 9
