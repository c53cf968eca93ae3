"""A pretraining may be killed, stopped, repeated and shared, and stays the same pretraining."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sparse.ops.project import project_
from sparse.storage.checkpoint import read_folder, steps_saved
from sparse.training.heldout import heldout_nats
from sparse.training.loop import fit
from sparse.training.pretrain import Pretraining, pretrain
from sparse.training.sparsity import budgets
from tests.helpers.processes import run_helper
from tests.helpers.small_run import HELD, STEPS, batches, build, logged, preset


def run_script(name, *args):
    said = run_helper(name, *args)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def run(folder, seed=0, **fields):
    config = preset(folder, **fields)
    model = build(config, seed)
    pretrain(model, batches(seed + 1), config.pretrain, HELD)
    return model


def same_run(a, b):
    """Say whether two runs wrote the same log and the same last checkpoint, byte for byte."""
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    files = [last / "module.safetensors", last / "adam.safetensors"]
    bytes_equal = all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    return logged(a) == logged(b) and bytes_equal


def test_a_run_killed_at_random_moments_is_the_undisturbed_run_bit_for_bit(tmp_path):
    kills = run_script("killed_pretraining", tmp_path, "random")
    assert len(kills) == 5 and all(k["signal"] == 9 and 0 < k["lines"] < STEPS for k in kills)
    assert [x["step"] for x in logged(tmp_path / "whole") if "loss/ce" in x] == [*range(1, 25)]
    assert same_run(tmp_path / "random", tmp_path / "whole")


def test_a_run_killed_at_every_operation_on_its_files_is_the_undisturbed_run_bit_for_bit(tmp_path):
    kills = run_script("killed_pretraining", tmp_path, "writing")
    operations = [k["operation"] for k in kills if "operation" in k]
    assert {"save_file", "sync", "replace", "rmtree"} <= set(operations)
    left = [name for k in kills for name in k.get("left", ())]
    assert any(name.endswith(".partial") for name in left), "a kill was in the middle of a write"
    assert len([k for k in kills if k.get("signal") == 9]) == len(operations) > 15
    assert same_run(tmp_path / "writing", tmp_path / "whole")
    names = {p.name for p in (tmp_path / "writing" / "checkpoints").iterdir()}
    assert names == {"step-00000021", "step-00000024"}, "the last two stay, and no half"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What pretraining_in_two.py wrote: by name, the facts and the tensors."""
    folder = tmp_path_factory.mktemp("shared")
    run_script("pretraining_in_two", folder)
    found = {}
    for path in folder.glob("*.json"):
        tensors = load_file(path.with_suffix(".safetensors"))
        found[path.stem] = (json.loads(path.read_text()), tensors)
    logs = {path.name: logged(path) for path in (folder / "runs").iterdir()}
    return found, logs


def test_two_processes_give_the_gradients_of_one_with_the_joint_batch(shared):
    found, _ = shared
    one = found["one"][1]
    grads = [name for name in one if name.startswith("grad/")]
    assert len(grads) == len(one) - len(grads) == 15
    for rank in (0, 1):
        two = found[f"whole-{rank}"][1]
        for name in grads:  # normalised to root mean square 1; rounding alone differs
            assert torch.allclose(two[name], one[name], atol=1e-5), name
        for name in one.keys() - set(grads):
            assert torch.equal(two[name], found["whole-0"][1][name]), "all hold the same weights"
            assert torch.allclose(two[name], one[name], atol=1e-5), name


def test_passes_over_parts_of_a_batch_give_the_gradients_of_the_whole_in_one_process_and_two(
    shared,
):
    found, logs = shared
    one = found["one"][1]
    for name, tensor in one.items():
        assert torch.allclose(found["passes"][1][name], tensor, atol=1e-5), name
        if not name.startswith("grad/"):  # this one was also stopped and resumed on the way
            assert torch.allclose(found["resumed-0"][1][name], tensor, atol=1e-5), name
    assert len(found["passes"][0]["losses"]) == 4 * len(found["one"][0]["losses"])
    assert logs["passes"][-2]["loss/ce"] == pytest.approx(logs["one"][-2]["loss/ce"], rel=1e-5)


def test_the_log_and_the_evaluation_are_of_all_processes(shared):
    found, logs = shared
    first, second = (found[f"whole-{rank}"][0] for rank in (0, 1))
    lines = [line for line in logs["whole"] if "loss/ce" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        parts = [x["losses"][line["step"] - 1] for x in (first, second)]
        assert line["loss/ce"] == pytest.approx(sum(parts) / 2, rel=1e-6)
        assert line["loss/ce"] != pytest.approx(parts[0], rel=1e-4)  # control: one share
    alone = found["one"][0]
    assert [x["loss/ce"] for x in lines] == pytest.approx(
        [x["loss/ce"] for x in logs["one"] if "loss/ce" in x], rel=1e-5
    )
    assert first["heldout"] == second["heldout"] == pytest.approx(alone["heldout"], rel=1e-6)


def test_a_stop_signal_to_one_process_stops_all_at_the_next_line_of_the_log(shared):
    found, logs = shared
    told = [found[f"stopped-{rank}"][0]["stopped"] for rank in (0, 1)]
    assert "SIGTERM after step 8" in told[1]  # asked for in step 5; the log has every fourth
    assert "a signal to another process after step 8" in told[0]
    assert len(found["stopped-0"][0]["losses"]) == 2 * 8, "two passes in each of 8 steps"
    assert len(found["resumed-0"][0]["losses"]) == 2 * 4
    assert not found["resumed-0"][0]["stopped"] and not found["whole-0"][0]["stopped"]
    assert [x["step"] for x in logs["stopped"] if "loss/ce" in x] == [4, 8, 12]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    fields = dict(model=dict(dropout=0.1))
    for name in ("a", "b"):
        torch.manual_seed(len(name) + hash(name) % 100)  # the caller's own draws do not matter
        run(tmp_path / name, **fields)
    assert same_run(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "c", **fields, train=dict(seed=1))  # control: other dropout, the same batches
    assert not same_run(tmp_path / "a", tmp_path / "c")
    run(tmp_path / "d", seed=1)  # control: other weights and batches
    assert not same_run(tmp_path / "a", tmp_path / "d")


class Counted(Pretraining):
    """Counts the nonzero entries of every tensor before and after each projection."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counts = {}

    def project(self, step):
        notes = self.sparsifier.project(step)
        self.check(step)
        return notes

    def forward(self, ids, step):
        if step:  # what the step before left, after its decay; or what was resumed
            self.check(step - 1)
        return super().forward(ids, step)

    def check(self, step):
        densities = self.config.sparsity.densities(step, STEPS)
        for b in self.sparsifier.budgets:
            keep = int(densities[b.is_embedding] * b.weight.numel())
            assert b.weight.count_nonzero() == keep, (b.name, step)
            if b.floor:
                assert b.weight.count_nonzero(dim=1 - b.dim).min() >= b.floor, (b.name, step)
        self.counts[step] = self.counts.get(step, 0) + 1


def test_every_budget_is_exact_after_every_step_and_after_a_resume(tmp_path):
    config = preset(tmp_path, sparsity=dict(density=0.1, anneal_end=1 / 3))
    model = build(config)
    for name, p in model.named_parameters():  # at rate 0 the first step would leave them all zero
        torch.nn.init.normal_(p, std=0.02) if name.endswith("bias") else None
    first = Counted(model, config.pretrain)

    def cut(step):
        if step == 16:
            raise KeyboardInterrupt
        return first.project(step)

    with pytest.raises(KeyboardInterrupt):
        fit(first, batches(), config.pretrain.train, after_step=cut)
    again = Counted(build(config, seed=5), config.pretrain)
    fit(again, batches(), config.pretrain.train, after_step=again.project)
    assert first.counts == dict.fromkeys(range(15), 2) | {15: 2}
    # resumed at step 15: what the checkpoint held is counted before anything else
    assert again.counts == {14: 1} | dict.fromkeys(range(15, 23), 2) | {23: 1}
    spared = {n for n, _ in again.model.named_parameters()} - {
        b.name for b in again.sparsifier.budgets
    }
    assert "bigram" in spared
    assert all(again.model.get_parameter(n).count_nonzero() > 0 for n in spared)


@pytest.mark.parametrize("floor", [0, 2])
def test_a_budget_is_missed_only_by_the_zeros_that_were_chosen(floor):
    """nonzeros after = budget - chosen entries that were zero (pretrain.py)."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(8, 10, generator=rng)
    w[torch.rand(8, 10, generator=rng) < 0.6] = 0
    w[3] = 0  # a dead row: its floor is filled with zeros
    before = w.count_nonzero().item()
    for keep in (70, 40, 20):
        v = w.clone()
        project_(v, keep, floor)
        dead = floor * 1  # every other row has its floor in nonzero entries
        assert all(w[i].count_nonzero() >= floor for i in range(8) if i != 3)
        assert v.count_nonzero() == min(before, keep - dead), keep


def test_weights_gradients_and_moments_are_float32_while_products_run_in_bfloat16(tmp_path):
    seen = {"product": set(), "grad": set(), "loss": set()}
    AcceleratorState._reset_state(True)
    try:
        config = preset(tmp_path, train=dict(mixed_precision="bf16"))
        module = Pretraining(build(config), config.pretrain)
        for linear in (m for m in module.modules() if isinstance(m, torch.nn.Linear)):
            linear.register_forward_hook(lambda m, x, y: seen["product"].add(y.dtype))

        def watch(step):
            seen["grad"] |= {p.grad.dtype for p in module.parameters()}
            return module.sparsifier.project(step)

        fit(module, batches(), config.pretrain.train, after_step=watch)
    finally:
        AcceleratorState._reset_state(True)
    assert seen["product"] == {torch.bfloat16} and seen["grad"] == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    saved, _ = read_folder(steps_saved(tmp_path / "checkpoints")[-1], "module", "adam")
    assert {t.dtype for named in saved.values() for t in named.values()} == {torch.float32}
    w = module.model.lm_head.weight.detach()
    assert not torch.equal(w, w.bfloat16().float()), "the masters hold more than bfloat16"


def test_how_often_something_is_written_may_change_on_the_way(tmp_path):
    class PowerCut(Exception):
        pass

    run(tmp_path / "whole")
    config = preset(tmp_path / "cut", train=dict(log_every=1))
    module = Pretraining(build(config), config.pretrain)

    def cut(step):
        if step == 13:
            raise PowerCut
        return module.sparsifier.project(step)

    identity = dict(model=config.model.architecture())
    with pytest.raises(PowerCut):
        fit(module, batches(), config.pretrain.train, after_step=cut, identity=identity)
    other = preset(
        tmp_path / "cut",
        train=dict(log_every=7, evaluate_every=2, checkpoint_every=4, keep_checkpoints=3),
    )
    again = Pretraining(build(other), other.pretrain)
    fit(
        again,
        batches(),
        other.pretrain.train,
        after_step=again.sparsifier.project,
        identity=identity,
    )
    whole, _ = read_folder(steps_saved(tmp_path / "whole" / "checkpoints")[-1], "module", "adam")
    cut, _ = read_folder(steps_saved(tmp_path / "cut" / "checkpoints")[-1], "module", "adam")
    for stem, named in whole.items():
        assert all(torch.equal(t, cut[stem][n]) for n, t in named.items())
    assert [x["step"] for x in logged(tmp_path / "cut")] == [*range(1, 13), 14, 21, 24]
    third = preset(tmp_path / "cut", train=dict(accumulate=2))  # control: this one computes
    with pytest.raises(ValueError, match="accumulate: 1 there, 2 here"):
        fit(
            again,
            batches(),
            third.pretrain.train,
            after_step=again.sparsifier.project,
            identity=identity,
        )


def test_dropout_is_off_while_evaluating_and_the_mode_is_put_back(tmp_path):
    config = preset(tmp_path, model=dict(dropout=0.5))
    model = build(config).train()
    assert heldout_nats(model, HELD) == heldout_nats(model, HELD)
    assert model.training
    plan = budgets(model, config.pretrain.sparsity)
    assert plan and not torch.equal(model(HELD[0]).logits, model(HELD[0]).logits)  # control
