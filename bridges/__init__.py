"""Two-way linear maps between a dense model and its weight-sparse twin, and what they carry."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bridge import BridgeConfig, BridgeSet
    from .compiling import compiled
    from .cotraining import cotrain, validate
    from .intervene import DenseCircuit
    from .planning import Plan, plan
    from .probing import Probe, probe
    from .run import Run, load_run, save_run
    from .settings import CotrainConfig, Weights
    from .sitemap import even_sites, fit_sites
    from .transfer import map_circuit

__version__ = "0.1.0"
__sparse_bridges__ = "bridges"
__all__ = [
    "BridgeConfig",
    "BridgeSet",
    "CotrainConfig",
    "DenseCircuit",
    "Plan",
    "Probe",
    "Run",
    "Weights",
    "compiled",
    "cotrain",
    "even_sites",
    "fit_sites",
    "load_run",
    "map_circuit",
    "plan",
    "probe",
    "save_run",
    "validate",
]

_HOME = {
    "BridgeConfig": "bridge",
    "BridgeSet": "bridge",
    "CotrainConfig": "settings",
    "Weights": "settings",
    "compiled": "compiling",
    "cotrain": "cotraining",
    "Plan": "planning",
    "plan": "planning",
    "Probe": "probing",
    "probe": "probing",
    "even_sites": "sitemap",
    "fit_sites": "sitemap",
    "validate": "cotraining",
    "Run": "run",
    "load_run": "run",
    "save_run": "run",
    "DenseCircuit": "intervene",
    "map_circuit": "transfer",
}


def _check_siblings() -> None:
    """Raise ImportError where `sparse`, `dense` or `evals` is somebody else's package.

    PyData's `sparse` and OpenAI's `evals` have the same import names; whichever comes first on
    sys.path wins. Nothing is imported here.
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


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that --help stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'bridges' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
