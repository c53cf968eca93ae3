"""Pretrain in processes that are killed and started again; print each kill.

    python -m tests.helpers.killed_pretraining FOLDER HOW

    random     at moments drawn with a fixed seed
    writing    at every operation on files, one after another

FOLDER/whole is undisturbed, FOLDER/random or FOLDER/writing is not. Every run is a process of its
own, forked before anything was computed, so that torch is imported once.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import sparse.storage.atomic
import sparse.storage.checkpoint
from sparse.training.pretrain import pretrain
from tests.helpers.small_run import HELD, batches, build, preset


def train(folder: Path) -> None:
    config = preset(folder, model=dict(dropout=0.1))
    pretrain(build(config), batches(), config.pretrain, HELD)


def start(folder: Path, die_at: int = 0) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress bar
        if die_at:
            die_at_operation(die_at)
        train(folder)
        os._exit(0)
    return pid


def n_lines(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_bytes().count(b'"loss/total"') if path.exists() else 0


def end(pid: int, folder: Path, name: str) -> bool:
    """Wait for the process; say whether it was killed, and at what."""
    _, status = os.waitpid(pid, 0)
    assert status == 0 or os.WIFSIGNALED(status), f"{folder} ended with status {status}"
    if killed := os.WIFSIGNALED(status):
        told = {"signal": os.WTERMSIG(status), "lines": n_lines(folder), "at": name}
        sys.stdout.write(json.dumps(told) + "\n")
    return killed


def kill_at_random(folder: Path) -> None:
    rng = random.Random(0)
    for low, high in ((1, 5), (6, 9), (10, 13), (14, 17), (18, 22)):
        pid = start(folder)
        lines, delay = rng.randint(low, high), rng.random() * 0.02
        while n_lines(folder) < lines:
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert end(pid, folder, "random")
    assert not end(start(folder), folder, "")


def die_at_operation(n: int) -> None:
    """Let this process die just before its n-th operation on files, or in the middle of a write."""
    seen = 0

    def dying(owner, name: str, half=None):
        real = getattr(owner, name)

        def operation(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == n:
                if half:
                    real(*args, **kwargs)
                    half(*args)
                (FOLDER / "died").write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, operation)

    def cut(path) -> None:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)

    dying(sparse.storage.checkpoint, "save_file", lambda tensors, path, *_: cut(path))
    dying(sparse.storage.checkpoint, "sync")
    dying(sparse.storage.atomic, "sync")
    dying(os, "replace")
    dying(shutil, "rmtree")
    dying(Path, "rename")
    dying(Path, "write_bytes", lambda path, *_: cut(path))


def kill_at_every_operation(folder: Path) -> None:
    n, killed = 0, True
    while killed:
        n += 1
        pid = start(folder, die_at=n)
        killed = end(pid, folder, f"operation {n}")
        if killed:
            name = (FOLDER / "died").read_text()
            left = sorted(p.name for p in (folder / "checkpoints").glob("*"))
            sys.stdout.write(json.dumps({"operation": name, "left": left}) + "\n")


if __name__ == "__main__":
    FOLDER, how = Path(sys.argv[1]), sys.argv[2]
    FOLDER.mkdir(parents=True, exist_ok=True)
    assert not end(start(FOLDER / "whole"), FOLDER / "whole", "")
    {"random": kill_at_random, "writing": kill_at_every_operation}[how](FOLDER / how)
