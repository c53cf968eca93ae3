"""Laws of the facts about a circuit: what all nodes, no nodes and planted nodes must give."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bridges import load_run
from evals.claims.adversary import attack
from evals.claims.facts import _Facts, frozen_scales, held, other_prompts, scales, twin_facts
from sparse.circuits.mask import masked
from sparse.circuits.score import last_logits
from sparse.circuits.taps import recorded
from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import task_nats

LOSSES = ("zero", "resample.pair", "resample.text", "frozen_norms", "adversary")


@pytest.fixture
def hasty(monkeypatch):
    """An adversary of two steps: its own laws are in test_adversary.py."""
    monkeypatch.setattr("evals.claims.adversary.attack", partial(attack, steps=2))


def keyed(rows):
    return {row.key.removeprefix("circuit.fact."): row for row in rows}


@pytest.fixture(scope="module")
def batch(task, dense):
    return task.batch(dense.tokenizer, "test").take(torch.arange(12))


@pytest.fixture
def some(sparse, make_circuit):
    """A third of all nodes, those of the ranking that random numbers give."""
    rng = torch.Generator().manual_seed(0)
    whole = {at: torch.rand(n, generator=rng) for at, n in sparse.node_widths().items()}
    nodes = {at: tuple((x < 1 / 3).nonzero().flatten().tolist()) for at, x in whole.items()}
    return make_circuit(nodes)


def test_all_nodes_give_the_full_models_losses_and_no_difference_in_nodes_attention_or_norms(
    sparse, everything, dense, blocks, hasty
):
    rows = keyed(
        twin_facts(sparse, everything, dense.tokenizer, blocks=blocks, draws=2, max_pairs=12)
    )
    assert set(rows) == {*LOSSES, "kl", "nodes", "attention"}
    for key in LOSSES:
        assert rows[key].value == pytest.approx(rows[key].detail["full model"], abs=1e-5), key
        assert rows[key].n_draws == 2 and rows[key].n <= 12
    for key in ("kl", "nodes", "attention"):
        assert rows[key].value == pytest.approx(0, abs=1e-6), key


def test_no_nodes_have_no_agreement_to_measure_and_the_other_prompts_loss(
    sparse, make_circuit, dense, blocks, batch, hasty
):
    empty = make_circuit({})
    given = {"draws": 1, "max_pairs": 12, "blocks": blocks}
    rows = keyed(twin_facts(sparse, empty, dense.tokenizer, **given))
    assert set(rows) == {*LOSSES, "kl"}
    facts = _Facts(sparse, empty, batch, blocks, seed=0)
    # all sublayers write what they write elsewhere; only the own embeddings remain
    own = sparse.residuals(batch.ids)[0]
    there = sparse.residuals(facts.text)
    row = torch.arange(len(own))
    z = own + there[-1] - there[0]
    logits = sparse.unembed(z[row, batch.last], batch.ids[row, batch.last])
    assert rows["resample.text"].value == pytest.approx(
        float(task_nats(logits, batch).mean()), abs=1e-5
    )
    assert rows["resample.text"].value != pytest.approx(rows["zero"].value, abs=1e-3)  # control


def test_resampled_nodes_hold_the_values_of_the_other_run_and_kept_ones_are_computed(
    sparse, some, batch
):
    facts = _Facts(sparse, some, batch, None, seed=0)
    source = facts.source(facts.other.ids)
    with held(sparse, some.masks(), source), recorded(sparse) as values:
        last_logits(sparse, batch)
    for at, keep in some.masks().items():
        assert torch.equal(values[at][..., ~keep], source[at][..., ~keep]), at
    last = list(values)[-1]
    keep = some.masks()[last]
    assert not torch.equal(values[last][..., keep], source[last][..., keep])


def test_another_prompt_is_of_another_pair_and_as_long_and_a_lone_length_is_counted(
    batch, dense, task
):
    other = other_prompts(batch, seed=3)
    n, matched = batch.n_pairs, set(other.matched.tolist())
    rows = {tuple(ids.tolist()): i for i, ids in enumerate(batch.ids)}
    lengths = batch.last[:n].tolist()
    for i in range(2 * n):
        j = rows[tuple(other.ids[i].tolist())]
        alone = lengths.count(lengths[i % n]) == 1
        assert (i % n in matched) == (not alone)
        assert j == i if alone else (j % n != i % n and batch.last[j] == batch.last[i])
    assert torch.equal(other.ids, other_prompts(batch, seed=3).ids)
    assert not torch.equal(other.ids, other_prompts(batch, seed=4).ids)
    apart = replace(batch, last=torch.arange(n).repeat(2))
    assert not len(other_prompts(apart, seed=0).matched)


def test_attention_is_the_models_own_and_its_distance_counts_the_sink(sparse, some, batch):
    facts = _Facts(sparse, some, batch, None, seed=0)
    sparse.set_attn_implementation("eager")
    try:
        own = sparse(batch.ids, output_attentions=True).attentions
        with masked(sparse, some.masks(), some.ablation):
            pruned = sparse(batch.ids, output_attentions=True).attentions
    finally:
        sparse.set_attn_implementation("sdpa")
    row, total, n = torch.arange(len(batch.ids)), torch.zeros(len(batch.ids)), 0
    for layer, weights in enumerate(zip(own, pruned, strict=True)):
        a, b = (w[row, :, batch.last] for w in weights)
        assert torch.allclose(facts._pattern(layer, facts.values), a, atol=1e-5)
        a, b = (torch.cat([w, 1 - w.sum(-1, keepdim=True)], -1) for w in (a, b))  # the sink
        total, n = total + (a - b).abs().sum(-1).sum(1) / 2, n + a.shape[1]
    distance = facts.attends_elsewhere(some)
    assert distance is not None and (distance > 1e-3).all() and (distance <= 1).all()
    assert torch.allclose(distance, (total / n).view(2, -1).mean(0), atol=1e-5)


def test_the_share_of_variance_is_one_for_nodes_held_at_their_mean(sparse, make_circuit, batch):
    """And four for nodes mirrored about it: twice the distance, squared."""
    at = "1.mlp.post_act"
    lone = make_circuit({at: tuple(range(32))})
    facts = _Facts(sparse, lone, batch, None, seed=0)
    means = {k: v.flatten(0, -2).mean(0) for k, v in facts.values.items()}
    x = facts.values[at]
    held_at_mean = {**facts.values, at: means[at].expand_as(x)}
    facts._pruned = lambda c: held_at_mean  # pyright: ignore[reportAttributeAccessIssue]
    value = facts.unlike(lone)
    assert value is not None and float(value.mean()) == pytest.approx(1, abs=1e-5)
    facts._pruned = lambda c: {**facts.values, at: 2 * means[at] - x}  # mirrored about the mean
    mirrored = facts.unlike(lone)
    assert mirrored is not None and float(mirrored.mean()) == pytest.approx(4, abs=1e-4)


def test_padding_counts_for_nothing(sparse, some, batch):
    facts = _Facts(sparse, some, batch, None, seed=0)
    assert not facts.real.all()  # some prompts are shorter than others
    pruned = dict(facts._pruned(some))
    own = facts.unlike(some), facts.attends_elsewhere(some)
    spoilt = {
        at: x if x.shape[1] == 1 else x.masked_fill(~facts.real[..., None], 9.0)
        for at, x in pruned.items()
    }
    facts._pruned = lambda c: spoilt  # pyright: ignore[reportAttributeAccessIssue]
    for before, after in zip(own, (facts.unlike(some), facts.attends_elsewhere(some)), strict=True):
        assert before is not None and after is not None and torch.allclose(before, after)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_frozen_norms_are_linear_and_those_of_the_full_run(norm):
    torch.manual_seed(0)
    config = SparseGPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, norm=norm
    )
    model = SparseGPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids, last = torch.randint(20, (3, 5)), torch.tensor([4, 2, 3])
    with torch.no_grad():
        with scales(model) as found:
            plain = model.last_logits(ids, last)
        assert len(found) == 5  # two per layer, and the last
        with frozen_scales(model, found):
            assert torch.allclose(model.last_logits(ids, last), plain, atol=1e-5)
        x, last_norm = torch.randn(2, 3, 8), model.model.norm
        with frozen_scales(model, found | {"model.norm": torch.full((2, 3, 1), 0.5)}):
            bias = getattr(last_norm, "bias", None)
            zero = last_norm(torch.zeros_like(x)) if bias is None else bias
            assert torch.allclose(last_norm(2 * x) - zero, 2 * (last_norm(x) - zero), atol=1e-5)
        assert not torch.allclose(last_norm(2 * x), 2 * last_norm(x), atol=1e-2)  # control


def test_a_found_circuit_stays_near_its_model_where_random_ones_do_not_and_a_seed_fixes_all():
    run = load_run("tiny")
    circuit = run.circuits()["else_elif"]
    given = {"draws": 2, "max_pairs": 8, "adversary": False, "blocks": run.heldout()[:4]}
    rows = keyed(twin_facts(run.sparse, circuit, run.tokenizer, **given))
    again = twin_facts(run.sparse, circuit, run.tokenizer, **given)
    assert [r.to_dict() for r in again] == [r.to_dict() for r in rows.values()]
    for key in ("resample.pair", "resample.text", "kl"):
        assert rows[key].rank == 2, key
    parameters = [p.requires_grad for p in run.sparse.parameters()]
    assert all(parameters) and not run.sparse.training  # left as it was


def test_what_cannot_be_measured_is_refused_with_the_remedy(sparse, everything, dense, blocks):
    with pytest.raises(ValueError, match="fingerprint"):
        twin_facts(sparse, replace(everything, model_fingerprint="0"), dense.tokenizer)
    with pytest.raises(ValueError, match=r"blocks are \(12, 4\).*give blocks at least as long"):
        twin_facts(sparse, everything, dense.tokenizer, blocks=blocks[:, :4])
    with pytest.raises(ValueError, match="draws=0"):
        twin_facts(sparse, everything, dense.tokenizer, draws=0)
    no_test = replace(everything, task=replace(everything.task, test=()))
    with pytest.raises(ValueError, match="has no test pairs"):
        twin_facts(sparse, no_test, dense.tokenizer)
