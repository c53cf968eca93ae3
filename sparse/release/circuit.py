"""Reading `viz_data.pt`, the released form of a circuit, and measuring its loss again.

The format is described in docs/method.md#released-files. circuit_write.py writes it.

    kept nodes     {location: indices}, the eight locations per layer and perhaps final_resid
    task           tokens padded with 0 on the right; the first half of the prompts is class 1 (the
                   context_1 of pairs), the second half class 2
    losses         sums over the two prompts of a pair; halved here, they are nats per prompt

The file does not hold the two target tokens, nor the values that replace the other nodes (their
means over the training text), so the caller must give both. Text samples and heat maps in the file
are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparse.circuits.circuit import Circuit
from sparse.circuits.mask import Values
from sparse.circuits.means import ablation_values
from sparse.circuits.score import circuit_logits, last_logits
from sparse.model.config import FINAL
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.tasks.batch import REST, TaskBatch, check_vocabulary, task_nats
from sparse.tasks.pair import Pair
from sparse.tasks.task import Task

from .files import read_torch

RELEASED = "released"  # key of Circuit.config under which the rest of a file is kept
SIZES = {  # the authors' field: ours; in these a file's stored config must agree with the model
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_head": "head_dim",
    "d_model": "hidden_size",
    "d_mlp": "intermediate_size",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """A circuit, the prompts it is scored on, and the loss that its file gives."""

    circuit: Circuit
    batch: TaskBatch
    stored: float | None = None
    """The loss of the circuit that the file gives, in nats per prompt; None where it gives none."""

    def loss(self, model: SparseGPT, whole: bool = False) -> float:
        """Return the task loss of the circuit in nats per prompt, mean over all prompts.

        It is `task_nats`. Where class 2 has no target of its own, its prompts are scored by the
        probability, over the whole vocabulary, that the target of class 1 does not follow. With
        `whole`, return the loss of the whole model. Raises ValueError for another model than the
        circuit's.
        """
        self.circuit.check(model)
        return self.measure(model, None if whole else self.circuit)

    @torch.no_grad()
    def measure(self, model: SparseGPT, circuit: Circuit | None) -> float:
        """Return the loss of any circuit of this model, or of the whole model for None.

        The unit is nats per prompt. That the model is the circuit's is not checked, since that
        would read all weights at every call.
        """
        with still(model):
            if circuit is None:
                return _nats(last_logits(model, self.batch), self.batch)
            logits = circuit_logits(model, self.batch, circuit.masks(), circuit.ablation)
            return _nats(logits, self.batch)


def _nats(logits: Float[Tensor, "prompt vocab"], batch: TaskBatch) -> float:
    return task_nats(logits.double(), batch).mean().item()


def load_circuit(
    path: str | Path,
    model: SparseGPT,
    tokenizer: PreTrainedTokenizerBase,
    targets: tuple[str, str | None],
    *,
    means: Values | None = None,
    ablation: Literal["mean", "zero"] = "mean",
    name: str | None = None,
    target_loss: float = 0.15,
) -> Replay:
    """Return the circuit in a `viz_data.pt`, with its prompts and the loss stored for it.

    targets: the text that should follow the prompts of class 1 and of class 2, each one token; None
        for the second where the task only asks whether the first follows (a one-sided task).
    means: the values of the nodes that are not kept; by default the means in the model's folder
        (`sparse.circuits.means.save_means`).
    ablation: "zero" takes zeros in the place of the means.
    name: the name of the task; by default that of its folder (viz/MODEL/TASK/SWEEP/K/viz_data.pt).
    target_loss: the circuit's target in nats per prompt, which the file does not hold.

    No node is kept at a location that the file does not have. But `final_resid`, the last residual
    before its norm, is left alone where the file does not have it. Where the file has it, the means
    must hold it too: `node_means(model, blocks, locations=[*model.node_widths(), "final_resid"])`.

    Raises ValueError for a damaged file, another model, or a target that is not one token.

    >>> import tempfile
    >>> import torch
    >>> from bridges import load_run
    >>> from sparse import release
    >>> run = load_run("tiny")
    >>> circuit = run.circuits()["single_double_quote"].resized(2)
    >>> batch = circuit.task.batch(run.tokenizer, "test").take(torch.arange(2))
    >>> replay = release.Replay(circuit=circuit, batch=batch, stored=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     release.save_circuit(replay, run.sparse, f"{folder}/viz_data.pt")
    ...     again = release.load_circuit(
    ...         f"{folder}/viz_data.pt", run.sparse, run.tokenizer, batch.targets[0]
    ...     )
    >>> abs(again.loss(run.sparse) - again.stored) < 1e-5  # run again, and as the file says
    True
    """
    path = Path(path)
    values = read_torch(path)
    data, importances = _parts(path, values)
    _check_model(path, importances.get("beeg_model_config"), model)
    nodes = _nodes(path, data, model)
    batch = _batch(path, importances, tokenizer, targets, model)
    parents = [p.name for p in path.resolve().parents]
    task = _task(batch, tokenizer, name or (parents[2] if len(parents) > 3 else path.stem))
    stored = importances.get("interv_loss")
    losses = {"circuit/train": stored, "full/train": importances.get("loss")}
    mu = ablation_values(model, ablation, means, "load_circuit", final=FINAL in data)
    notes = [f"opened from {path}; its losses were measured by its authors"]
    notes += _notes(values, data, mu, batch)
    circuit = Circuit(
        task=task,
        nodes=nodes,
        ablation=mu,
        ablation_kind=ablation,
        model_fingerprint=model.fingerprint(),
        d_head=model.config.head_dim,
        target_loss=target_loss,
        loss={what: float(x) / 2 for what, x in losses.items() if x is not None},
        source=model.source,
        config={RELEASED: _halved(values, data, importances)},
        notes=tuple(notes),
    )
    half = None if stored is None else float(stored) / 2
    return Replay(circuit=circuit, batch=batch, stored=half)


def _parts(path: Path, values: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the kept nodes and the importances; ValueError where the file does not have both."""
    keys = values.keys() if isinstance(values, dict) else set()
    if not {"circuit_data", "importances"} <= keys:
        raise ValueError(
            f"{path} has keys {sorted(keys)}, but a circuit file has circuit_data and importances"
        )
    data = {at: x for at, x in values["circuit_data"].items() if at != "prune_config"}
    return data, values["importances"]


def _check_model(path: Path, stored: Mapping[str, Any] | None, model: SparseGPT) -> None:
    for theirs, ours in SIZES.items():
        want, have = (stored or {}).get(theirs), getattr(model.config, ours)
        if want is not None and want != have:
            raise ValueError(
                f"{path} is of a model with {theirs}={want}, this one has {have}; load the model "
                "that the circuit was found in"
            )


def _nodes(path: Path, data: dict[str, Tensor], model: SparseGPT) -> dict[str, tuple[int, ...]]:
    known = [*model.node_widths(), FINAL]
    if unknown := sorted(data.keys() - set(known)):
        raise ValueError(
            f"{path}: no node locations {unknown} in this model; load the model that the circuit "
            "was found in"
        )
    return {at: tuple(sorted(data[at].flatten().tolist())) for at in known if at in data}


def _batch(
    path: Path,
    importances: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    targets: tuple[str, str | None],
    model: SparseGPT,
) -> TaskBatch:
    """Return the prompts as tokens."""
    check_vocabulary(tokenizer, model.config.vocab_size)
    ids: Int[Tensor, "prompt pos"] = importances["task_samples"][0].long()
    n, width = ids.shape
    real = (ids != 0).flip(1).cumsum(1).flip(1) > 0  # up to the last token that is not 0
    if n % 2 or not real.any(1).all() or int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"{path}: task_samples must be an even number of prompts, none empty, of tokens below "
            f"{model.config.vocab_size}; there are {n}, the largest token is {int(ids.max())}"
        )
    a = _token(tokenizer, targets[0])
    b = REST if targets[1] is None else _token(tokenizer, targets[1])
    target = torch.tensor([a] * (n // 2) + [b] * (n // 2))
    batch = TaskBatch(
        task=path.stem,
        split="train",
        ids=ids,
        real=real,
        last=real.sum(1) - 1,
        target=target,
        foil=target.roll(n // 2),
        targets=(targets,),
        dropped={},
    )
    return batch.take(torch.arange(n // 2))


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore
    if len(ids) != 1:
        raise ValueError(f"target {text!r} is {len(ids)} tokens (ids {ids}) but must be exactly 1")
    return ids[0]


def _task(batch: TaskBatch, tokenizer: PreTrainedTokenizerBase, name: str) -> Task:
    rows = [row[mask].tolist() for row, mask in zip(batch.ids, batch.real, strict=True)]
    texts = [str(tokenizer.decode(row)) for row in rows]
    first, second = batch.targets[0]
    halves = zip(texts[: batch.n_pairs], texts[batch.n_pairs :], strict=True)
    pairs = tuple(
        Pair(context_1=a, context_2=b, target_1=first, target_2=second) for a, b in halves
    )
    return Task(name=name, train=pairs, meaning="the prompts stored with a released circuit")


def _notes(values: dict, data: dict, ablation: Values, batch: TaskBatch) -> list[str]:
    notes = []
    total, n_total = values.get("num_total_nodes"), sum(len(x) for x in ablation.values())
    if total is not None and int(total) != n_total:
        notes.append(
            f"the file counts {int(total)} nodes in the whole model, here it has {n_total}"
        )
    if absent := [at for at in ablation if at not in data]:
        notes.append(f"{len(absent)} locations are not in the file; none of their nodes is kept")
    lengths = batch.last.view(2, -1)
    if differ := int((lengths[0] != lengths[1]).sum()):
        notes.append(f"{differ} of {batch.n_pairs} pairs differ in length")
    return notes


def _halved(values: dict, data: dict[str, Tensor], importances: dict[str, Any]) -> dict[str, Any]:
    """Return what else the file holds, as plain values for `Circuit.config`.

    Losses are halved to nats per prompt, and a location's nodes are sorted as in `Circuit.nodes`.
    """
    per_node = {}
    for at, losses in importances.get("ch_interv_losses", {}).items():
        order = data[at].flatten().argsort().tolist() if at in data else []
        if len(order) == len(losses):
            per_node[at] = [float(losses[i]) / 2 for i in order]
    layers = importances.get("layer_interv_losses", {})
    edges = []
    for matrix, sources, targets, (a, b) in importances.get("pair_data", []):
        matrix = torch.as_tensor(matrix)
        for i, j in matrix.nonzero().tolist():
            source = sources[i] if isinstance(sources[i], str) else int(sources[i])
            edges.append([a, source, b, int(targets[j]), float(matrix[i, j]) / 2])
    return {
        "node_nats": per_node,
        "layer_nats": {at: float(x) / 2 for at, x in layers.items()},
        "edge_nats": edges,
        "search": [[int(i), float(x) / 2] for i, x in values.get("all_loss") or []],
        "prune_config": _plain(values.get("prune_config")),
    }


def _plain(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.tolist()
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    return [_plain(v) for v in x] if isinstance(x, list | tuple | set) else x
