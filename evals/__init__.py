"""Claims about bridges, circuits and transfer, each beside its control. Imports are lazy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bridge import evaluate_bridge
    from .circuit import evaluate_circuit
    from .report import Report, table
    from .run import evaluate_run, write_report
    from .scores import Score
    from .transfer import evaluate_transfer

__version__ = "0.1.0"
__sparse_bridges__ = "evals"
__all__ = [
    "Score",
    "Report",
    "evaluate_bridge",
    "evaluate_circuit",
    "evaluate_transfer",
    "evaluate_run",
    "write_report",
    "table",
]

_HOME = {
    "Score": "scores",
    "Report": "report",
    "evaluate_bridge": "bridge",
    "evaluate_circuit": "circuit",
    "evaluate_transfer": "transfer",
    "evaluate_run": "run",
    "write_report": "run",
    "table": "report",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that --help stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'evals' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
