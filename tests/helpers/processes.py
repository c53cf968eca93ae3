"""Start Python in a process of its own, where the packages under test come first."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    """Return the variables of a child: this repository is first on its path, and it runs alone."""
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    alone = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | alone | {"PYTHONPATH": os.pathsep.join(path)} | changes


def run_python(*words: object, timeout: int = 600, **changes: str) -> str:
    """Return what `python WORDS` printed; fail with all that it said if it did not end well."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_helper(name: str, *args: object, **changes: str) -> str:
    """Return what `python -m tests.helpers.NAME ARGS` printed."""
    return run_python("-m", f"tests.helpers.{name}", *args, **changes)
