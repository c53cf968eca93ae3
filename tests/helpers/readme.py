"""The README's blocks, and its commands made small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = {  # what sets up and what is this suite itself: `make` runs the same words
    "python -m venv .venv",
    ". .venv/bin/activate",
    'pip install -c constraints.txt -e ".[test]"',
    "pytest -n 2",
}
SMOKE = {  # example: what is appended to its README command to make it small (the last flag wins)
    "train_bridge.py": "--preset smoke --threads 1 --dataset text.txt --tasks single_double_quote "
    "--output_dir runs/tiny-demo",
    "quickstart.py": "--draws 5",
    "sparsity_study.py": "--dataset text.txt --steps 2 --prune_steps 2 --seeds 1 --target_loss 2",
    "bridge_study.py": "--dataset text.txt --steps 2 --cells default",
    "check_task.py": "while_return_true",
    "task_study.py": "--seeds 1 --prune_steps 2 --tasks while_return_true",
    "find_circuit.py": "--prune_steps 4 --force",
    "map_to_dense.py": "",
    "evaluate.py": "--draws 4",
    "train_sparse.py": "--dataset text.txt --steps 4",
    "train_dense.py": "--dataset text.txt --smoke",
    "evals": "--quick --draws 4",
    "open_release.py": "",
}
MAIN_JOB = "accelerate launch examples/train_bridge.py --dense tiny"


def blocks(language: str) -> list[str]:
    """Return the README's blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def commands() -> list[str]:
    """Return the lines of the README's bash blocks."""
    return [line.strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def small(line: str) -> list[str]:
    """Return the words of a README command with the flags of SMOKE added."""
    words = shlex.split(line)
    jobs = [name for word in words if (name := Path(word).name) in SMOKE]
    if not jobs:
        raise KeyError(f"say in SMOKE (tests/helpers/readme.py) how to run it small: {line}")
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "accelerate":
        words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return words + shlex.split(SMOKE[jobs[0]])


def run_words(words: list[str], folder: Path) -> str:
    """Return what a command prints, run in `folder`; fail if it fails or asks for the network."""
    # what `pip install -e .` gives; the examples must do without
    installed = [] if any(word.startswith(str(ROOT / "examples")) for word in words) else [ROOT]
    path = os.pathsep.join([os.environ["PYTHONPATH"], *map(str, installed)])
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    shown = f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, shown
    assert "refused a connection" not in done.stderr, shown
    return done.stdout
