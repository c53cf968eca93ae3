"""Where things are kept that were made from a model and can be made again: one folder."""

from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of what can be made again: sparse-bridges beside the Hugging Face cache.

    It moves with HF_HOME, and nothing in it is needed: delete it at any time.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "sparse-bridges"
