"""Co-train in processes that are killed at random moments and started again; print each kill.

    python -m tests.helpers.killed_cotraining FOLDER

FOLDER/whole is undisturbed; FOLDER/first and FOLDER/second are killed twice each. Every run is a
process of its own, forked before anything was computed, so that torch is imported once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from bridges.maps.bridge import BridgeConfig, BridgeSet
from bridges.training.config import CotrainConfig
from bridges.training.cotrain import cotrain
from sparse.text.batches import Batches
from sparse.training.config import TrainConfig
from sparse.training.sparsity import SparsityConfig
from tests.helpers.pair import VOCAB, build_dense, build_sparse

STEPS = 24


def train(folder: Path) -> None:
    dense, sparse = build_dense(), build_sparse()
    blocks = torch.randint(0, VOCAB, (20, 6), generator=torch.Generator().manual_seed(0))
    config = CotrainConfig(
        train=TrainConfig(
            steps=STEPS, folder=str(folder), log_every=1, evaluate_every=5, checkpoint_every=3
        ),
        sparsity=SparsityConfig(density=0.4, embedding_density=0.6, floor=1),
        calibration_tokens=60,
    )
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=7))
    cotrain(dense, sparse, bridges, Batches(blocks, 4), config, [blocks[:3]])


def start(folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress bar
        train(folder)
        os._exit(0)
    return pid


def n_lines(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b'"loss/total"') if path.exists() else 0


def kill(folder: Path, lines: int, delay: float) -> None:
    """Start, wait until the log has that many lines and a little more, and kill."""
    pid = start(folder)
    while n_lines(folder) < lines:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    sys.stdout.write(json.dumps({"signal": os.WTERMSIG(status), "lines": n_lines(folder)}) + "\n")


def finish(folder: Path) -> None:
    _, status = os.waitpid(start(folder), 0)
    assert status == 0, f"{folder} ended with status {status}"


if __name__ == "__main__":
    out, rng = Path(sys.argv[1]), random.Random(0)
    finish(out / "whole")
    for name in ("first", "second"):
        for low, high in ((1, 9), (11, 20)):
            kill(out / name, rng.randint(low, high), rng.random() * 0.02)
        finish(out / name)
