"""Any Hugging Face causal language model, read and edited at its residual sites."""

from dense.model import DenseModel

__version__ = "0.1.0"
__sparse_bridges__ = "dense"

__all__ = ["DenseModel"]
