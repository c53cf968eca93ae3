"""A launch that came out as other processes than were asked for is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from sparse.storage.checkpoint import read_folder
from sparse.training.config import TrainConfig
from sparse.training.pretrain import pretrain
from sparse.training.processes import accelerator_for
from sparse.training.shard import prepared
from tests.helpers.processes import ROOT, environment
from tests.helpers.small_run import batches, build, preset

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
NONE = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE", "ACCELERATE_USE_CPU"}


def start(command, *args, **env):
    env = {k: v for k, v in environment().items() if k not in NONE} | env
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [*command, "-m", "tests.helpers.launched", *args]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=ROOT, env=env, **quiet)


def test_a_launch_that_silently_trains_alone_is_refused_and_the_remedy_trains_together():
    started = {
        "alone": start([*LAUNCH, "--cpu", "--num_processes", "2"]),
        "remedy": start(TORCHRUN, "2", ACCELERATE_USE_CPU="true"),
    }
    said = {n: p.communicate(timeout=200)[0].decode().splitlines() for n, p in started.items()}
    assert said["remedy"] == ["2 together"] * 2
    assert "asked for several processes and started one" in said["alone"][0]
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2" in said["alone"][0]


def checked(monkeypatch, asked=None, **env):
    for name in NONE:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    given = Accelerator(cpu=not torch.cuda.is_available())
    return accelerator_for(TrainConfig(steps=1, folder="", processes=asked), given).num_processes


def test_one_process_trains_where_one_or_nothing_was_asked_for(monkeypatch):
    assert checked(monkeypatch) == checked(monkeypatch, 1) == 1
    assert checked(monkeypatch, ACCELERATE_MIXED_PRECISION="no") == 1  # accelerate launch, one
    said = dict(ACCELERATE_MIXED_PRECISION="no", MASTER_PORT="1")  # accelerate launch, two
    assert checked(monkeypatch, 1, **said) == 1
    with pytest.raises(ValueError, match="if one is meant, say TrainConfig.processes=1"):
        checked(monkeypatch, **said)
    assert checked(monkeypatch, MASTER_PORT="1") == 1  # a cluster's setting, not a launcher's
    assert checked(monkeypatch, WORLD_SIZE="1", MASTER_PORT="1") == 1  # torchrun, one


def test_another_number_of_processes_than_was_asked_for_is_refused(monkeypatch):
    with pytest.raises(
        ValueError,
        match="processes=3, but the number that train together is 1; .*per_node 3 SCRIPT",
    ):
        checked(monkeypatch, 3)
    with pytest.raises(ValueError, match="4 processes were started, but this one trains alone"):
        checked(monkeypatch, 1, WORLD_SIZE="4")
    with pytest.raises(ValueError, match="TrainConfig.processes=0 must be at least 1, or None"):
        checked(monkeypatch, 0)


def test_a_tied_model_is_saved_under_both_names_and_resumed(tmp_path):
    config = preset(tmp_path, model=dict(tie_word_embeddings=True), train=dict(steps=6))
    model = build(config)
    pretrain(model, batches(), config.pretrain)
    saved, _ = read_folder(tmp_path / "checkpoints" / "step-00000006", "module")
    twins = [saved["module"][f"model.{name}.weight"] for name in ("lm_head", "model.wte")]
    assert torch.equal(*twins) and torch.equal(twins[0], model.lm_head.weight)
    again = build(config, seed=1)
    assert not torch.equal(again.lm_head.weight, model.lm_head.weight)
    pretrain(again, batches(), config.pretrain)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.lm_head.weight is again.model.wte.weight


def test_one_process_that_is_asked_to_shard_trains_as_ever():
    module = torch.nn.Linear(2, 2)
    with prepared(module, Accelerator(cpu=True), shard=True) as wrapped:
        assert wrapped is module
    assert type(module.weight) is torch.nn.Parameter


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    accelerator, plugin = Accelerator(cpu=True), SimpleNamespace(fsdp_version=1, cpu_offload=None)
    state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    monkeypatch.setattr(accelerator, "state", state)
    with pytest.raises(ValueError, match="only version 2 without offloading .*--fsdp_version 2"):
        with prepared(torch.nn.Linear(2, 2), accelerator, shard=False):
            pass
