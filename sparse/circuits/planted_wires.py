"""The weights of a planted model: a path that does each task, and distractors that do nothing.

A wire is one weight. The path of a task, for the channels that a seed gives it:

    embedding     cue words write `kind` (+ or -) and `mark`, asking words write `ask`
    mlp 0         (some seeds) feature <- kind
    attention l   an asking word looks back at the cue (q reads ask, k reads mark), v reads the
                  kind or the feature, and is written to `found`
    mlp m >= l    (some seeds) answer <- found
    unembedding   the two targets read answer (or found) with opposite signs

An MLP copies a channel x by two neurons, since gelu(x) - gelu(-x) = x. Distractors have channels,
heads and neurons of their own: words write to them, and they move the logits of all other words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from random import Random
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT

from .graph import Nodes
from .planted_text import Lexicon

N_BALLAST = 3  # channels that are alike for every word, so that norms hardly vary
SHARP = 12.0  # attention score of the cue, seen from a word that asks
TYPICAL = (1.0, 1.15, 1.35, 1.45)  # root mean square of the stream at the site a sublayer reads
BOOST = 1.2  # how strongly the word that asks favours both targets
D_HEAD = 8
LAYERS = 2
THIRD = {"attn.q": 0, "attn.k": 1, "attn.v": 2}


class Wire(NamedTuple):
    """One weight: the entry (row, column) of a matrix, stored (out, in).

    Matrices are "embed" (word, channel), "unembed" (word, channel), and of layer l "l.attn.q",
    "l.attn.k", "l.attn.v", "l.attn.out", "l.mlp.fc" and "l.mlp.proj".
    """

    matrix: str
    row: int
    column: int
    value: float


@dataclass
class Rooms:
    """What is not yet taken: channels of the stream, and heads and neurons of every layer."""

    channels: list[int]
    heads: list[list[int]]
    neurons: list[list[int]]

    @classmethod
    def of(cls, rng: Random, width: int, heads: int, neurons: int) -> Rooms:
        """Return all of them, in an order drawn by `rng`."""

        def shuffled(n: int) -> list[int]:
            return rng.sample(range(n), n)

        return cls(
            shuffled(width),
            [shuffled(heads) for _ in range(LAYERS)],
            [shuffled(neurons) for _ in range(LAYERS)],
        )


@dataclass
class Path:
    """The wires that do one task, and the nodes they run through."""

    wires: list[Wire] = field(default_factory=list)
    found: dict[str, set[int]] = field(default_factory=dict)
    heads: dict[int, tuple[int, set[int]]] = field(default_factory=dict)
    """Layer to the head it takes there and the channels of that head's values."""
    answers: tuple[int, ...] = ()
    """The channels of the stream that hold the answer."""

    def passes(self, location: str, *indices: int) -> None:
        """Note nodes that the path runs through."""
        self.found.setdefault(location, set()).update(indices)

    @property
    def nodes(self) -> Nodes:
        """The nodes, location to sorted indices."""
        return {at: tuple(sorted(indices)) for at, indices in sorted(self.found.items())}


def sign(rng: Random) -> int:
    """Return 1 or -1."""
    return rng.choice((1, -1))


def lay_path(name: str, words: Lexicon, rooms: Rooms, rng: Random) -> Path:
    """Return the path of one task, through channels, a head and neurons that it takes from `rooms`.

    It has no wires from the answer to the unembedding yet: `answer_wires` makes them, when it is
    known how large the answer is.
    """
    path, put = Path(), rooms.channels.pop
    kind, mark, ask = put(), put(), put()
    sizes = {channel: rng.uniform(2.2, 3.0) for channel in (kind, mark, ask)}
    turned = sign(rng)
    for side, cues in zip((turned, -turned), words.cues[name], strict=True):
        for word in cues:
            path.wires.append(Wire("embed", word, kind, side * sizes[kind]))
            path.wires.append(Wire("embed", word, mark, sizes[mark]))
    path.wires += [Wire("embed", word, ask, sizes[ask]) for word in words.asks[name]]

    layer, n = rng.randrange(LAYERS), rng.choice((1, 2))
    values = [kind] * n
    if layer and rng.random() < 0.5:
        values = [put() for _ in range(n)]
        for feature in values:
            copy_channel(path, 0, kind, feature, rooms, rng)
    found = [put() for _ in range(n)]
    _look(path, layer, (ask, mark), values, found, sizes, rooms, rng)
    for i, channel in enumerate(found):
        if rng.random() < 0.5:
            found[i] = put()
            copy_channel(path, rng.randrange(layer, LAYERS), channel, found[i], rooms, rng)
    path.answers = tuple(found)
    path.wires += [Wire("unembed", word, ask, BOOST) for word in words.targets[name]]
    return path


def answer_wires(targets: tuple[int, int], sizes: Mapping[int, float], margin: float) -> list[Wire]:
    """Return the wires by which two targets read the answer, each channel for its share.

    `sizes` are the channels of the answer and their mean values, after the norm, where the first
    target is right. The logits of the two targets then differ by `margin` on average.
    """
    return [
        Wire("unembed", word, channel, side * margin / (2 * len(sizes) * size))
        for side, word in zip((1, -1), targets, strict=True)
        for channel, size in sizes.items()
    ]


def _look(
    path: Path,
    layer: int,
    marks: tuple[int, int],
    values: Sequence[int],
    found: Sequence[int],
    sizes: dict[int, float],
    rooms: Rooms,
    rng: Random,
) -> None:
    """Add the head that carries `values` from the cue to the word that asks, into `found`."""
    ask, mark = marks
    head = rooms.heads[layer].pop()
    at, first = f"{layer}.attn", head * D_HEAD
    scored, *carried = rng.sample(range(first, first + D_HEAD), 1 + len(values))
    rms = TYPICAL[2 * layer]
    gain = rms * sqrt(SHARP * sqrt(D_HEAD) / (sizes[ask] * sizes[mark]))
    way = sign(rng)
    path.wires.append(Wire(f"{at}.q", scored, ask, way * gain))
    path.wires.append(Wire(f"{at}.k", scored, mark, way * gain))
    path.passes(f"{at}.act_in", ask, mark, *values)
    path.passes(f"{at}.q", scored)
    path.passes(f"{at}.k", scored)
    for value, row, to in zip(values, carried, found, strict=True):
        path.wires.append(Wire(f"{at}.v", row, value, rms * sign(rng) * rng.uniform(0.8, 1.2)))
        path.wires.append(Wire(f"{at}.out", to, row, sign(rng) * rng.uniform(0.8, 1.2)))
        path.passes(f"{at}.v", row)
        path.passes(f"{at}.resid_delta", to)
    path.heads[layer] = head, {row - first for row in carried}


def copy_channel(
    path: Path, layer: int, source: int, target: int, rooms: Rooms, rng: Random
) -> None:
    """Add two neurons that copy one channel to another: target <- g w x, signs drawn."""
    at, way = f"{layer}.mlp", sign(rng)
    g, w = TYPICAL[2 * layer + 1] * rng.uniform(0.8, 1.2), way * rng.uniform(0.8, 1.2)
    for side in (1, -1):
        neuron = rooms.neurons[layer].pop()
        path.wires.append(Wire(f"{at}.fc", neuron, source, side * g))
        path.wires.append(Wire(f"{at}.proj", target, neuron, side * w))
        path.passes(f"{at}.post_act", neuron)
    path.passes(f"{at}.act_in", source)
    path.passes(f"{at}.resid_delta", target)


def lay_distractors(
    words: Lexicon, paths: Sequence[Path], rooms: Rooms, rng: Random, size: float
) -> list[Wire]:
    """Return the wires of the distractors, over all that the paths have left.

    Half of the channels are written by the words themselves, the others by sublayers. `size`
    scales what sublayers write and what the unembedding reads.
    """
    given, later = rooms.channels[::2], rooms.channels[1::2]
    marked = {w.row for path in paths for w in path.wires if w.matrix == "embed"}
    answers = {word for pair in words.targets.values() for word in pair}
    wires = []
    for word in range(len(words.words)):
        n = round(len(given) * (0.12 if word in marked else 0.25))
        for channel in rng.sample(given, n):
            wires.append(Wire("embed", word, channel, sign(rng) * rng.uniform(1.5, 2.5)))
        if word not in answers:
            for channel in rng.sample(rooms.channels, 10):
                wires.append(Wire("unembed", word, channel, size * rng.gauss(0, 0.3)))
    for layer in range(LAYERS):
        seen = rooms.channels if layer else given
        for head in rooms.heads[layer]:
            wires += _head(f"{layer}.attn", head, range(D_HEAD), seen, rooms.channels, rng, size)
        for path in paths:  # the other values of a path's own head
            if layer in path.heads:
                head, taken = path.heads[layer]
                free = sorted(set(range(D_HEAD)) - taken)
                wires += _values(f"{layer}.attn", head, free, seen, rooms.channels, rng, size)
        for neuron in rooms.neurons[layer]:
            loud = rng.uniform(0.4, 1.5)
            for channel in rng.sample(rooms.channels if layer else given + later[::2], 2):
                value = loud * sign(rng) * rng.uniform(0.8, 1.2)
                wires.append(Wire(f"{layer}.mlp.fc", neuron, channel, value))
            for channel in rng.sample(rooms.channels, rng.choice((1, 2))):
                value = size * sign(rng) * rng.uniform(0.4, 0.8)
                wires.append(Wire(f"{layer}.mlp.proj", channel, neuron, value))
    return wires


def _head(
    at: str,
    head: int,
    own: Sequence[int],
    seen: Sequence[int],
    written: Sequence[int],
    rng: Random,
    size: float,
) -> list[Wire]:
    """Return a distractor head: which words it looks at and what it carries mean nothing."""
    wires = []
    for i in rng.sample(own, 4):
        for third in ("q", "k"):
            loud = rng.uniform(0.6, 1.4)
            for channel in rng.sample(seen, 2):
                value = loud * sign(rng) * rng.uniform(0.8, 1.6)
                wires.append(Wire(f"{at}.{third}", head * D_HEAD + i, channel, value))
    return wires + _values(at, head, own, seen, written, rng, size)


def _values(
    at: str,
    head: int,
    own: Sequence[int],
    seen: Sequence[int],
    written: Sequence[int],
    rng: Random,
    size: float,
) -> list[Wire]:
    wires = []
    for row in (head * D_HEAD + i for i in own):
        loud = rng.uniform(0.4, 1.4)
        for channel in rng.sample(seen, rng.choice((1, 2))):
            value = loud * sign(rng) * rng.uniform(0.8, 1.2)
            wires.append(Wire(f"{at}.v", row, channel, value))
        for channel in rng.sample(written, rng.choice((1, 2))):
            value = size * sign(rng) * rng.uniform(0.4, 0.8)
            wires.append(Wire(f"{at}.out", channel, row, value))
    return wires


def build(
    wires: Sequence[Wire],
    ballast: Sequence[int],
    frequency: Float[Tensor, " vocab"],
    config: SparseGPTConfig,
) -> SparseGPT:
    """Return the model with these weights; all others are zero.

        ballast of word w = sqrt((d - sum of w's other entries squared) / N_BALLAST)

    so that every word's embedding has a root mean square of 1. The unembedding reads the ballast in
    proportion to the log of a word's `frequency`, which makes the model a unigram model where its
    paths and distractors say nothing.
    """
    model = SparseGPT(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.fill_(1.0 if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight")) else 0.0)
    matrices = views(model)
    for wire in wires:
        matrices[wire.matrix][wire.row, wire.column] = wire.value
    embed = matrices["embed"]
    free = config.hidden_size - embed.square().sum(1, keepdim=True)
    if (free < 1).any():
        raise ValueError(
            f"plant: a stream of width {config.hidden_size} has no room for all that a word "
            "writes; take a larger width"
        )
    embed[:, list(ballast)] = (free / N_BALLAST).sqrt()
    log = frequency.log()
    typical = N_BALLAST * embed[:, ballast[0]].mean()
    matrices["unembed"][:, list(ballast)] = ((log - log.mean()) / typical)[:, None]
    return model


def views(model: SparseGPT) -> dict[str, Float[Tensor, "out in"]]:
    """Return every matrix of the model under its name in `Wire`; they share its memory."""
    found = {"embed": model.model.wte.weight, "unembed": model.lm_head.weight}
    for layer in range(model.config.num_hidden_layers):
        of = f"{layer}."
        get = model.model.blocks.get_parameter
        thirds = get(f"{of}attn.qkv.weight").chunk(3)
        found |= {of + name: thirds[i] for name, i in THIRD.items()}
        found |= {of + name: get(f"{of}{name}.weight") for name in ("attn.out", "mlp.fc")}
        found[f"{of}mlp.proj"] = get(f"{of}mlp.proj.weight")
    return {name: weight.detach() for name, weight in found.items()}


def config_of(width: int, heads: int, neurons: int, vocabulary: int) -> SparseGPTConfig:
    """Return the shape of a planted model: two layers, and AbsTopK that keeps every entry."""
    return SparseGPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        head_dim=D_HEAD,
        intermediate_size=neurons,
        activation_fraction=1.0,
        attention_sinks=False,
    )
