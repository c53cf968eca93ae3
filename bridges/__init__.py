"""Two-way linear maps between a dense model and its weight-sparse twin, and what they carry."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from .cost.plan import Plan, plan
    from .cost.step_time import StepTime, time_steps
    from .maps.bridge import BridgeConfig, BridgeSet
    from .maps.site_map import even_sites, fit_sites
    from .planted import PlantedPair, plant_pair
    from .presets.flags import add_flags, new_folder, positive, preset_table, with_flags
    from .presets.planned import planned
    from .presets.preset import PRESETS, Design, Preset
    from .presets.text import RunText, read_text
    from .run_folder import Run, load_run, save_run
    from .task_circuits import choose_tasks, find_circuits
    from .training.config import CotrainConfig, LossWeights
    from .training.cotrain import cotrain
    from .training.torch_compile import compiled
    from .training.validate import validate, validation_sequences
    from .transfer.dense_circuit import DenseCircuit
    from .transfer.intervention import Ablation, Steering
    from .transfer.map_circuit import map_circuit

__version__ = "0.1.0"
__sparse_bridges__ = "bridges"
__all__ = [
    "Ablation",
    "BridgeConfig",
    "BridgeSet",
    "CotrainConfig",
    "DenseCircuit",
    "LossWeights",
    "Plan",
    "PlantedPair",
    "Design",
    "PRESETS",
    "Preset",
    "Run",
    "RunText",
    "Steering",
    "StepTime",
    "add_flags",
    "choose_tasks",
    "compiled",
    "cotrain",
    "even_sites",
    "find_circuits",
    "fit_sites",
    "new_folder",
    "load_run",
    "map_circuit",
    "plan",
    "plant_pair",
    "planned",
    "positive",
    "preset_table",
    "read_text",
    "save_run",
    "time_steps",
    "validate",
    "validation_sequences",
    "with_flags",
]

_HOME = {
    "BridgeConfig": "maps.bridge",
    "BridgeSet": "maps.bridge",
    "CotrainConfig": "training.config",
    "LossWeights": "training.config",
    "choose_tasks": "task_circuits",
    "find_circuits": "task_circuits",
    "compiled": "training.torch_compile",
    "cotrain": "training.cotrain",
    "Plan": "cost.plan",
    "plan": "cost.plan",
    "StepTime": "cost.step_time",
    "time_steps": "cost.step_time",
    "even_sites": "maps.site_map",
    "fit_sites": "maps.site_map",
    "validate": "training.validate",
    "validation_sequences": "training.validate",
    "PlantedPair": "planted",
    "Design": "presets.preset",
    "add_flags": "presets.flags",
    "new_folder": "presets.flags",
    "positive": "presets.flags",
    "preset_table": "presets.flags",
    "with_flags": "presets.flags",
    "PRESETS": "presets.preset",
    "Preset": "presets.preset",
    "planned": "presets.planned",
    "RunText": "presets.text",
    "read_text": "presets.text",
    "plant_pair": "planted",
    "Run": "run_folder",
    "load_run": "run_folder",
    "save_run": "run_folder",
    "DenseCircuit": "transfer.dense_circuit",
    "map_circuit": "transfer.map_circuit",
    "Ablation": "transfer.intervention",
    "Steering": "transfer.intervention",
}


def _check_siblings() -> None:
    """Raise ImportError where `sparse`, `dense` or `evals` is somebody else's package.

    PyData's `sparse` and OpenAI's `evals` have the same import names, and Python takes whichever
    comes first on sys.path. The check reads the text of each package's __init__.py and looks for
    our mark in it; it imports none of them.
    """
    for name in ("sparse", "dense", "evals"):
        spec = find_spec(name)
        found = Path(spec.origin) if spec and spec.origin else None
        if found is None or f'__sparse_bridges__ = "{name}"' not in found.read_text():
            raise ImportError(
                f"the package `{name}` of sparse-bridges is hidden by {found or 'nothing at all'}; "
                f"put {Path(__file__).resolve().parents[1]} first on sys.path (PYTHONPATH), or use "
                f"an environment without the other `{name}`, or reinstall sparse-bridges if the "
                "other package overwrote it"
            )


_check_siblings()


_RENAMED = {"Weights": "LossWeights", "Probe": "StepTime", "probe": "time_steps"}
"""Old public names to new ones. An old name still works, with a DeprecationWarning."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that --help stays quick."""
    if name in _RENAMED:
        new = _RENAMED[name]
        warn(f"bridges.{name} is now bridges.{new}", DeprecationWarning, stacklevel=2)
        name = new
    if name not in _HOME:
        raise AttributeError(f"module 'bridges' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
