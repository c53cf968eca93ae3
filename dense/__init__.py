"""Any Hugging Face causal language model, read and edited at its residual sites."""

from .edit import Edit, LiveEdit
from .model import DenseModel
from .open import as_dense, config_of, tiny
from .sites import SiteError
from .traced import apply_edits, editing, generate_edited, run_edited, trace_model

__version__ = "0.1.0"
__sparse_bridges__ = "dense"

__all__ = [
    "DenseModel",
    "Edit",
    "LiveEdit",
    "SiteError",
    "apply_edits",
    "as_dense",
    "config_of",
    "editing",
    "generate_edited",
    "run_edited",
    "tiny",
    "trace_model",
]
