import pytest
import torch

from sparse.ops.project import chosen_reference, project_
from sparse.ops.project_cpu import chosen_cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random(rows, cols, dtype=torch.float32, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute_force(weight, keep, floor, dim):
    """The definition with lists: protect, then fill up, ties by lowest index."""
    n_rows, n_cols = weight.shape
    size = [(-abs(weight[i, j].item()), i, j) for i in range(n_rows) for j in range(n_cols)]
    slices = [[e for e in size if e[1 + dim] == s] for s in range(weight.shape[dim])]
    kept = {e for entries in slices for e in sorted(entries)[:floor]}
    kept |= set([e for e in sorted(size) if e not in kept][: keep - len(kept)])
    chosen = torch.zeros(n_rows, n_cols, dtype=torch.bool)
    for _, i, j in kept:
        chosen[i, j] = True
    return chosen


def hard_matrices(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    lonely = random(6, 5, dtype)
    lonely[2:] *= 1e-3  # the plain choice would leave rows and columns empty
    lonely[:, 1:3] *= 1e-3
    yield lonely
    yield (random(6, 5, dtype, seed=1) * 2).round()  # ties and zeros
    yield torch.zeros(6, 5, dtype=dtype)
    yield -torch.ones(6, 5, dtype=dtype)
    yield random(6, 5, dtype, seed=2).sign() * tiny / 4  # denormal
    yield random(5, 6, dtype, seed=3).T  # strided


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_both_ways_of_choosing_are_the_definition(dtype, dim):
    for weight in hard_matrices(dtype):
        n_slices = weight.shape[dim]
        for floor in (0, 1, 2, weight.shape[1 - dim]):
            for keep in {n_slices * floor, n_slices * floor + 3, 17, 30}:
                if not n_slices * floor <= keep <= 30:
                    continue
                want = brute_force(weight, keep, floor, dim)
                assert torch.equal(chosen_reference(weight, keep, floor, dim), want)
                assert torch.equal(chosen_cpu(weight, keep, floor, dim), want)


ROWS, COLS = 130, 256  # enough entries that the choice on a CPU goes by a sample


def large_matrices(dtype):
    """Every one hard in its own way: (name, matrix)."""
    rows, cols = random(ROWS, 1, seed=1), random(1, COLS, seed=2)
    plain = random(ROWS, COLS)
    yield "plain", plain.to(dtype)
    yield "after Adam", torch.where(random(ROWS, COLS, seed=3) > 1.9, plain, plain / 1e3).to(dtype)
    yield "uneven", (plain * rows.exp() ** 4 * cols.exp() ** 4).to(dtype)
    yield "one row", torch.where(torch.arange(ROWS)[:, None] == 7, plain, plain / 1e4).to(dtype)
    yield "one column", torch.where(torch.arange(COLS) == 7, plain, plain / 1e4).to(dtype)
    yield "tied in rows", rows.expand(ROWS, COLS).to(dtype)
    yield "tied in columns", cols.expand(ROWS, COLS).to(dtype)
    yield "tied", -torch.ones(ROWS, COLS, dtype=dtype)
    yield "zeros of both signs", torch.zeros(ROWS, COLS, dtype=dtype).copysign(plain)
    yield "mostly zero", torch.where(plain > 2, plain, -0.0).to(dtype)
    yield "denormal", plain.to(dtype) * torch.finfo(dtype).smallest_normal / 4
    yield "huge", (plain.sign() * torch.finfo(dtype).max / (1 + plain**2)).to(dtype)


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_large_hard_matrices_are_projected_as_by_the_definition_bit_for_bit(dtype, dim):
    n = ROWS * COLS
    for name, weight in large_matrices(dtype):
        for floor in (0, 4, 31):
            least = floor * weight.shape[dim]
            for keep in {least, least + 1, max(least, n // 64), max(least, n // 2), n - 1, n}:
                got = weight.clone()
                project_(got, keep, floor, dim)
                want = weight.masked_fill(~chosen_reference(weight, keep, floor, dim), 0.0)
                assert torch.equal(bits(got), bits(want)), (name, floor, keep)


def test_no_sample_however_misleading_changes_the_choice(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    for name, weight in large_matrices(torch.float32):
        largest = int(bits(weight.abs()).max())
        for keep, floor in ((600, 4), (ROWS * COLS // 2, 0), (0, 0)):
            ends = torch.randint(0, largest + 2, (2,), generator=rng).sort().values.tolist()
            monkeypatch.setattr(
                "sparse.ops.project_cpu._bracket", lambda bits, keep, ends=ends: ends
            )
            want = chosen_reference(weight, keep, floor, 0)
            assert torch.equal(chosen_cpu(weight, keep, floor, 0), want), (name, keep, ends)


def test_torch_sees_that_a_projected_weight_has_changed():
    weight = torch.nn.Parameter(random(6, 5))
    y = (weight * weight).sum()
    project_(weight, 10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def uneven():
    """A matrix in which some rows and columns are much smaller than others."""
    return random(20, 30) * random(20, 1, seed=1).exp() ** 4 * random(1, 30, seed=2).exp() ** 4


@pytest.mark.parametrize("dim", [0, 1])
def test_exactly_the_budget_is_kept_and_the_floor_is_inside_it(dim):
    for keep in (60, 61, 200, 599, 600):
        weight = uneven()
        before = weight.clone()
        project_(weight, keep, 2, dim)
        assert weight.count_nonzero() == keep
        assert weight.count_nonzero(dim=1 - dim).min() >= 2
        kept = weight != 0
        assert torch.equal(weight[kept], before[kept])


def test_control_without_a_floor_neurons_die():
    for dim in (0, 1):
        weight = (
            random(20, 30) * random(20, 1, seed=1).exp() ** 4 * random(1, 30, seed=2).exp() ** 4
        )
        project_(weight, 60, 0, dim)
        assert weight.count_nonzero() == 60 and weight.count_nonzero(dim=1 - dim).min() == 0


def test_projection_is_idempotent_and_nested():
    once = random(9, 7)
    project_(once, 30, 2, 1)
    twice = once.clone()
    project_(twice, 30, 2, 1)
    assert torch.equal(once, twice)
    step, direct = random(9, 7), random(9, 7)
    for keep in (50, 35, 20):
        project_(step, keep)
    project_(direct, 20)
    assert torch.equal(step, direct)


def test_it_works_in_place_on_whatever_it_is_given():
    base = random(8, 10)
    view = base[1:7, ::2]
    want = torch.where(chosen_reference(view, 9, 1, 0), view, 0.0)
    untouched = base[:, 1::2].clone()
    project_(view, 9, 1, 0)
    assert torch.equal(base[1:7, ::2], want) and torch.equal(base[:, 1::2], untouched)
    leaf = torch.nn.Parameter(random(4, 4))
    project_(leaf, 5)
    assert leaf.requires_grad and leaf.count_nonzero() == 5


@pytest.mark.parametrize(
    "keep, floor, dim, words",
    [
        (7, 2, 0, "2 per row; keep must be in 8..20"),
        (9, 2, 1, "2 per column; keep must be in 10..20"),
        (21, 0, 0, "keep must be in 0..20"),
        (-1, 0, 0, "keep must be in"),
        (20, 6, 0, "6 per row"),
        (20, 0, 2, "dim=2 must be 0"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_and_nothing_is_changed(keep, floor, dim, words):
    weight = random(4, 5)
    before = weight.clone()
    with pytest.raises(ValueError, match=f"project_: .*{words}"):
        project_(weight, keep, floor, dim)
    assert torch.equal(weight, before)
