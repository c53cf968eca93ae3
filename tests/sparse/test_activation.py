import pytest
import torch

from sparse.activation import AbsTopK, abs_topk, kept_cpu, kept_reference, kept_threshold

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(x, k):
    return torch.where(kept_reference(x, k), x, 0.0)


def bits(x):
    return x.contiguous().view(torch.uint8)


def hard_rows(dtype):
    """Rows on which a threshold goes wrong: ties, zeros of both signs, denormals, infinities."""
    tiny = torch.finfo(dtype).smallest_normal
    rows = [
        [1, -1, 1, -1, 1, -1, 1, -1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [-0.0, 0, -0.0, 3, 0, -0.0, 0, -3],
        [tiny, -tiny / 2, tiny / 2, tiny / 4, 0, -tiny / 4, tiny / 4, 0],
        [float("inf"), -float("inf"), 2, 2, 2, 2, 2, -2],
        [1, 2, 3, 4, 5, 6, 7, 8],
        [8, 7, 6, 5, 5, 5, 5, 1],
    ]
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_the_fast_paths_give_the_bits_of_the_reference(dtype, k):
    coarse = (random(50, 8, dtype=dtype, seed=k) * 2).round()  # ties in most rows
    for x in (hard_rows(dtype), coarse, random(5, 3, 8, dtype=dtype)):
        assert torch.equal(bits(abs_topk(x, k)), bits(reference(x, k)))
        for fast in (kept_cpu, kept_threshold):
            kept, last = fast(x, k)
            assert torch.equal(kept, kept_reference(x, k))
            fewer = x.count_nonzero(-1).unsqueeze(-1) < k
            assert torch.equal(last == 0, fewer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_k_entries_are_kept_and_they_are_the_largest(dtype):
    for k in (1, 3, 7):
        x = random(100, 8, dtype=dtype, seed=k)
        assert (x.unique(dim=1).shape[1] == 8) and (x != 0).all()
        y = abs_topk(x, k)
        assert (y.count_nonzero(-1) == k).all()
        kept, dropped = y.abs(), (x - y).abs()
        smallest = kept.masked_fill(y == 0, float("inf")).amin(-1)
        assert (smallest >= dropped.amax(-1)).all()


def test_ties_go_to_the_lowest_index():
    x = torch.tensor([1.0, -2.0, 2.0, -1.0, 2.0, 1.0])
    assert abs_topk(x, 2).tolist() == [0, -2, 2, 0, 0, 0]
    assert abs_topk(x, 4).tolist() == [1, -2, 2, 0, 2, 0]
    assert abs_topk(x.flip(0), 4).tolist() == [1, 2, 0, 2, -2, 0]


def test_keeping_all_is_the_identity_itself():
    x = random(4, 8)
    assert abs_topk(x, 8) is x


def test_the_gradient_reaches_the_kept_entries_and_no_other():
    x = random(20, 8).requires_grad_()
    weight = random(20, 8, seed=1)
    (abs_topk(x, 3) * weight).sum().backward()
    assert torch.equal(x.grad, torch.where(kept_reference(x, 3), weight, 0.0))
    assert (x.grad == 0).sum() == 20 * 5


def test_where_fewer_than_k_are_nonzero_the_gradient_is_the_identity():
    rows = [[0, 3, 0, 0, 0, -2], [0, 3, 1, 0, 0, -2], [0, 0, 0, 0, 0, 0], [0, 3, 1, 4, 0, -2]]
    x = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    weight = 1 + torch.rand(4, 6)
    y = abs_topk(x, 3)
    (y * weight).sum().backward()
    assert torch.equal(y[:3], x[:3])  # nothing was dropped
    assert torch.equal(x.grad[0], weight[0]) and torch.equal(x.grad[2], weight[2])
    # control: exactly k nonzero is enough for the zeros to be dropped, not kept
    assert x.grad[1].tolist() == [0, weight[1, 1], weight[1, 2], 0, 0, weight[1, 5]]
    assert x.grad[3].tolist() == [0, weight[3, 1], 0, weight[3, 3], 0, weight[3, 5]]


def test_the_gradient_is_that_of_the_formula_where_it_is_smooth():
    x = random(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: abs_topk(x, 3), x)


def test_strided_expanded_and_empty_inputs_are_read_rightly():
    x = random(8, 6, 5)
    assert torch.equal(abs_topk(x.transpose(0, 2), 3), reference(x.transpose(0, 2), 3))
    assert torch.equal(abs_topk(x[:, ::2, 1:], 2), reference(x[:, ::2, 1:], 2))
    assert torch.equal(abs_topk(x[0, 0].expand(7, 5), 2), reference(x[0, 0].expand(7, 5), 2))
    assert abs_topk(x[:0], 2).shape == (0, 6, 5)
    leaf = random(4, 5).requires_grad_()
    abs_topk(leaf, 2).sum().backward()  # the gradient that arrives is an expanded scalar
    assert torch.equal(leaf.grad, kept_reference(leaf, 2).float())


def test_the_input_is_left_as_it_was():
    x = random(4, 8)
    before = x.clone()
    abs_topk(x, 2)
    assert torch.equal(x, before)


def test_k_outside_the_width_is_refused():
    for k in (0, 9, -1):
        with pytest.raises(ValueError, match=r"abs_topk: k=.* is outside 1\.\.8, the width"):
            abs_topk(torch.ones(2, 8), k)


def test_the_module_says_what_it_keeps():
    node = AbsTopK(8, 3)
    x = random(2, 4, 8)
    assert torch.equal(node(x), abs_topk(x, 3))
    assert repr(node) == "AbsTopK(8, k=3)" and not list(node.parameters())
