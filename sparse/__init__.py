"""A weight-sparse GPT and the circuits inside it."""

__version__ = "0.1.0"


class SparseArray:
    """Keeps scipy working: it asks any loaded module called `sparse` for this name."""
