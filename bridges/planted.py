"""Planted pairs: a planted sparse model, a dense model that does what it does, and their bridges.

    h_s = a Q z_s + b                           at every site s
    what a sublayer reads    norm(h) = sqrt(D / d) Q norm(z)
    what it writes           a Q (what the sparse one writes)
    decoder  D = Q, scale a, mean b             encoder  E = Q^T, k = d

z is the stream of the sparse model (width d), h that of the dense one (width D > d). Q has
orthonormal columns that sum to zero, and b is the same number in every channel; so a layer norm,
which takes the mean over channels away, finds z again. The dense model is a GPT-2 of transformers,
and light noise on all its matrices keeps it from being an exact copy.

A *decoy* does the tasks another way. Every path is there a second time, in channels, heads and
neurons that the bridges do not know, and the targets read that one. The first is in the stream
still, and nothing reads its answer. The bridges look good, but the circuit explains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.maps.bridge import BridgeConfig, BridgeSet
from dense import DenseModel
from sparse.circuits.circuit import Circuit
from sparse.circuits.planted import Planted, plant
from sparse.circuits.planted_wires import D_HEAD, LAYERS, Wire, views
from sparse.model.gpt import SparseGPT
from sparse.ops.seeds import seed_of
from sparse.tasks.task import Task

N_POSITIONS = 64
SPARE_NEURONS = 16  # more neurons than the sparse model has; a decoy's second paths take some


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedPair:
    """A planted sparse model, a dense model and their bridges. `plant_pair` makes it.

    It has what an opened run has (`Run`), so that what takes a run takes it too; but it is in
    memory alone, and `folder` and `output` hold nothing.
    """

    seed: int
    planted: Planted
    """The sparse side: model, tasks, circuits and what they are made of."""
    dense: DenseModel
    bridges: BridgeSet
    noise: float
    """Length of the noise on every dense matrix, as a fraction of the matrix's own."""
    decoy: bool
    """Whether the dense model does the tasks another way, so that no claim about it is true."""
    folder: Path = field(default=Path("runs/planted"), repr=False)
    output: Path = field(default=Path("runs/planted"), repr=False)

    @property
    def sparse(self) -> SparseGPT:
        """The sparse model."""
        return self.planted.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that both models share."""
        return self.planted.tokenizer

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks, by name."""
        return self.planted.tasks

    @property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text: nothing."""
        return ()

    @property
    def manifest(self) -> dict[str, Any]:
        """What a run's manifest says: which dense model, and how it was made."""
        dense = {"name": self.dense.name, "fingerprint": self.dense.fingerprint}
        made = {"seed": self.seed, "noise": self.noise, "decoy": self.decoy}
        return {"dense": dense, "planted": made, "prefix": []}

    def circuits(self) -> dict[str, Circuit]:
        """Return the circuits by task name, and those of distractors as `<name>:nonsense`."""
        found = dict(self.planted.circuits)
        return found | {f"{name}:nonsense": self.planted.nonsense(name) for name in found}

    def skipped(self) -> dict[str, str]:
        """Return the tasks without a circuit: none."""
        return {}

    def heldout(self) -> Int[Tensor, "block pos"]:
        """Return blocks of text in the model's own language."""
        return self.planted.heldout


def plant_pair(
    seed: int = 0,
    *,
    noise: float = 0.05,
    decoy: bool = False,
    width: int | None = None,
    **settings: Any,
) -> PlantedPair:
    """Return a planted sparse model beside a dense model that is a rotated copy of it.

    The circuits are then true of the dense model, and the bridges are the best there are. With
    `decoy` the dense model does the tasks another way, so that nothing is true of it. `noise` is
    added to every matrix of the dense model: Gaussian, of that fraction of the matrix's own length.
    With none, the dense logits are those of the sparse model up to rounding. `width` is that of the
    dense stream, a multiple of 8 at least 24 above the sparse one; by default the first multiple of
    8 from 4/3 of it. `settings` are those of `sparse.plant`. Raises ValueError for a width that
    does not fit, and for negative noise.

    >>> from bridges import map_circuit, plant_pair
    >>> pair = plant_pair(0)
    >>> circuit = pair.circuits()["first"]
    >>> mapped = map_circuit(circuit, pair.dense, pair.bridges, sparse_model=pair.sparse)
    >>> mapped.dense.n_sites, pair.dense.d_resid
    (5, 128)
    """
    planted = plant(seed, **settings)
    d = planted.model.d_resid
    width = -(-4 * d // 24) * 8 if width is None else width
    n_heads = planted.model.config.num_attention_heads
    if width % D_HEAD or width < max(d + 24, D_HEAD * (n_heads + 2)):
        raise ValueError(
            f"plant_pair: width={width} does not fit a sparse stream of {d} and {n_heads} heads; "
            f"take a multiple of {D_HEAD}, at least {max(d + 24, D_HEAD * (n_heads + 2))}"
        )
    if not noise >= 0:
        raise ValueError(f"plant_pair: noise={noise} must be 0 or more")
    rng = Random(seed_of("dense", seed))
    wide = _Wide.of(planted.model)
    if decoy:
        for wires in planted.wires.values():
            wide.second_path(wires)
    n_neurons = planted.model.config.intermediate_size + SPARE_NEURONS
    wide.fill(planted, {"attn": width // D_HEAD, "mlp": n_neurons}, rng)
    g = torch.Generator().manual_seed(seed_of("rotation", seed))
    q = _orthonormal(width, wide.width, g)
    a, b = rng.uniform(0.5, 3.0), rng.choice((1, -1)) * rng.uniform(0.2, 1.0)
    model = _gpt2(wide, planted.model, q, a, b)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim == 2 and "wpe" not in name:
                p += noise * p.square().mean().sqrt() * torch.randn(p.shape, generator=g)
    kind = "decoy" if decoy else "copy"
    dense = DenseModel(model, planted.tokenizer, name=f"planted {kind} {seed}")
    bridges = _bridges(dense, planted.model, q[:, :d], a, b)
    return PlantedPair(
        seed=seed, planted=planted, dense=dense, bridges=bridges, noise=noise, decoy=decoy
    )


class _Part(NamedTuple):
    """The matrices of one kind of sublayer: those that read the stream, and the one that writes."""

    reads: tuple[str, ...]
    write: str
    size: int
    """Rows of a unit, which is a head or a neuron."""


PARTS = {"attn": _Part(("q", "k", "v"), "out", D_HEAD), "mlp": _Part(("fc",), "proj", 1)}
WRITES = ("attn.out", "mlp.proj")


@dataclass
class _Wide:
    """The matrices of a sparse model, stored (out, in), with room for more of everything.

    The model's own channels, and its own heads and neurons in every layer, come first.
    """

    matrices: dict[str, Tensor]
    width: int

    @classmethod
    def of(cls, model: SparseGPT) -> _Wide:
        return cls({name: w.clone() for name, w in views(model).items()}, model.d_resid)

    def second_path(self, wires: Sequence[Wire]) -> None:
        """Do what `wires` do in new channels, heads and neurons, and let the targets read those.

        The unembedding no longer reads the first path.
        """
        channels: dict[int, int] = {}
        units: dict[tuple[str, int], int] = {}

        def channel(i: int) -> int:
            if i not in channels:
                channels[i] = self._add_channel()
            return channels[i]

        def unit(sublayer: str, i: int) -> int:
            old, rest = divmod(i, PARTS[sublayer[2:]].size)
            if (sublayer, old) not in units:
                units[sublayer, old] = self._add_unit(sublayer)
            return units[sublayer, old] * PARTS[sublayer[2:]].size + rest

        for matrix, row, column, value in wires:
            sublayer = matrix.rpartition(".")[0]
            if not sublayer:  # embedding and unembedding
                at = row, channel(column)
            elif matrix.endswith(WRITES):
                at = channel(row), unit(sublayer, column)
            else:
                at = unit(sublayer, row), channel(column)
            if matrix == "unembed":
                self.matrices[matrix][row, column] = 0.0
            self.matrices[matrix][at] = value

    def _add_channel(self) -> int:
        """Give every matrix one more channel of the stream, of zeros, and return its index."""
        for name, w in self.matrices.items():
            self.matrices[name] = F.pad(w, (0, 0, 0, 1) if name.endswith(WRITES) else (0, 1))
        self.width += 1
        return self.width - 1

    def _add_unit(self, sublayer: str) -> int:
        """Give a sublayer one more head or neuron, of zeros, and return its index."""
        part = PARTS[sublayer[2:]]
        write = f"{sublayer}.{part.write}"
        n = self.matrices[write].shape[1] // part.size
        self.matrices[write] = F.pad(self.matrices[write], (0, part.size))
        for read in (f"{sublayer}.{name}" for name in part.reads):
            self.matrices[read] = F.pad(self.matrices[read], (0, 0, 0, part.size))
        return n

    def fill(self, planted: Planted, sizes: Mapping[str, int], rng: Random) -> None:
        """Make as many heads and neurons as `sizes` says, for "attn" and "mlp", in a drawn order.

        Where there are too few, some share the work of a distractor: each does what it did, and
        writes an equal part of it.
        """
        wires = [wire for path in planted.wires.values() for wire in path]
        for sublayer in (f"{layer}.{name}" for layer in range(LAYERS) for name in PARTS):
            part = PARTS[sublayer[2:]]
            reads, write = [f"{sublayer}.{x}" for x in part.reads], f"{sublayer}.{part.write}"
            n = self.matrices[write].shape[1] // part.size
            of_paths = {wire.row // part.size for wire in wires if wire.matrix in reads}
            before = views(planted.model)[write].shape[1] // part.size
            free = sorted(set(range(before)) - of_paths)
            source = [*range(n), *rng.choices(free, k=sizes[sublayer[2:]] - n)]
            rng.shuffle(source)
            rows = torch.tensor([part.size * unit + i for unit in source for i in range(part.size)])
            for read in reads:
                self.matrices[read] = self.matrices[read][rows]
            share = torch.tensor([1 / source.count(unit) for unit in source])
            share = share.repeat_interleave(part.size)
            self.matrices[write] = self.matrices[write][:, rows] * share


def _orthonormal(rows: int, columns: int, g: torch.Generator) -> Float[Tensor, "dense wide"]:
    """Return random orthonormal columns, each of which sums to zero."""
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0))[0].float()


def _gpt2(wide: _Wide, model: SparseGPT, q: Tensor, a: float, b: float) -> GPT2LMHeadModel:
    """Return the GPT-2 whose stream is a Q z + b (top of this file), without noise."""
    width, d, c = len(q), model.d_resid, model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=N_POSITIONS,
        n_embd=width,
        n_layer=LAYERS,
        n_head=width // D_HEAD,
        n_inner=len(wide.matrices["0.mlp.fc"]),
        activation_function="gelu",
        layer_norm_epsilon=c.rms_norm_eps * a**2 * d / width,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2 = GPT2LMHeadModel(config)
    reads: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    for name, w in wide.matrices.items():
        if name.endswith(WRITES):
            writes[name] = a * q @ w
        else:
            reads[name] = sqrt(d / width) * w @ q.T
    values: dict[str, Tensor] = {
        "transformer.wte.weight": a * wide.matrices["embed"] @ q.T,
        "transformer.wpe.weight": torch.full((N_POSITIONS, width), b),
        "lm_head.weight": reads["unembed"],
    }
    for i in range(LAYERS):
        qkv = torch.cat([reads[f"{i}.attn.{third}"] for third in "qkv"])
        values |= {
            f"transformer.h.{i}.attn.c_attn.weight": qkv.T,  # GPT-2 stores these (in, out)
            f"transformer.h.{i}.attn.c_proj.weight": writes[f"{i}.attn.out"].T,
            f"transformer.h.{i}.mlp.c_fc.weight": reads[f"{i}.mlp.fc"].T,
            f"transformer.h.{i}.mlp.c_proj.weight": writes[f"{i}.mlp.proj"].T,
        }
    _set(gpt2, values)
    return gpt2


@torch.no_grad()
def _set(model: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the parameters named; of the others biases are 0 and gains 1."""
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)


@torch.no_grad()
def _bridges(dense: DenseModel, sparse: SparseGPT, q: Tensor, a: float, b: float) -> BridgeSet:
    """Return the bridges in closed form, with the fingerprints of both models."""
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=sparse.d_resid))
    _set(
        bridges,
        {f"encoders.{i}.weight": q.T for i in range(sparse.n_sites)}
        | {f"decoders.{i}.weight": q for i in range(sparse.n_sites)},
    )
    bridges.mean.fill_(b)
    bridges.scale.fill_(a)
    bridges.dense_fingerprint, bridges.sparse_fingerprint = dense.fingerprint, sparse.fingerprint()
    return bridges.requires_grad_(False)
