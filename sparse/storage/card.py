"""The model card: what was measured, with its controls, and what the weights themselves say.

A `Card` is saved as card.json; `markdown` writes the README.md of a model from it. hub.py saves
both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import PreTrainedConfig

from .records import checked

SCHEMA_VERSION = 1
OURS = "<!-- written by sparse-bridges from card.json and the weights; a save rewrites it -->"
TAGS = ("sparse-bridges", "sparse_gpt", "weight-sparse", "interpretability")


@runtime_checkable
class Described(Protocol):
    """What a card needs to know of a model."""

    config: PreTrainedConfig

    def state_dict(self) -> dict[str, Any]:
        """Return the weights by name."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of architecture and weights."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One measured number, and its control: the number it is to be compared with.

    A number without a control cannot be written.
    """

    name: str
    """What was measured, on which data, and over what the mean is taken."""
    value: float
    """The number, in `unit`."""
    unit: str
    """The unit; "fraction" where there is none."""
    control: str
    """What the control is, such as "unigram model" or "same width, dense"."""
    control_value: float
    """The same quantity measured on the control, in `unit`."""

    def __post_init__(self) -> None:
        for name in ("name", "unit", "control"):
            _need_text(self, name)
        for name in ("value", "control_value"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                raise ValueError(
                    f"Metric {self.name!r}: {name}={value!r} must be a finite number; measure the "
                    "control too, or leave the metric out"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """How a model was made and what was measured of it; it is saved as card.json."""

    command: str
    """The exact command that made the model."""
    data: str
    """What it was trained on: name, revision, split."""
    tokens: int | None
    """Training tokens seen; None where that was not recorded."""
    steps: int | None
    """Optimizer steps; None where that was not recorded."""
    seed: int | None
    """Random seed; None where that was not recorded."""
    metrics: tuple[Metric, ...] = ()
    """Measured numbers with their controls."""
    fingerprint: str = ""
    """`model.fingerprint()` of the weights that were measured; "" where it was not recorded."""
    license: str = "unknown"
    """Licence of the weights as the Hub spells it, such as "apache-2.0"."""
    twin_of: str = ""
    """The dense model that the model was bridged to, "" for none. It is named in the text of the
    README and not in the Hub's base_model, which would call the twin a fine-tuned copy."""
    notes: str = ""
    """Anything else a reader should know; Markdown."""

    def __post_init__(self) -> None:
        for name in ("command", "data", "license"):
            _need_text(self, name)
        for name in ("tokens", "steps", "seed"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"Card.{name}={value!r} must be an integer, at least 0, or None where it was "
                    "not recorded"
                )
        bare = [m for m in self.metrics if not isinstance(m, Metric)]
        if bare or not isinstance(self.metrics, tuple):
            raise ValueError(
                f"Card.metrics must be a tuple of Metric, got {(bare or [self.metrics])[0]!r}; a "
                "number is not written without its control"
            )

    def to_json(self) -> str:
        """Return the text of card.json."""
        return json.dumps({"schema_version": SCHEMA_VERSION} | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "card.json") -> Card:
        """Return the card in the text of a card.json.

        Raises ValueError, naming `where`, if it is not JSON or does not have the fields of a card.
        """
        try:
            facts = dict(json.loads(text))
            if (found := facts.pop("schema_version", None)) != SCHEMA_VERSION:
                raise ValueError(f"schema version {found}, this library reads {SCHEMA_VERSION}")
            facts = checked(cls, facts, "card")
            metrics = tuple(Metric(**metric) for metric in facts.pop("metrics", ()))
            return cls(**facts, metrics=metrics)
        except (ValueError, TypeError, AttributeError) as error:  # no JSON, or no card in it
            raise ValueError(
                f"{where} is no model card: {error}; restore it or delete it to load the model "
                "without"
            ) from error

    def to_markdown(self, model: Described, **how: Any) -> str:
        """Return the README of `model` with this card; `how` as in `markdown`."""
        return markdown(model, self, **how)


def _need_text(card: Any, name: str) -> None:
    value = getattr(card, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{type(card).__name__}.{name}={value!r} must say something")


def markdown(
    model: Described,
    card: Card | None,
    *,
    place: str = "path/to/this/folder",
    compressed: bool = False,
    tags: tuple[str, ...] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> str:
    """Return the README of `model`: Hub metadata, how to load it, what was measured, its weights.

    card: what was measured; without one the README says that nothing was.
    place: the folder or Hub name in the lines of the README that load the model.
    compressed: whether the weights are in the format of compressed.py.
    tags: tags for the Hub, besides those that every model gets.
    tensors: the tensors whose counts and densities are listed; the model's own by default.
    """
    tensors = _untied(model.state_dict() if tensors is None else tensors)
    mark = model.fingerprint()
    metadata = ModelCardData(
        library_name="sparse-bridges",
        pipeline_tag="text-generation",
        license=card.license if card else "unknown",
        tags=list(dict.fromkeys((*TAGS, *tags))),
    )
    parts = [
        f"---\n{metadata.to_yaml().strip()}\n---\n{OURS}",
        f"# A weight-sparse GPT\n\n{_summary(model.config, mark, tensors)}",
        _loading(type(model).__name__, place),
        f"## What was measured\n\n{_measured(mark, card)}",
        f"## How it was made\n\n{_making(card)}",
        f"## Architecture\n\n{_architecture(model.config)}",
        f"## Weights\n\n{_weights(tensors, compressed)}",
    ]
    if card and card.notes:
        parts.append(f"## Notes\n\n{card.notes.strip()}")
    return "\n\n".join(parts) + "\n"


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor once; of names for the same memory the last one is kept."""
    last = {(x.data_ptr() or name, x.shape): name for name, x in tensors.items()}
    return {name: tensors[name] for name in last.values()}


def _summary(c: Any, fingerprint: str, tensors: Mapping[str, Tensor]) -> str:
    n, kept = sum(x.numel() for x in tensors.values()), sum(map(_nonzeros, tensors.values()))
    return (
        f"A GPT with {c.num_hidden_layers} layers and a residual stream {c.hidden_size} wide, of "
        f"whose {n:,} weights {kept:,} are not zero ({kept / max(n, 1):.2%}). The architecture is "
        "that of Gao et al. 2025, [Weight-sparse transformers have interpretable circuits]"
        "(https://arxiv.org/abs/2511.13653), as `sparse-bridges` implements it.\n\n"
        f"Fingerprint of architecture and weights: `{fingerprint}`."
    )


def _loading(name: str, place: str) -> str:
    auto = "AutoModelForCausalLM" if name == "SparseGPT" else "AutoModel"
    return f"""## How to load it

The Python package `sparse-bridges` must be installed (it is imported as `sparse`, and is not the
package that PyPI calls `sparse`). No code comes from this folder, so `trust_remote_code` stays off;
`import sparse` is what makes the architecture known to transformers.

```python
import sparse  # registers the architecture
from transformers import {auto}

model = {auto}.from_pretrained({json.dumps(place)})
```

A tokenizer saved beside the model opens with `AutoTokenizer.from_pretrained`, from there too."""


def _measured(fingerprint: str, card: Card | None) -> str:
    if card is None or not card.metrics:
        return "Nothing was measured for this card."
    rows = [
        (m.name, f"{m.value:.6g}", m.unit, m.control, f"{m.control_value:.6g}")
        for m in card.metrics
    ]
    which = "Which weights were measured was not recorded."
    if card.fingerprint == fingerprint:
        which = "Measured on the weights in this folder, by fingerprint."
    elif card.fingerprint:
        which = (
            f"**Measured on other weights**: their fingerprint is `{card.fingerprint}`, not the "
            "one of this folder (trained on, converted or edited since)."
        )
    return _table(("metric", "value", "unit", "control", "control's value"), rows) + f"\n\n{which}"


def _making(card: Card | None) -> str:
    if card is None:
        return "It was not recorded how this model was made."
    longest = max(map(len, re.findall(r"`+", card.command)), default=0)
    fence = "`" * max(3, longest + 1)
    counts = {"training tokens": card.tokens, "optimizer steps": card.steps}
    facts = [("data", card.data)]
    facts += [(name, "not recorded" if n is None else f"{n:,}") for name, n in counts.items()]
    facts.append(("seed", "not recorded" if card.seed is None else str(card.seed)))
    if card.twin_of:
        facts.append(("sparse twin of", card.twin_of))
    return f"{fence}bash\n{card.command}\n{fence}\n\n{_table(('fact', 'value'), facts)}"


def _architecture(config: Any) -> str:
    facts = config.architecture().items()
    return _table(("field", "value"), [(name, json.dumps(value)) for name, value in facts])


def _weights(tensors: Mapping[str, Tensor], compressed: bool) -> str:
    rows = [
        (name, "x".join(map(str, x.shape)), f"{k:,}", f"{x.numel():,}", f"{k / x.numel():.4%}")
        for name, x in tensors.items()
        if x.numel() and (k := _nonzeros(x)) is not None
    ]
    dtypes = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()}))
    how = "every tensor as it is"
    if compressed:
        how = (
            "tensors that are sparse enough as indices and values "
            "(`sparse/storage/compressed.py`, format version 1), which the lines above load to the "
            "same bits; the others as they are"
        )
    table = _table(("tensor", "shape", "not zero", "entries", "density"), rows)
    return f"safetensors, {dtypes}: {how}.\n\n{table}"


def _nonzeros(tensor: Tensor) -> int:
    return int(tensor.detach().count_nonzero())


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([re.sub(r"\s*\n\s*", " ", str(x)).replace("|", "\\|") for x in r] for r in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
