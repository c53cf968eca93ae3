"""Laws of a trial in the dense model: what a delta is, what it does, and how that is counted."""

import pytest
import torch
from torch.nn import functional as F

from bridges import Ablation, Steering
from bridges.transfer import stream_change
from evals.trials.dense_trial import Trial
from evals.trials.unrelated import unrelated
from sparse.circuits.taps import recorded
from sparse.tasks.batch import REST

SITES = range(5)


def made(mapped, batch_of, circuit, pairs=5):
    batch = batch_of(circuit.task)
    kept, sources = unrelated(batch, torch.arange(pairs))
    return Trial(mapped(circuit), batch.take(kept), sources)


@pytest.fixture(scope="module")
def two_sided(mapped, batch_of, quotes):
    return made(mapped, batch_of, quotes)


@pytest.fixture(scope="module")
def one_sided(mapped, batch_of, found):
    return made(mapped, batch_of, found["else_elif"])


@pytest.fixture(params=["two_sided", "one_sided"])
def trial(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def delta(trial):
    rng = torch.Generator().manual_seed(0)
    return lambda site: trial.h[site] * 0.3 * torch.randn(trial.h[site].shape, generator=rng)


def test_resuming_at_a_site_is_an_edit_through_nnsight(trial, delta):
    for site in (0, 2, 4):
        trial.check(site, delta(site))
    true = trial.dense.resume  # control: a model that resumes to something else
    resume = lambda site, h, ids, **how: true(site, h, ids, **how) + 0.1  # noqa: E731
    try:
        trial.dense.resume = resume
        with pytest.raises(ValueError, match="an edit at site 2 and resuming there differ by 0.1"):
            trial.check(2, delta(2))
    finally:
        del trial.dense.resume


def test_the_true_difference_moves_the_whole_answer_at_every_site_and_zero_nothing(trial):
    true = trial.true_difference()
    for site in SITES:
        logits = trial.logits(site, true(site))
        torch.testing.assert_close(logits, trial.full, atol=1e-3, rtol=1e-4)
        assert trial.share(trial.moved(logits)) == pytest.approx(1, abs=1e-4)
        assert float(trial.collateral_a(logits).abs().max()) < 1e-4
        still = trial.logits(site, 0 * true(site))
        assert trial.share(trial.moved(still)) == pytest.approx(0, abs=1e-4)
        assert float(trial.collateral_b(still).abs().max()) < 1e-4
        half = trial.logits(site, 0.5 * true(site))
        assert trial.collateral_a(half).mean() > 1e-2 and trial.collateral_b(half).mean() > 1e-3
    assert float(trial.collateral_a(trial.untouched).mean()) > 0.3  # control


def other_context(trial):
    """What each prompt's counterfactual should be followed by, and its own targets."""
    return list(zip(trial.batch.target.tolist(), trial.batch.foil.tolist(), strict=True))


def test_p_is_that_of_the_other_context_s_target(trial, delta):
    """In the softmax over the two targets; for a token and REST, over the whole vocabulary."""
    logits = trial.logits(1, delta(1))
    full = logits.double().softmax(-1)
    n = trial.batch.n_pairs
    p, nats = [], []
    for row, (target, foil) in enumerate(other_context(trial)):
        if REST in (target, foil):
            one = float(full[row, max(target, foil)])
            p_other = one if target == REST else 1 - one
        else:
            a, b = float(full[row, target]), float(full[row, foil])
            p_other = b / (a + b)
        p.append(p_other)
        nats.append(-torch.tensor(1 - p_other).double().log())
    for pair in range(n):
        assert float(trial.moved(logits)[pair]) == pytest.approx((p[pair] + p[pair + n]) / 2, 1e-4)
        loss = float(nats[pair] + nats[pair + n]) / 2
        assert float(trial.nats(logits)[pair]) == pytest.approx(loss, rel=1e-3)


def test_the_references_are_the_dense_model_on_the_prompt_and_on_its_counterfactual(trial):
    ids, last = trial.batch.ids, trial.batch.last
    rows = torch.arange(len(ids))
    untouched = trial.dense.logits(ids)[rows, last]
    full = trial.dense.logits(trial.batch.counterfactual())[rows, last]
    torch.testing.assert_close(trial.untouched, untouched, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trial.full, full, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trial.p_0, trial.moved(untouched), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trial.p_cf, trial.moved(full), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trial.nats_0, trial.nats(untouched), atol=1e-5, rtol=1e-4)


def test_share_is_a_ratio_of_means_over_pairs(trial):
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(len(trial.p_0), generator=rng, dtype=torch.double)
    oracle = (p.mean() - trial.p_0.mean()) / (trial.p_cf.mean() - trial.p_0.mean())
    assert trial.share(p) == pytest.approx(float(oracle))
    each = ((p - trial.p_0) / (trial.p_cf - trial.p_0)).mean()
    assert trial.share(p) != pytest.approx(float(each))  # control: a mean of ratios


def test_collateral_a_is_a_divergence_from_the_counterfactual_s_answer(trial, delta):
    logits = trial.logits(2, delta(2))
    p, log_q = trial.full.double().softmax(-1), logits.double().log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1).view(2, -1).mean(0)
    torch.testing.assert_close(trial.collateral_a(logits), kl, atol=1e-5, rtol=1e-3)
    back = F.kl_div(p.log(), log_q.exp(), reduction="none").sum(-1).view(2, -1).mean(0)
    assert not torch.allclose(trial.collateral_a(logits), back, rtol=0.05)  # control: the reverse


def test_collateral_b_leaves_the_targets_out_and_renormalises(trial, delta):
    logits = trial.logits(2, delta(2))
    kls = []
    for row, targets in enumerate(other_context(trial)):
        rest = [i for i in range(logits.shape[1]) if i not in targets]
        p, q = (x[row, rest].double().softmax(-1) for x in (trial.untouched, logits))
        kls.append(float((p * (p.log() - q.log())).sum()))
    oracle = torch.tensor(kls, dtype=torch.double).view(2, -1).mean(0)
    torch.testing.assert_close(trial.collateral_b(logits), oracle, atol=1e-5, rtol=1e-3)


def test_collateral_b_does_not_see_the_two_targets(trial):
    row = torch.arange(len(trial.ids))
    logits = trial.untouched.clone()
    for of, shift in ((trial.batch.target, -9.0), (trial.batch.foil, 7.0)):
        logits[row[of >= 0], of[of >= 0]] += shift
    assert float(trial.collateral_b(logits).abs().max()) < 1e-5
    assert float(trial.collateral_a(logits).mean()) != pytest.approx(
        float(trial.collateral_a(trial.untouched).mean()), abs=0.1
    )
    third = next(i for i in range(9) if i not in sum(map(list, other_context(trial)), []))
    logits[:, third] += 12  # control: a token that is no target
    assert float(trial.collateral_b(logits).min()) > 0.01


@pytest.mark.parametrize("part", ["circuit", "first"])
def test_deltas_are_those_of_the_library_s_interventions_at_every_site(trial, part):
    mapped, ids = trial.mapped, trial.ids
    nodes = list(mapped.circuit)[: None if part == "circuit" else 4]
    steered, ablated = trial.steered(nodes), trial.ablated(nodes)
    for site in SITES:
        want = mapped.delta(Steering(trial.sources, nodes), ids, site)
        torch.testing.assert_close(steered(site), want)
        torch.testing.assert_close(ablated(site), mapped.delta(Ablation(nodes), ids, site))
    other = mapped.delta(Steering(trial.batch.counterfactual(), nodes), ids, 4)  # control
    assert (steered(4) - other).abs().max() > 1e-3
    assert (steered(4) - ablated(4)).abs().max() > 1e-3


def test_the_embedding_difference_is_decoded_alike_at_every_site(trial):
    """All of it enters at site 0, so there it is what steering all nodes cannot add."""
    z, z_source = (trial.sparse.residuals(x)[0] for x in (trial.ids, trial.sources))
    deltas = trial.embedded()
    for site in SITES:
        want = trial.bridges.transport(site, z_source - z)
        torch.testing.assert_close(deltas(site), want)
    assert deltas(0).abs().max() > 0.1


def test_the_full_patch_of_a_source_is_the_dense_model_on_that_source(trial):
    rows = torch.arange(len(trial.ids))
    want = trial.dense.logits(trial.sources)[rows, trial.batch.last]
    patch = trial.patched()
    for site in SITES:
        got = trial.logits(site, patch(site))
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert (want - trial.full).abs().max() > 0.1  # control: the source is not the counterfactual


def test_many_deltas_answer_as_they_do_alone(trial, delta, monkeypatch):
    deltas = [delta(2) for _ in range(3)]
    alone = [trial.logits(2, d) for d in deltas]
    n, pos = trial.ids.shape
    one = n * (trial.dense.vocab_size + 8 * pos * trial.dense.d_resid)
    for room in (one, 2 * one, 9 * one):
        monkeypatch.setattr("evals.trials.dense_trial.IN_CACHE", room)
        assert trial.together == room // one
        for got, want in zip(trial.many(2, iter(deltas)), alone, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_what_is_known_already_may_be_given_to_a_change_of_the_stream(trial):
    """`clean` and `there` save runs of the sparse model, and change nothing."""
    sparse, ids, sources = trial.sparse, trial.ids, trial.sources
    circuit = trial.mapped.circuit
    chosen = {at: mask for at, mask in circuit.masks().items() if mask.any()}
    runs = []
    with torch.no_grad():
        clean = sparse.residuals(ids)
        with recorded(sparse) as there:
            sparse.residuals(sources)
        handle = sparse.register_forward_hook(lambda *_: runs.append(1))
    pairs = (
        (
            stream_change.ablated(sparse, ids, chosen, circuit.ablation),
            stream_change.ablated(sparse, ids, chosen, circuit.ablation, clean=clean),
        ),
        (
            stream_change.replaced(sparse, ids, sources, chosen),
            stream_change.replaced(sparse, ids, sources, chosen, there=there, clean=clean),
        ),
    )
    handle.remove()
    for plain, given in pairs:
        assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
    shifted = [z + 1 for z in clean]  # control: what is given is used
    moved = stream_change.ablated(sparse, ids, chosen, circuit.ablation, clean=shifted)
    torch.testing.assert_close(moved[0], pairs[0][0][0] - 1)
    same = {at: x * 0 for at, x in there.items()}
    other = stream_change.replaced(sparse, ids, sources, chosen, there=same, clean=clean)
    assert not torch.allclose(other[-1], pairs[1][0][-1], atol=1e-3)
