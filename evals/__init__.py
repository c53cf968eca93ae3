"""Claims about bridges, circuits and transfer, each beside its control. Imports are lazy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .claims.bridge import evaluate_bridge
    from .claims.circuit import evaluate_circuit
    from .claims.claims import judge_circuit
    from .claims.transfer import evaluate_transfer
    from .evaluate import evaluate_run, write_report
    from .report.figures import save_figures
    from .report.report import Report, table
    from .scores.score import Score
    from .scores.verdict import Claim, Condition
    from .trials.matched import namesakes_of

__version__ = "0.1.0"
__sparse_bridges__ = "evals"
__all__ = [
    "Score",
    "Claim",
    "Condition",
    "Report",
    "evaluate_bridge",
    "evaluate_circuit",
    "evaluate_transfer",
    "evaluate_run",
    "judge_circuit",
    "namesakes_of",
    "write_report",
    "table",
    "save_figures",
]

_HOME = {
    "Score": "scores.score",
    "Claim": "scores.verdict",
    "Condition": "scores.verdict",
    "judge_circuit": "claims.claims",
    "namesakes_of": "trials.matched",
    "Report": "report.report",
    "evaluate_bridge": "claims.bridge",
    "evaluate_circuit": "claims.circuit",
    "evaluate_transfer": "claims.transfer",
    "evaluate_run": "evaluate",
    "write_report": "evaluate",
    "table": "report.report",
    "save_figures": "report.figures",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that --help stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'evals' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
