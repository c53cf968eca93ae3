"""What the proof of a model's sites found, kept so that the same model need not be proven again.

A proof belongs to one model and one code: the hash under which it is kept covers the weights, the
whole config, the file of the model's class, the sources of this package, the versions of torch and
transformers, and the device. It is used for models that `DenseModel.from_pretrained` opened itself,
which nobody can have changed in between. Small models are proven every time.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..weights.fingerprint import fingerprint
from ..weights.placement import device_of
from .cache import cache_folder

SMALL = 10_000_000
"""Parameters below which a proof takes no time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What a model's proof found, besides that its sites are exact."""

    pads_left: bool
    apart_because: str | None


def path_of(model: Any) -> Path | None:
    """Return the file in which the proof of a model is kept; None for a small model."""
    if sum(p.numel() for p in model.parameters()) < SMALL:
        return None
    digest = hashlib.sha256(fingerprint(model).encode())
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    about = {
        "config": config,
        "attention": getattr(model.config, "_attn_implementation", None),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "device": device_of(model.get_input_embeddings()).type,
        "class": type(model).__qualname__,
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    of_class = getattr(sys.modules[type(model).__module__], "__file__", None)
    for file in [*own, *([Path(of_class)] if of_class else [])]:
        digest.update(file.read_bytes())
    return cache_folder() / "proofs" / f"{digest.hexdigest()}.json"


def read(path: Path | None) -> Proof | None:
    """Return the proof that is kept in a file, None if there is none that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        return Proof(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return None  # half a file: the model is proven again


def write(path: Path | None, proof: Proof) -> None:
    """Keep a proof. A cache that cannot be written to is no error: the next opening is slow."""
    if path is None:
        return
    aside = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(asdict(proof)))
        aside.replace(path)
