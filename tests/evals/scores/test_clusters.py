"""Laws of intervals over clusters: what pairs share widens them, and too few clusters give none."""

from statistics import NormalDist

import pytest
import torch
from scipy.stats import t as student

from evals.scores.clusters import FEWEST, Resampled, fixed, ratio, resampled

N_SETS = 240


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shared(seed, n_clusters=16, size=4, truth=0.0, spread=1.0):
    """Pairs whose numbers are a cluster's own, of standard deviation `spread`, plus noise."""
    own = spread * normal(seed, n_clusters).repeat_interleave(size)
    levels = tuple(f"frame {i // size}" for i in range(n_clusters * size))
    return truth + own + 0.5 * normal(seed + 10_000, n_clusters * size), {"frame": levels}


def ends(found):
    interval = found.interval()
    return interval.low, interval.high


def covered(found, truth):
    low, high = ends(found)
    return low <= truth <= high


@pytest.mark.parametrize("n_clusters", [5, 16])
def test_the_interval_covers_the_truth_in_95_of_100_and_one_over_pairs_does_not(n_clusters):
    right = plain = 0
    for seed in range(N_SETS):
        x, groups = shared(seed, n_clusters, truth=0.3)
        right += covered(resampled(x[:, None], groups), 0.3)
        plain += covered(resampled(x[:, None], {}), 0.3)
    assert 0.92 <= right / N_SETS <= 0.985
    assert plain / N_SETS < 0.8  # control: pairs taken for independent


@pytest.mark.parametrize("n_clusters", [5, 12, 40])
def test_for_equal_clusters_the_interval_is_student_s_over_their_means(n_clusters):
    x, groups = shared(3, n_clusters)
    found = resampled(x[:, None], groups)
    means = x.view(n_clusters, -1).mean(1)
    oracle = float(student.ppf(0.975, n_clusters - 1) * means.std() / n_clusters**0.5)
    assert 1.96 * float(found.draws.std()) == pytest.approx(oracle, rel=0.05)
    # of few clusters the bootstrap's tails are a little shorter than those of a normal
    assert found.interval().half == pytest.approx(oracle, rel=0.12 if n_clusters < 8 else 0.06)
    assert found.value == pytest.approx(float(x.mean()))
    normal_ends = NormalDist().inv_cdf(0.975) * float(means.std()) / n_clusters**0.5
    if n_clusters == 5:  # control: without c the interval would be this and less
        assert found.interval().half > 1.25 * normal_ends


def test_a_ratio_of_means_has_the_error_of_the_delta_method():
    """Var(a / b) = Var(a - r b) / b^2 to first order; clusters of one pair each."""
    b = 2 + 0.4 * normal(1, 400)
    a = 0.6 * b + 0.5 * normal(2, 400)
    found = resampled(torch.stack([a, b], 1), {}, ratio)
    r = float(a.mean() / b.mean())
    oracle = 1.96 * float((a - r * b).std() / 20 / b.mean())
    assert found.value == pytest.approx(r)
    assert found.interval().half == pytest.approx(oracle, rel=0.07)
    of_ratios = float((a / b).mean())  # control: the mean of ratios is another number
    assert abs(of_ratios - r) > 1e-3


def test_a_ratio_of_means_is_covered_in_95_of_100():
    right = 0
    for seed in range(N_SETS):
        b = 2 + 0.5 * normal(seed + 50_000, 64)
        own, groups = shared(seed)
        found = resampled(torch.stack([0.7 * b + own, b], 1), groups, ratio)
        right += covered(found, 0.7)
    assert 0.92 <= right / N_SETS <= 0.985


def test_clusters_count_by_how_many_pairs_they_have():
    """The mean is over pairs: its error is that of a ratio, sums over sizes, of the clusters."""
    sizes = [1, 9] * 15
    means = normal(4, 30) + torch.tensor(sizes) / 5  # large clusters lie higher
    x = torch.cat([m.repeat(n) for m, n in zip(means, sizes, strict=True)])
    frames = tuple(str(i) for i, n in enumerate(sizes) for _ in range(n))
    found = resampled(x[:, None], {"frame": frames})
    n = torch.tensor(sizes, dtype=torch.float64)
    gap = n * (means - x.mean())
    oracle = float((30 / 29 * gap.square().sum()).sqrt() / n.sum() * student.ppf(0.975, 29))
    assert 1.96 * float(found.draws.std()) == pytest.approx(oracle, rel=0.06)
    assert float(found.draws.mean()) == pytest.approx(float(x.mean()), abs=0.05)
    assert abs(float(means.mean() - x.mean())) > 0.4  # control: every cluster counted alike


def test_fewer_than_five_levels_give_no_interval():
    x, groups = shared(0, FEWEST - 1)
    found = resampled(x[:, None], groups)
    assert found.interval() is None and found.draws is None
    assert (found.factor, found.n_clusters) == ("frame", FEWEST - 1)
    assert found.value == pytest.approx(float(x.mean()))
    x, groups = shared(0, FEWEST)  # control
    assert resampled(x[:, None], groups).interval().n_clusters == FEWEST
    few = resampled(x[: FEWEST - 1, None], {})
    assert few.interval() is None and (few.factor, few.n_clusters) == ("pair", FEWEST - 1)


def test_a_factor_of_few_levels_is_passed_over_where_another_has_enough_and_is_named():
    x, groups = shared(0, 12)
    forms = tuple("abc"[i % 3] for i in range(len(x)))
    both = groups | {"form": forms}
    assert ends(resampled(x[:, None], both)) == ends(resampled(x[:, None], groups))
    assert fixed(both) == {"form": 3} and fixed(groups) == {}
    assert resampled(x[:, None], {"form": forms}).interval() is None  # alone it is not passed over
    assert fixed({"none": ("",) * len(x)}) == {}


def test_a_pair_without_a_level_is_a_cluster_of_its_own():
    x, groups = shared(0, 8)
    levels = groups["frame"]
    unnamed = tuple(level if i < 16 else "" for i, level in enumerate(levels))
    named = tuple(level if i < 16 else f"own {i}" for i, level in enumerate(levels))
    found, oracle = (resampled(x[:, None], {"frame": of}) for of in (unnamed, named))
    assert ends(found) == ends(oracle)
    assert (found.factor, found.n_clusters) == ("frame", 4 + 16)
    one = resampled(x[:, None], {"frame": tuple(level or "same" for level in unnamed)})
    assert ends(one) != ends(found)  # control: taken as one cluster they would say something else


def test_a_factor_that_no_pair_names_is_as_if_it_were_not_there():
    x, _ = shared(0)
    assert ends(resampled(x[:, None], {"v": ("",) * len(x)})) == ends(resampled(x[:, None], {}))


@pytest.mark.parametrize("turn", [False, True])
def test_of_all_factors_the_widest_interval_is_taken(turn):
    x, groups = shared(1, 12)
    words = tuple(f"word {i % 12}" for i in range(len(x)))  # crossed with the frames, no effect
    both = {"word": words} | groups
    both = dict(reversed(both.items())) if turn else both
    found = resampled(x[:, None], both)
    halves = {f: resampled(x[:, None], {f: of}).interval().half for f, of in both.items()}
    assert found.factor == "frame" and halves["frame"] > 1.5 * halves["word"]
    assert found.interval().half == max(halves.values())


def test_the_pairs_themselves_are_a_factor():
    """Clusters whose pairs cancel would make an interval too narrow; that over pairs is wider."""
    x = normal(0, 20).repeat_interleave(2) * torch.tensor([1.0, -1.0]).repeat(20)
    frames = tuple(f"{i // 2}" for i in range(40))
    found = resampled(x[:, None], {"frame": frames})
    assert found.factor == "pair" and ends(found) == ends(resampled(x[:, None], {}))


def test_the_order_of_the_pairs_does_not_matter():
    """But for the noise of 2,000 resamples, since these are drawn for clusters in their order."""
    x, groups = shared(5, 10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    moved = {"frame": tuple(groups["frame"][i] for i in order.tolist())}
    a, b = resampled(x[:, None], groups), resampled(x[order][:, None], moved)
    assert b.value == pytest.approx(a.value)
    for one, other in zip(ends(a), ends(b), strict=True):
        assert one == pytest.approx(other, abs=0.08 * a.interval().half)
    broken = resampled(x[order][:, None], groups).interval()  # control: levels of other pairs
    assert broken.half < 0.8 * a.interval().half
    assert ends(resampled(x[:, None], groups)) == ends(a)  # the same question, the same answer


def test_a_constant_has_an_interval_of_no_width_at_its_value():
    found = resampled(torch.full((30, 1), 0.25), {})
    assert ends(found) == (0.25, 0.25)


def test_the_difference_of_two_independent_samples_is_as_wide_as_both_together():
    """half^2 = half_a^2 + half_b^2, also where the two happen to hold the same numbers."""
    x, groups = shared(7, 12)
    y, others = shared(8, 12, spread=2.0)
    a, b = resampled(x[:, None], groups), resampled(y[:, None], others)
    for one, other in ((a, b), (b, a), (a, a)):
        gap = one.minus(other)
        oracle = (one.interval().half ** 2 + other.interval().half ** 2) ** 0.5
        assert gap.value == pytest.approx(one.value - other.value)
        assert gap.interval().half == pytest.approx(oracle, rel=0.08)


def test_the_difference_covers_the_truth_in_95_of_100():
    right = 0
    for seed in range(N_SETS):
        x, groups = shared(2 * seed, truth=0.5)
        y, others = shared(2 * seed + 1)
        gap = resampled(x[:, None], groups).minus(resampled(y[:, None], others))
        right += covered(gap, 0.5)
    assert 0.92 <= right / N_SETS <= 0.985


def test_a_difference_has_the_fewer_clusters_and_no_interval_where_one_sample_has_none():
    x, groups = shared(0, 12)
    y, few = shared(1, 3)
    a, b = resampled(x[:, None], groups), resampled(y[:, None], few)
    for gap in (a.minus(b), b.minus(a)):
        assert isinstance(gap, Resampled) and gap.interval() is None
        assert (gap.factor, gap.n_clusters) == ("frame", 3)
