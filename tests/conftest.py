"""What holds for the whole suite: no network, no cache of the user's, few threads; the examples.

Set before torch or Hugging Face are imported, since they read their environment once.
"""

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.offline import sitecustomize as offline

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ROOT / "tests" / "offline"
HOME = tempfile.mkdtemp(prefix="sparse-bridges-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

os.environ |= {
    "HF_HOME": HOME,  # an empty cache, and no settings of `accelerate config`
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")])),
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for one another are slower
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)

SMOKE = {  # example: what is appended to its README command to make it small (the last flag wins)
    "train_bridge.py": "--preset smoke --threads 1 --dataset text.txt --tasks single_double_quote "
    "--output_dir runs/tiny-demo",
    "quickstart.py": "--draws 5",
    "sparsity_study.py": "--dataset text.txt --steps 2 --prune_steps 2 --seeds 1",
    "bridge_study.py": "--dataset text.txt --steps 2 --cells default",
    "find_circuit.py": "--prune_steps 4",
    "map_to_dense.py": "",
    "evaluate.py": "--draws 4",
    "train_sparse.py": "--dataset text.txt --steps 4",
    "train_dense.py": "--dataset text.txt --smoke",
    "evals": "--quick --draws 4",
    "open_release.py": "",
}
MAIN_JOB = "accelerate launch examples/train_bridge.py --dense tiny"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, and what takes long or needs a network unless asked for."""
    import torch

    asked = config.getoption("-m")
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "slow": None if "slow" in asked else "takes minutes; pytest -m slow runs it",
        "network": None if "network" in asked else "needs the internet; pytest -m network runs it",
    }
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_asks_for_the_network():
    """Fail a test that tried to leave this machine, even where the code survived the refusal."""
    yield
    tried, offline.refused[:] = list(offline.refused), []
    assert not tried, f"this test tried to reach {tried}"


@pytest.fixture
def refused_hosts() -> list[str]:
    """The hosts that this process tried to reach."""
    return offline.refused


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository, with a little text, in which commands are run."""
    folder = tmp_path_factory.mktemp("a workplace")
    library = Path(sysconfig.get_path("stdlib"))
    modules = [library / f"{name}.py" for name in ("argparse", "ast", "inspect", "typing")]
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in modules)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def readme_commands() -> list[str]:
    """The lines of the README's bash blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def run_command(workplace: Path) -> Callable[[str], str]:
    """`run_command(line)`: what a README command prints, run small, once, in the workplace.

    Commands read the run folder that the main job leaves, so that one is run first.
    """

    done: dict[str, str | AssertionError] = {}

    def run(line: str) -> str:
        if line != MAIN_JOB:
            run(MAIN_JOB)
        if line not in done:
            try:
                done[line] = _run(small(line), workplace)
            except AssertionError as error:  # do not run for minutes to fail again
                done[line] = error
        if isinstance(result := done[line], AssertionError):
            raise result
        return result

    return run


@pytest.fixture(scope="session")
def main_job(run_command: Callable[[str], str]) -> str:
    """What the main job prints, run small; its run folder is runs/tiny-demo in the workplace."""
    return run_command(MAIN_JOB)


@pytest.fixture(scope="session")
def run_python(workplace: Path) -> Callable[[str], str]:
    """`run_python(code)`: what Python prints in the workplace, where our packages are installed."""
    return lambda code: _run([sys.executable, "-c", code], workplace)


def small(line: str) -> list[str]:
    """Return the words of a README command with the flags of SMOKE added."""
    words = shlex.split(line)
    jobs = [name for word in words if (name := Path(word).name) in SMOKE]
    if not jobs:
        raise KeyError(f"say in SMOKE (tests/conftest.py) how to run it small: {line}")
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "accelerate":
        words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return words + shlex.split(SMOKE[jobs[0]])


def _run(words: list[str], folder: Path) -> str:
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
