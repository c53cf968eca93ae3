import copy
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import load_file

from bridges.cost.plan import plan
from bridges.losses.quantities import ce_nats
from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.config import CotrainConfig, LossWeights
from bridges.training.cotrain import Cotraining, cotrain
from bridges.training.objective import WHOLE, losses
from bridges.training.validate import calibrate, validate
from dense import DenseModel
from sparse.ops.csr_linear import csr_products
from sparse.storage.checkpoint import steps_saved
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.loop import fit
from sparse.training.sparsity import SparsityConfig
from tests.helpers.processes import run_helper

ALL = LossWeights()
TERMS = ("ce", "kl", "encode", "decode", "up", "down")


def make(folder, steps=6, lr=2e-2, weights=ALL, warmup=0.02, **sparsity):
    sparsity = dict(density=0.4, embedding_density=0.6, floor=1, anneal_start=0.0) | sparsity
    return CotrainConfig(
        train=TrainConfig(steps=steps, folder=str(folder), log_every=1),
        sparsity=SparsityConfig(**sparsity),
        weights=weights,
        lr=lr,
        warmup=warmup,
        calibration_tokens=60,
    )


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(5)
    return Batches(torch.randint(0, 23, (12, 6), generator=rng), 4)


@torch.no_grad()
def test_validation_measures_the_same_terms_at_all_sites(dense, sparse, bridges, ids):
    got = validate(dense, sparse, bridges, [ids, ids.flip(0)])
    want = losses(dense, sparse, bridges, ids, ALL)  # the mean does not feel the order of rows
    for term in TERMS:
        assert got[term] == pytest.approx(want[term].item(), rel=1e-5)
    assert got["ce_dense"] == pytest.approx(ce_nats(dense.logits(ids), ids).mean().item(), rel=1e-5)
    for name in ("encode", "decode", "up", "down"):
        sites = [got[f"{name}.{s}"] for s in range(5)]
        assert got[name] == pytest.approx(sum(sites) / 5, rel=1e-5) and min(sites) > 0


def test_dropout_acts_in_training_and_not_in_validation(dense, build, bridges, batches, tmp_path):
    ids, values = batches.at(0), {}
    for training in (True, False):
        sparse = build.sparse(dropout=0.5).train(training)
        want = validate(dense, sparse.eval(), bridges, [ids])
        assert validate(dense, sparse.train(training), bridges, [ids]) == want
        assert sparse.training == training
        maps = BridgeSet(BridgeConfig.between(dense, sparse, k=7))
        cotrain(dense, sparse, maps, batches, make(tmp_path / str(training)), [ids])
        assert sparse.training == training
        values[training] = sparse.model.wte.weight.detach().clone()
        batches.step = 0
    assert torch.equal(values[True], values[False])  # whichever mode the twin came in
    plain = build.sparse()
    maps = BridgeSet(BridgeConfig.between(dense, plain, k=7))
    cotrain(dense, plain, maps, batches, make(tmp_path / "plain"), [ids])
    assert not torch.equal(values[True], plain.model.wte.weight)  # control


def test_calibration_takes_the_first_tokens_and_gives_them_back(dense, sparse, batches):
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7))
    calibrate(dense, bridges, batches, 40, "cpu")  # two batches of 24 tokens
    first = torch.cat([batches.at(0), batches.at(1)])
    for i, h in enumerate(dense.residuals(first)):
        assert torch.allclose(bridges.mean[i], h.mean((0, 1)), atol=1e-6)
    assert batches.step == 0
    assert torch.equal(next(iter(batches)), batches.at(0))


def test_calibration_in_batches_is_that_of_all_tokens_at_once(dense, sparse, batches):
    bridges, at_once = (BridgeSet(BridgeConfig.between(dense, sparse, k=7)) for _ in range(2))
    calibrate(dense, bridges, batches, 70, "cpu")
    every = torch.cat([batches.at(t) for t in range(3)])
    at_once.calibrate(dense.residuals(every))
    assert torch.allclose(bridges.mean, at_once.mean, atol=1e-5)
    assert torch.allclose(bridges.scale, at_once.scale, rtol=1e-5)
    last = BridgeSet(bridges.config)
    last.calibrate(dense.residuals(batches.at(2)))  # control: one batch alone is another thing
    assert (last.scale / at_once.scale - 1).abs().max() > 1e-3


def test_after_every_step_each_budget_is_exact_and_no_neuron_is_dead(
    dense, sparse, bridges, batches, tmp_path
):
    steps = 9
    config = make(tmp_path, steps, floor=2, anneal_end=1 / 3)
    module = Cotraining(dense, sparse, bridges, config)
    spared = {n for n, _ in sparse.named_parameters()} - {b.name for b in module.sparsifier.budgets}
    start = {n: p.detach().clone() for n, p in sparse.named_parameters()}
    counted = []

    def project(step):
        before = {n: p.detach().clone() for n, p in sparse.named_parameters()}
        notes = module.sparsifier.project(step)
        now = dict(sparse.named_parameters())
        assert all(torch.equal(now[n], before[n]) for n in spared)
        densities = config.sparsity.densities(step, steps)
        for b in module.sparsifier.budgets:
            keep = int(densities[b.is_embedding] * b.weight.numel())
            if keep < b.weight.numel():
                assert b.weight.count_nonzero() == keep, (b.name, step)
            if b.floor:
                assert b.weight.count_nonzero(dim=1 - b.dim).min() >= 2, (b.name, step)
        counted.append((notes["density/matrices"], notes["density/embeddings"]))
        return notes

    fit(module, batches, config.train, after_step=project)
    assert counted[0] == (1.0, 1.0) and counted[3:] == [(0.4, pytest.approx(0.6))] * 6
    for b in module.sparsifier.budgets:  # and so it stays after the decay
        assert b.weight.count_nonzero() == int((0.6 if b.is_embedding else 0.4) * b.weight.numel())
    assert {n.split(".")[-2] for n in spared if "." in n} >= {"norm_1", "norm", "attn"}
    assert "bigram" in spared
    moved = {n for n, p in sparse.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(start), "everything was trained"
    assert all((sparse.get_parameter(n) != 0).all() for n in spared)


def test_the_target_is_reached_even_where_annealing_ends_with_the_run(
    dense, sparse, bridges, batches, tmp_path
):
    config = make(tmp_path, steps=3, anneal_end=1.0)
    cotrain(dense, sparse, bridges, batches, config)
    w = sparse.model.blocks[0].mlp.fc.weight
    assert w.count_nonzero() == int(0.4 * w.numel())


def test_training_lowers_every_term_and_leaves_the_dense_model_alone(
    dense, sparse, batches, ids, tmp_path
):
    mark = dense.fingerprint
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=10))
    calibrate(dense, bridges, batches, 60, "cpu")
    held = [batches.at(t) for t in range(3)]
    before = validate(dense, sparse, bridges, held)
    cotrain(dense, sparse, bridges, batches, make(tmp_path, steps=50), held)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    after = {n.removeprefix("val/"): v for n, v in log[-1].items() if n.startswith("val/")}
    assert after == validate(dense, sparse, bridges, held)
    for term in TERMS:
        assert after[term] < 0.9 * before[term], term
    assert dense.fingerprint == mark == bridges.dense_fingerprint
    assert bridges.sparse_fingerprint == sparse.fingerprint()
    bridges.check(dense, sparse)
    assert {f"loss/{t}" for t in TERMS} < set(log[0])
    assert log[0]["lr/sparse"] == 0 < log[1]["lr/sparse"]


def test_a_dense_model_whose_weights_are_offloaded_trains_the_twin_to_the_same_bits(
    dense, build, batches, tmp_path
):
    trained = []
    for way in ("plain", "offloaded"):
        model = copy.deepcopy(dense.model)
        if way == "offloaded":
            model = disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
        placed, sparse = DenseModel(model, dense.tokenizer), build.sparse()
        bridges = BridgeSet(BridgeConfig.between(placed, sparse, k=7))
        config = make(tmp_path / way, steps=3)
        planned = plan(placed, sparse, bridges, config, batch=4, length=6)
        given = copy.deepcopy(batches)  # it remembers where it is
        cotrain(placed, sparse, bridges, given, config, validation=[batches.at(0)])
        trained.append((planned, sparse, bridges))
    (want_plan, *want), (got_plan, *got) = trained
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y)
    assert got_plan.step == want_plan.step
    assert (
        got_plan.state["dense model"] < 0.1 * want_plan.state["dense model"]
    )  # they are elsewhere


def test_learning_rates_follow_the_schedules(dense, sparse, bridges, tmp_path):
    when = dict(warmup=0.01, anneal_start=0.01, anneal_end=0.5)
    config = make(tmp_path, steps=1000, lr=0.5, density=0.25, **when)
    twin, maps = Cotraining(dense, sparse, bridges, config).groups()
    assert (twin.name, maps.name) == ("sparse", "bridges")
    assert twin.lr(0) == maps.lr(0) == 0.0
    assert twin.lr(10) == 0.5 * 0.5 and twin.lr(500) == pytest.approx(0.5 * 500 / 990)
    assert maps.lr(10) == config.bridge_lr
    assert twin.eps == 0.1 and maps.eps == 1e-8 and maps.weight_decay == 0
    assert "bigram" not in twin.decayed and "model.norm.weight" not in twin.decayed
    assert {"model.wte.weight", "lm_head.weight"} < twin.decayed
    assert set(twin.params) == {n for n, _ in sparse.named_parameters()}
    assert set(maps.params) == {n for n, _ in bridges.named_parameters()}


def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    dense, sparse, bridges, batches, tmp_path, build
):
    def refused(words, sparse=sparse, bridges=bridges, **sparsity):
        with pytest.raises(ValueError, match=words):
            cotrain(dense, sparse, bridges, batches, make(tmp_path / "run", **sparsity))

    refused("23 tokens and the sparse one 24; .*one tokenizer", sparse=build.sparse(vocab_size=24))
    refused("has 7 sites of width 20, but", sparse=build.sparse(num_hidden_layers=3))
    refused("has 5 sites of width 16, but", sparse=build.sparse(hidden_size=16))
    refused("below the floor of 9 .*raise the density", floor=9)
    with pytest.raises(ValueError, match="sites_per_sequence=6, but 5 sites are bridged"):
        many = replace(make(tmp_path / "run"), sites_per_sequence=6)
        cotrain(dense, sparse, bridges, batches, many)
    bridges.dense_fingerprint = "another"
    refused("dense model's weights .* are not those")
    assert not (tmp_path / "run").exists()


def test_validation_that_would_be_spent_after_one_evaluation_is_refused(
    dense, sparse, bridges, batches, ids, tmp_path
):
    spent = (x for x in [ids])
    unchecked = inspect.unwrap(cotrain)  # the suite's type checks would come first
    with pytest.raises(ValueError, match="generator, which may be spent after"):
        unchecked(dense, sparse, bridges, batches, make(tmp_path / "run"), spent)


@pytest.mark.parametrize("fields", [{}, dict(hybrid_sites="all"), dict(sites_per_sequence=3)])
@pytest.mark.parametrize("tokens", [1.0, 0.5])
def test_the_module_draws_sites_and_tokens_as_the_config_says(
    dense, sparse, bridges, ids, tmp_path, monkeypatch, fields, tokens
):
    config = replace(make(tmp_path), hybrid_tokens=tokens, **fields)
    seen = {}
    real = losses

    def spy(*args, draw, **how):
        seen["drawn"], seen["positions"] = draw
        return real(*args, draw=draw, **how)

    monkeypatch.setattr("bridges.training.cotrain.losses", spy)
    terms = Cotraining(dense, sparse, bridges, config)(ids, step=3)
    assert list(terms) == list(TERMS) and all(x.requires_grad for x in terms.values())
    if config.hybrid_sites == "all":
        assert seen["drawn"] is None
    else:
        assert seen["drawn"].shape == (5, config.sites_per_sequence)
    assert seen["positions"] is None if tokens == 1 else seen["positions"].shape == (5, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(hybrid_sites="all", nmse="per_token"),
        dict(sites_per_sequence=2, hybrid_tokens=0.5, nmse="uncentred"),
        dict(decoder_trains_trunk=False),
        dict(weights=LossWeights(nmse=0.0)),
    ],
)
def test_gradients_of_the_parts_of_a_batch_average_to_that_of_the_whole(
    dense, build, ids, tmp_path, fields
):
    config = replace(make(tmp_path), **fields)
    rows = torch.cat([ids, ids[:1]])
    double = copy.deepcopy(dense.model).double()

    def gradients(n, whole=True):
        sparse = build.sparse().double()
        made = BridgeSet(BridgeConfig.between(dense, sparse, k=7), seed=1).double()
        module = Cotraining(type(dense)(double), sparse, made, config)
        parts = rows.chunk(n)
        known = module.of_whole(parts) if whole else [WHOLE] * n
        terms = [module(x, 3, of) for x, of in zip(parts, known, strict=True)]
        total = {name: sum(t[name] for t in terms) / n for name in TERMS}
        sum(total.values()).backward()
        return total, {name: p.grad for name, p in module.named_parameters()}

    want, grads = gradients(1, whole=False)
    for n in (2, 3):
        terms, mine = gradients(n)
        for name in TERMS:
            assert terms[name].item() == pytest.approx(want[name].item(), rel=1e-12), (n, name)
        for name, g in grads.items():
            assert (mine[name] - g).abs().max() < 1e-12 * max(1, g.abs().max()), (n, name)
    if config.weights.nmse:  # control: parts that know nothing of each other are another loss
        assert abs(gradients(2, whole=False)[0]["decode"] - want["decode"]) > 1e-4


def test_a_run_in_parts_is_the_run_on_whole_batches(dense, build, batches, tmp_path):
    runs = {}
    for n in (1, 2):
        sparse, config = build.sparse(), make(tmp_path / str(n))
        made = BridgeSet(BridgeConfig.between(dense, sparse, k=7), seed=1)
        config = replace(config, train=replace(config.train, accumulate=n))
        cotrain(dense, sparse, made, batches, config)
        runs[n] = [
            json.loads(x) for x in (tmp_path / str(n) / "log.jsonl").read_text().split("\n") if x
        ]
        batches.load_state_dict(batches.state_dict() | {"step": 0})
    for one, two in zip(runs[1], runs[2], strict=True):
        for name in one:
            if name.startswith(("loss/", "grad_rms/")):
                assert two[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)


def test_resuming_with_other_models_or_settings_is_refused(
    dense, sparse, bridges, batches, tmp_path, build
):
    cotrain(dense, copy.deepcopy(sparse), copy.deepcopy(bridges), batches, make(tmp_path, steps=2))
    with pytest.raises(ValueError, match="weights: .* there, .*another output folder"):
        changed = make(tmp_path, steps=2, weights=LossWeights(kl=2.0))
        cotrain(dense, sparse, bridges, batches, changed)
    with pytest.raises(ValueError, match="belongs to another run .dense: "):
        cotrain(build.dense(seed=9), sparse, bridges, batches, make(tmp_path, steps=2))


def test_a_resumed_co_training_computes_with_the_products_of_its_checkpoint(
    dense, build, batches, tmp_path, monkeypatch
):
    used = []
    monkeypatch.setattr("sparse.training.run_state.fastest_products", lambda: "scipy")

    def seen(model, min_entries, products):
        used.append(products)
        return csr_products(model, min_entries, products)

    monkeypatch.setattr("bridges.training.cotrain.csr_products", seen)

    def run(folder, products):
        config = make(folder, steps=2)
        train = replace(config.train, checkpoint_every=1, products=products)
        sparse = build.sparse()
        maps = BridgeSet(BridgeConfig.between(dense, sparse, k=7), seed=1)
        batches.load_state_dict(batches.state_dict() | {"step": 0})
        cotrain(dense, sparse, maps, batches, replace(config, train=train))

    run(tmp_path / "cut", "dense")
    shutil.rmtree(steps_saved(tmp_path / "cut" / "checkpoints")[-1])
    run(tmp_path / "cut", None)
    assert used == ["dense"] * 3
    run(tmp_path / "new", None)
    assert used[3:] == ["scipy"] * 2  # control: what a new run takes


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return kept, [line["step"] for line in lines if "loss/total" in line]


def test_a_run_killed_at_any_step_and_resumed_is_the_undisturbed_run_bit_for_bit(tmp_path):
    out = run_helper("killed_cotraining", tmp_path)
    kills = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(kills) == 4 and all(k["signal"] == 9 and 0 < k["lines"] < 24 for k in kills), kills
    whole, steps = logged(tmp_path / "whole")
    assert steps == list(range(1, 25))
    for name in ("first", "second"):
        assert logged(tmp_path / name) == (whole, steps)
        for file in ("module.safetensors", "adam.safetensors"):
            path = Path("checkpoints") / "step-00000024" / file
            got, want = tmp_path / name / path, tmp_path / "whole" / path
            assert got.read_bytes() == want.read_bytes()


def test_two_processes_train_as_one_on_the_joint_batch(tmp_path):
    """Gradients of every term, in float64; then a few steps in float32.

    There, losses and gradients agree up to the order of summation; normalised and squared by Adam
    at eps 1e-8, rounding can flip the sign of a bridge's smallest steps, hence the looser bound.
    """
    run_helper("cotraining_in_two", tmp_path)
    joint = load_file(tmp_path / "one-0.safetensors")
    for rank in (0, 1):
        mine = load_file(tmp_path / f"two-{rank}.safetensors")
        for term, want in joint.items():
            assert want.abs().max() > 1e-3, term
            assert (mine[term] - want).abs().max() < 1e-12, term
    one = json.loads((tmp_path / "one.json").read_text())
    two = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0]["params"] == two[1]["params"], "both processes hold the same weights"
    for name, value in one["rms"].items():
        assert two[0]["rms"][name] == pytest.approx(value, rel=1e-4), name
    for name, value in one["norms"].items():
        assert two[0]["norms"][name] == pytest.approx(value, rel=1e-3), name
    for term in TERMS:
        mean = (two[0]["losses"][term] + two[1]["losses"][term]) / 2
        assert mean == pytest.approx(one["losses"][term], rel=1e-5), term
        assert two[0]["losses"][term] != two[1]["losses"][term]
