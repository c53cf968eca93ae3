import numpy as np
import pytest
import torch

from sparse.ops import abs_topk as activation
from sparse.ops.abs_topk import AbsTopK, abs_topk, kept_reference, kept_threshold, passes_gradient
from sparse.ops.abs_topk_cpu import kth_largest
from sparse.ops.bits import BLOCK
from tests.helpers import abs_topk_cases as cases

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [8, 33, 513, 1000]  # within numpy's registers and beyond, even and odd


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(x, k):
    return torch.where(kept_reference(x, k), x, 0.0)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_gives_the_bits_of_sorted_lists(dtype, d):
    for name, x, k in cases.cases([dtype], [d]):
        kept = cases.kept_by_hand(x, k)
        want = cases.zero_unless(kept, x)
        assert cases.same_bits(abs_topk(x, k), want), name
        assert cases.same_bits(activation._forward(x, k), want), name
        assert torch.equal(kept_reference(x, k), kept), name
        assert torch.equal(kept_threshold(x, k), kept), name


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_from_y_alone_is_that_of_the_definition(dtype, d):
    for name, x, k in cases.cases([dtype], [d]):
        dy = random(*x.shape, dtype=dtype, seed=k)
        want = cases.gradient_by_hand(x, k, dy)
        leaf = x.clone().requires_grad_()
        abs_topk(leaf, k).backward(dy)
        assert cases.same_bits(leaf.grad, want), name
        y = abs_topk(x, k)
        assert cases.same_bits(activation._backward(dy, y, k), want), name
        assert torch.equal(passes_gradient(y, k), want == dy), name


def test_a_path_that_breaks_ties_otherwise_is_found_out():
    x = cases.vectors(torch.float32, 33)["tied"]
    last_first = x.flip(-1)
    assert not cases.same_bits(abs_topk(last_first, 8).flip(-1), reference(x, 8))
    assert cases.same_bits(abs_topk(x, 8), reference(x, 8))


def test_more_rows_than_a_block_holds_are_all_done():
    for dtype in (torch.float32, torch.bfloat16):
        x = random(BLOCK // 64 * 2 + 3, 64, dtype=dtype)
        x[-1] = 1.0
        assert cases.same_bits(abs_topk(x, 16), reference(x, 16))
        leaf = x.clone().requires_grad_()
        abs_topk(leaf, 16).sum().backward()
        assert torch.equal(leaf.grad != 0, kept_reference(x, 16))


def test_a_row_wider_than_a_block_and_than_sixteen_bits_is_done():
    for dtype in (torch.float32, torch.bfloat16):
        x = random(2, BLOCK + 5, dtype=dtype).round(decimals=2)
        assert cases.same_bits(abs_topk(x, 1000), reference(x, 1000))
        x = torch.ones_like(x)  # all tied, at indices that sixteen bits cannot tell apart
        assert abs_topk(x, 70_000)[:, :70_000].all() and not abs_topk(x, 70_000)[:, 70_000:].any()


@pytest.mark.parametrize("d", [1, 2, 511, 513, 768, 1025])
def test_the_kth_largest_is_that_of_a_sort(d):
    rng = np.random.default_rng(d)
    few_values = rng.integers(0, 5, (20, d), dtype=np.int32)
    spread = rng.integers(0, 2**31 - 1, (20, d), dtype=np.int32, endpoint=True)
    one_chunk_has_all = np.sort(spread, axis=-1)
    for a in (few_values, spread, one_chunk_has_all, np.zeros_like(spread)):
        for k in sorted({1, 2, d // 4, d // 2, d - 1, d} - {0}):
            if k <= d:
                assert np.array_equal(kth_largest(a, k)[:, 0], np.sort(a, axis=-1)[:, d - k])


def test_a_nan_is_kept_before_infinity_and_never_dropped_for_a_number():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, -inf, nan, 5.0, inf], [nan, nan, 1.0, nan, inf]])
    y = abs_topk(x, 2)
    assert cases.same_bits(y, torch.tensor([[0, -inf, nan, 0, 0], [nan, nan, 0, 0, 0]]))


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


def test_the_gradient_has_the_gradient_of_a_linear_map():
    x = random(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: abs_topk(x, 3), x)
    with pytest.raises(RuntimeError):  # control: y is what the backward pass reads
        y = abs_topk(x, 3)
        y.mul_(2)
        y.sum().backward()


def test_the_operators_keep_the_rules_of_torch():
    for x in (random(4, 3, 8), random(8, 6).t(), random(2, 4, 12).chunk(3, dim=-1)[1]):
        leaf = x.detach().requires_grad_()
        torch.library.opcheck(torch.ops.sparse_bridges.abs_topk.default, (leaf, 3))
        grad = random(*x.shape, seed=2).requires_grad_()
        backward = torch.ops.sparse_bridges.abs_topk_backward.default
        torch.library.opcheck(backward, (grad, abs_topk(x, 3).detach(), 3))


def test_without_triton_a_gpu_would_take_the_threshold_form(monkeypatch):
    x = random(4, 8)
    y = abs_topk(x, 3)
    monkeypatch.setattr(activation, "_kernels", lambda: None)
    assert torch.equal(activation._forward_cuda(x, 3), y)
    assert torch.equal(activation._backward_cuda(x, y, 3), y)


def test_under_autocast_the_dtype_stays():
    x = random(4, 8, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = abs_topk(x, 3)
        assert y.dtype == torch.bfloat16 and abs_topk(x.float(), 3).dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="abs_topk: torch.float8_e4m3fn is none of .*; cast x"):
        abs_topk(torch.ones(2, 8).to(torch.float8_e4m3fn), 3)


def test_k_outside_the_width_is_refused():
    for k in (0, 9, -1):
        with pytest.raises(ValueError, match=r"abs_topk: k=.* is outside 1\.\.8, the width"):
            abs_topk(torch.ones(2, 8), k)


def test_the_module_says_what_it_keeps():
    node = AbsTopK(8, 3)
    x = random(2, 4, 8)
    assert torch.equal(node(x), abs_topk(x, 3))
    assert repr(node) == "AbsTopK(8, k=3)" and not list(node.parameters())
