"""However many processes train, and whether each holds all parameters or a share, it is one run.

Everything is in float64, so that nothing but the order of summation differs. The log's losses have
passed through float32.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridges import BridgeConfig, BridgeSet, CotrainConfig, plan
from sparse import SparsityConfig, TrainConfig
from tests.helpers.processes import run_helper

LAST = Path("checkpoints", "step-00000006")
TOGETHER = ["two", "two-of-one", "shard", "shard-of-one", "shard-parts"]
TOGETHER += ["pretrain-two-of-one", "pretrain-shard"]
ALONE = ["one-of-two", "one-of-shard", "pretrain-one-of-shard"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    run_helper("devices", folder)
    return folder


def one_of(name):
    return "pretrain-one" if name.startswith("pretrain") else "one"


def logged(folder):
    """By step, what was logged there."""
    steps = {}
    for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        steps.setdefault(line["step"], {}).update(line)
    return steps


def facts(out, name, rank=0):
    return json.loads((out / f"{name}-{rank}.json").read_text())


def assert_same(got, want, atol):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        if tensor.isfinite().all():
            assert (got[name] - tensor).abs().max() <= atol * tensor.abs().max(), name
        else:  # limits of outlying tokens, where there are none
            assert torch.equal(got[name], tensor), name
        assert torch.equal(got[name] == 0, tensor == 0), f"{name}: other entries survive"


@pytest.mark.parametrize("name", TOGETHER + ALONE)
def test_a_run_of_other_processes_is_the_undisturbed_run_of_one(out, name):
    ranks = (0, 1) if name in TOGETHER else (0,)
    want = load_file(out / f"{one_of(name)}-0.safetensors")
    assert 0.3 < sum((t == 0).sum() for t in want.values()) / sum(map(torch.numel, want.values()))
    for rank in ranks:
        assert_same(load_file(out / f"{name}-{rank}.safetensors"), want, 1e-12)
    for file in ("module.safetensors", "adam.safetensors"):
        assert_same(
            load_file(out / name / LAST / file), load_file(out / one_of(name) / LAST / file), 1e-12
        )
    mine, whole = logged(out / name), logged(out / one_of(name))
    assert list(mine) == list(range(4 if "-of-" in name else 1, 7))
    for step, line in mine.items():
        assert line.keys() == whole[step].keys()
        for key, value in line.items():
            rel = 1e-10 if key.startswith("val/") else 1e-6
            if not key.startswith("time/"):
                assert value == pytest.approx(whole[step][key], rel=rel), (key, step)
    assert any(key.startswith("val/") for key in mine[6])


def test_losses_of_another_step_are_others(out):
    lines = logged(out / "one")
    totals = [line["loss/total"] for line in lines.values()]
    assert min(abs(a / b - 1) for a, b in zip(totals, totals[1:], strict=False)) > 1e-4


@pytest.mark.parametrize("name", ["shard", "shard-of-one", "shard-parts", "pretrain-shard"])
def test_a_shard_is_half_and_the_models_are_whole_and_plain_afterwards(out, name):
    first, second = (facts(out, name, rank) for rank in (0, 1))
    total = first["numel"]
    for held in ("params", "grads", "exp_avg", "exp_avg_sq"):
        parts = first["part"][held], second["part"][held]
        assert sum(parts) == total and max(parts) < 0.51 * total
    for each in (first, second):
        assert each["plain"] and each["hooks"] == 0
        assert each["compressed"] > 0, "products ran on gathered weights by compressed rows"


@pytest.mark.parametrize(("name", "shard"), [("shard", True), ("two", False)])
def test_a_plan_says_what_each_of_two_processes_holds(out, dense, build, name, shard):
    sparse = build.sparse()
    maps = BridgeSet(BridgeConfig.between(dense, sparse, k=7))
    train = TrainConfig(steps=6, folder="unused", shard=shard)
    config = CotrainConfig(train=train, sparsity=SparsityConfig(density=0.1, floor=1))
    p = plan(dense, sparse, maps, config, 8, 6, processes=2)
    state = p.state["weights of twin and bridges"] - sum(b.nbytes for b in maps.buffers())
    for rank in (0, 1):
        part = facts(out, name, rank)["part"]
        moments = part["exp_avg"] + part["exp_avg_sq"]
        assert p.state["Adam's moments"] / 4 == pytest.approx(moments, rel=0.03)
        assert state / 4 == pytest.approx(part["params"], rel=0.03)


def test_without_sharding_every_process_holds_everything(out):
    for rank in (0, 1):
        mine = facts(out, "two", rank)
        assert set(mine["part"].values()) == {mine["numel"]}


def test_fewer_validation_batches_than_processes_are_scored_alike_by_all(out):
    want = facts(out, "one")["fewer"]
    assert want > 0 and want != logged(out / "one")[6]["val/down"]
    for rank in (0, 1):
        assert facts(out, "shard", rank)["fewer"] == pytest.approx(want, rel=1e-10)


def test_a_failure_of_one_process_ends_the_other_at_once(out):
    when, error = (out / "ended").read_text().split(maxsplit=1)
    assert float(when) - float((out / "failed").read_text()) < 60
    assert "ArithmeticError: met by process 1 alone" in error or "closed" in error
