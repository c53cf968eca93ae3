"""Planted truths: models made by hand, whose circuits are known because we put them there.

    model       a SparseGPT of two layers; most weights are zero, none is trained
    tasks       two, of different families: a cue near the beginning decides the last word
    circuits    for each task exactly the nodes that its path runs through
    the rest    distractors: they vary with the words, write to the stream, move the logits of other
                words, and say nothing of the answer

A method that finds or tests circuits should say yes to `circuits` and no to `nonsense`. Everything
is drawn by the seed: words, channels, heads, neurons, signs and strengths (planted_wires.py), so
that many different truths can be tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse.model.gpt import SparseGPT
from sparse.ops.seeds import seed_of
from sparse.tasks.batch import TaskBatch, task_nats
from sparse.tasks.own import SPLITS
from sparse.tasks.task import Task

from .circuit import Circuit
from .graph import Node, Nodes
from .means import node_means
from .planted_text import TASKS, corpus, lexicon, make_task, tokenizer_of
from .planted_wires import (
    N_BALLAST,
    Path,
    Rooms,
    Wire,
    answer_wires,
    build,
    config_of,
    lay_distractors,
    lay_path,
    views,
)
from .score import circuit_logits, last_logits
from .taps import recorded

TARGET = 0.1
"""The task loss, in nats, that a planted circuit keeps under mean ablation of all else."""
MARGINS = (4.5, 6.5)
"""Between these a seed draws by how many logits a right answer leads the wrong one."""
LEAST = {"width": 64, "n_heads": 6, "n_neurons": 64, "n_frames": 4, "n_words": 4}
MOST_WORDS = 32
N_MEANS, N_HELDOUT = 256, 64  # sentences


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A model with two tasks and the circuits that do them, all known. `plant` makes it."""

    seed: int
    model: SparseGPT
    tokenizer: PreTrainedTokenizerFast
    """One token per word; it is in memory alone."""
    tasks: dict[str, Task]
    """The tasks, by name. Each is a family of its own."""
    circuits: dict[str, Circuit]
    """For each task exactly the nodes that do it, with its losses and a ranking."""
    wires: dict[str, tuple[Wire, ...]]
    """For each task the weights of its path, from the embedding to the unembedding."""
    distractors: Nodes
    """The nodes that are alive and on no path: location to their sorted indices."""
    means: dict[str, Float[Tensor, " _"]]
    """The mean of every node over sentences of the model's own language."""
    heldout: Int[Tensor, "block pos"]
    """Other sentences of that language, for losses per token of text."""

    def nonsense(self, name: str) -> Circuit:
        """Return a circuit for the nonsense twin of a task, made of distractors.

        It has as many nodes at each location as the task's circuit. Its ranking has these first,
        then all other distractors, then what is left; so `Circuit.resized` gives other sizes.
        Raises ValueError for a name that is no task.

        >>> from sparse import plant
        >>> planted = plant(0)
        >>> circuit, nonsense = planted.circuits["first"], planted.nonsense("first")
        >>> len(nonsense) == len(circuit), len(nonsense & circuit)
        (True, 0)
        """
        if name not in self.circuits:
            raise ValueError(f"Planted.nonsense: no task {name!r}; it has {list(self.circuits)}")
        circuit, rng = self.circuits[name], Random(seed_of("nonsense", self.seed, name))
        chosen: list[Node] = []
        ranking = {at: torch.full_like(mean, -1.0) for at, mean in self.means.items()}
        for at, indices in self.distractors.items():
            ranking[at][list(indices)] = torch.linspace(0.1, 0.5, len(indices))
            picked = rng.sample(indices, len(circuit.nodes.get(at, ())))
            ranking[at][picked] = 1.0
            chosen += [Node(at, i) for i in picked]
        made = circuit.with_nodes(chosen, "distractors")
        return replace(made, task=circuit.task.nonsense(), ranking=ranking)


def plant(
    seed: int = 0,
    *,
    width: int = 96,
    n_heads: int = 12,
    n_neurons: int = 128,
    n_frames: int = 8,
    n_words: int = 8,
    distraction: float = 1.0,
    margin: float | None = None,
) -> Planted:
    """Return a model made by hand that does two tasks, with the circuits that do them.

    A prompt holds a cue near its beginning and ends in a word that asks; a head carries the cue's
    kind there, and the two targets read it (planted_wires.py has the whole path). The model has two
    layers, heads of 8 channels, no positions and no sinks; its AbsTopK keeps every entry.

    - `width`, `n_heads` and `n_neurons` are those of the stream, of each layer's attention and of
      each layer's MLP.
    - A split of a task has `n_frames` times `n_words` pairs: every frame with every word. `groups`
      of a pair name both. Neither frames nor words are in two splits.
    - `distraction` scales what distractors write and how they move the logits of other words.
    - `margin` is the mean lead of the right target, in logits; by default it is drawn from MARGINS.

    Raises ValueError where there is no room for paths and distractors, or too few pairs.

    >>> from sparse import plant
    >>> planted = plant(3)
    >>> list(planted.circuits), planted.circuits["first"].met
    (['first', 'second'], True)
    """
    _check_room(width, n_heads, n_neurons, n_frames, n_words)
    rng = Random(seed_of("planted", seed))
    words = lexicon(rng, n_words)
    tokenizer = tokenizer_of(words.words)
    tasks = {name: make_task(name, words, rng, n_frames) for name in TASKS}
    rooms = Rooms.of(rng, width, n_heads, n_neurons)
    ballast = [rooms.channels.pop() for _ in range(N_BALLAST)]
    paths = {name: lay_path(name, words, rooms, rng) for name in TASKS}
    wires = lay_distractors(words, list(paths.values()), rooms, rng, distraction)
    wires += [wire for path in paths.values() for wire in path.wires]
    text = corpus(words, rng, N_MEANS + N_HELDOUT)
    counts = torch.bincount(text[:N_MEANS].flatten(), minlength=len(words.words)) + 1.0
    config = config_of(width, n_heads, n_neurons, len(words.words))
    model = build(wires, ballast, counts / counts.sum(), config)
    batches = {name: task.batches(tokenizer) for name, task in tasks.items()}
    for name, path in paths.items():
        lead = rng.uniform(*MARGINS) if margin is None else margin
        path.wires += _answer(model, path, words.targets[name], batches[name]["train"], lead)
    means_text, heldout = _spoken(model, text, words.plain, seed).split([N_MEANS, N_HELDOUT])
    means = node_means(model, means_text, batch_size=N_MEANS)
    return Planted(
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        tasks=tasks,
        circuits={
            name: _circuit(model, tasks[name], path, means, batches[name], seed)
            for name, path in paths.items()
        },
        wires={name: tuple(path.wires) for name, path in paths.items()},
        distractors=_alive(model, heldout, paths),
        means=means,
        heldout=heldout,
    )


def _check_room(width: int, n_heads: int, n_neurons: int, n_frames: int, n_words: int) -> None:
    """Raise ValueError for a model too small for paths and distractors, or too few pairs."""
    given = {"width": width, "n_heads": n_heads, "n_neurons": n_neurons}
    given |= {"n_frames": n_frames, "n_words": n_words}
    if small := {name: n for name, n in given.items() if n < LEAST[name]}:
        raise ValueError(
            f"plant: {small} leaves no room for paths, distractors and splits; the least are "
            f"{ {name: LEAST[name] for name in small} }"
        )
    if n_words > MOST_WORDS:
        raise ValueError(
            f"plant: n_words={n_words} leaves no words for the frames; take at most {MOST_WORDS}"
        )


def _answer(
    model: SparseGPT, path: Path, targets: tuple[int, int], batch: TaskBatch, margin: float
) -> list[Wire]:
    """Return the wires from the answer to the targets, after writing them into the model."""
    rows = torch.arange(len(batch.last))
    u = model.model.finish(model.residuals(batch.ids)[-1][rows, batch.last])  # prompt width
    first, second = u.view(2, batch.n_pairs, -1).mean(1)
    sizes = {c: float(first[c] - second[c]) / 2 for c in path.answers}
    wires = answer_wires(targets, sizes, margin)
    unembed = views(model)["unembed"]
    for wire in wires:
        unembed[wire.row, wire.column] = wire.value
    return wires


def _spoken(
    model: SparseGPT, text: Tensor, plain: Sequence[int], seed: int
) -> Int[Tensor, "block pos"]:
    """Return `text` with every plain word after the first drawn anew from what the model predicts.

    Cues, words that ask and answers stay. So the text is the model's own language: it predicts
    these words as well as they can be predicted.
    """
    text, words = text.clone(), torch.tensor(plain)
    g = torch.Generator().manual_seed(seed_of("spoken", seed))
    for t in range(1, text.shape[1]):
        y = model.last_logits(text[:, :t], torch.full((len(text),), t - 1))
        drawn = words[torch.multinomial(y[:, words].softmax(-1), 1, generator=g).squeeze(1)]
        text[:, t] = torch.where(torch.isin(text[:, t], words), drawn, text[:, t])
    return text


def _circuit(
    model: SparseGPT,
    task: Task,
    path: Path,
    means: Mapping[str, Tensor],
    batches: Mapping[str, TaskBatch],
    seed: int,
) -> Circuit:
    """Return the circuit of a path, with the losses of model and circuit on every split."""
    ranking = {at: torch.full_like(mean, -1.0) for at, mean in means.items()}
    for at, indices in path.nodes.items():
        ranking[at][list(indices)] = 1.0
    circuit = Circuit(
        task=task,
        nodes=path.nodes,
        ablation=dict(means),
        ablation_kind="mean",
        model_fingerprint=model.fingerprint(),
        d_head=model.config.head_dim,
        target_loss=TARGET,
        ranking=ranking,
        config={"planted": seed},
    )
    loss = {}
    for split in SPLITS:
        batch = batches[split]
        alone = circuit_logits(model, batch, circuit.masks(), circuit.ablation)
        for what, logits in (("circuit", alone), ("full", last_logits(model, batch))):
            loss[f"{what}/{split}"] = float(task_nats(logits, batch).mean())
    return replace(circuit, loss=loss)


def _alive(model: SparseGPT, text: Tensor, paths: Mapping[str, Path]) -> Nodes:
    """Return the nodes that vary over `text` and are on no path."""
    alive: Nodes = {}
    with recorded(model) as values:
        model.residuals(text)
    for at, value in values.items():
        taken = {i for path in paths.values() for i in path.nodes.get(at, ())}
        spread = value.flatten(0, 1).std(0)
        alive[at] = tuple(i for i, s in enumerate(spread.tolist()) if s > 0.05 and i not in taken)
    return alive
