"""A launch that came out as other processes than were asked for is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sparse.train import TrainConfig, accelerator_for

SCRIPT = str(Path(__file__).with_name("launched.py"))
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
NONE = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE", "ACCELERATE_USE_CPU"}


def start(command, *args, **env):
    env = {k: v for k, v in os.environ.items() if k not in NONE} | env
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [*command, SCRIPT, *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_launches_that_silently_train_alone_are_refused_and_the_remedy_trains_together():
    started = {
        "cpu": start([*LAUNCH, "--cpu", "--num_processes", "2"]),
        "apart": start([*LAUNCH, "--multi_gpu", "--num_processes", "2"]),
        "remedy": start(TORCHRUN, "2", ACCELERATE_USE_CPU="true"),
    }
    lines = {
        name: p.communicate(timeout=120)[0].decode().splitlines() for name, p in started.items()
    }
    assert lines["remedy"] == ["2 together"] * 2
    assert "asked for several processes and started one" in lines["cpu"][0]
    assert [x.split(",")[0] for x in lines["apart"]] == ["refused: 2 processes were started"] * 2
    assert all(
        "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2" in lines[n][0]
        for n in ("cpu", "apart")
    )


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
    with pytest.raises(ValueError, match="processes=3, but 1 trains together; .*per_node 3 SCRIPT"):
        checked(monkeypatch, 3)
    with pytest.raises(ValueError, match="4 processes were started, but this one trains alone"):
        checked(monkeypatch, 1, WORLD_SIZE="4")
    with pytest.raises(ValueError, match="TrainConfig.processes=0 must be at least 1, or None"):
        checked(monkeypatch, 0)
