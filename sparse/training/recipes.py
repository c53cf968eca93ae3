"""Published recipes: a model's shape and its training in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse.model.config import SparseGPTConfig

from .config import TrainConfig
from .pretrain import PretrainConfig
from .sparsity import SparsityConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model's shape and its training, with the batches it was published for."""

    model: SparseGPTConfig
    """The shape; `SparseGPT(preset.model)` builds it."""
    pretrain: PretrainConfig
    """The training; `.sparsity` and `.train` are inside."""
    batch_size: int
    """Sequences per optimizer step, over all processes."""
    length: int
    """Tokens per sequence."""


def gao2025(
    folder: str,
    expansion: int | float = 4,
    pfrac: int | float = 1 / 4,
    *,
    tokens: int | float = 32e9,
    steps: int | None = None,
    batch_size: int = 512,
    length: int = 256,
    model: dict[str, Any] | None = None,
    sparsity: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **recipe: Any,
) -> Preset:
    """Return the published recipe at expansion factor e and nonzero budget pfrac.

        d = 256 e,  d_mlp = 1024 e,  d_head = 16,  n_head = 16 e,  L = 8,  V = 2048
        density = pfrac / e^2,   embedding_density = pfrac / e
        S = floor(tokens / (batch_size * length)),   unless `steps` says otherwise

    (docs/method.md#the-training-step.) `folder` is where the run is written. `model`, `sparsity`
    and `train` replace single fields of SparseGPTConfig, SparsityConfig and TrainConfig; further
    keywords replace fields of PretrainConfig.

    Attention sinks are on, as in the authors' later models. The bigram table's row of the last
    token, which should be the end of text, is not trained; model=dict(bigram_freeze_last=False)
    trains it. There is no position table; model=dict(positions="learned") adds one, which starts at
    zero.

    Raises ValueError where e and pfrac ask for no weight or for more than all of them, and where
    d = 256 e is not a multiple of 16, the width of a head.

    >>> from sparse import gao2025
    >>> preset = gao2025("runs/e4", expansion=4, pfrac=1 / 4)
    >>> preset.model.hidden_size, preset.pretrain.sparsity.density, preset.pretrain.train.steps
    (1024, 0.015625, 244140)
    """
    width = _width(expansion, pfrac)
    densities: dict[str, Any] = dict(
        density=pfrac / expansion**2, embedding_density=pfrac / expansion
    )
    steps = steps or int(tokens // (batch_size * length))
    return Preset(
        model=_shape(width, model or {}),
        pretrain=PretrainConfig(
            train=TrainConfig(**{"steps": steps, "folder": folder, **(train or {})}),
            sparsity=SparsityConfig(**densities | (sparsity or {})),
            **recipe,
        ),
        batch_size=batch_size,
        length=length,
    )


def _shape(width: int, changed: dict[str, Any]) -> SparseGPTConfig:
    """Return the published shape with the changed fields.

    A learned position table, if asked for, starts at zero, as in the authors' script.
    """
    published: dict[str, Any] = dict(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=8,
        num_attention_heads=width // 16,
        head_dim=16,
        max_position_embeddings=1024,
        activation_fraction=0.25,
        attention_sinks=True,
        bigram_table=True,
        bigram_freeze_last=True,
        positions="none",
    )
    if changed.get("positions") == "learned":
        published["position_init"] = "zero"
    return SparseGPTConfig(**published | changed)


def _width(expansion: int | float, pfrac: int | float) -> int:
    """Return d = 256 e, after checking the expansion factor e and the budget pfrac."""
    if not 0 < pfrac <= min(expansion, expansion**2):
        raise ValueError(
            f"gao2025: pfrac={pfrac} at expansion={expansion} keeps no weight, or more than all; "
            "take it above 0 and at most the smaller of the expansion and its square"
        )
    width = round(256 * expansion)
    if width % 16:
        raise ValueError(
            f"gao2025: expansion={expansion} gives a width of {width}, which heads of 16 do not "
            "divide; take a multiple of 1/16"
        )
    return width
