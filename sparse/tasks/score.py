"""Does a model do a task? Its loss and accuracy on one split, beside chance.

nats      mean of softplus(foil - target) over all prompts          chance ln 2
accuracy  share of prompts whose target has the larger logit        chance 1/2
does      nats <= 0.3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .batch import CHANCE, TaskBatch, logit_difference, task_nats
from .pair import Targets

DOES = 0.3
"""A model does a task if its loss is at most this, in nats per prompt; chance is ln 2 = 0.693."""
AT_ONCE = 64
"""Prompts in one forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """How well one model does one task, on one split."""

    task: str
    split: str
    nats: float
    """Mean task loss per prompt, in nats."""
    stderr: float
    """Standard error of `nats`, counting independent units (`clustered_stderr`)."""
    accuracy: float
    """Share of the prompts whose target has the larger logit; 1/2 by chance."""
    paired: float
    """Share of the pairs in which the first answer gains on the second, from the second context to
    the first; 1/2 by chance. A constant liking for one answer, which spoils `nats` and `accuracy`,
    does not change it."""
    n_pairs: int
    """Number of pairs scored."""
    told_by_last_token: float
    """Share of these whose contexts end in different tokens, so that no attention is needed."""
    levels: Mapping[str, int]
    """{factor: number of its levels among the pairs}."""
    nats_by: Mapping[str, Mapping[str, float]]
    """{factor: {level: mean nats of the pairs with this level}}."""
    n_by: Mapping[str, Mapping[str, int]]
    """{factor: {level: number of pairs with this level}}."""
    targets: tuple[Targets, ...]
    """The pairs of target strings that this tokenizer uses."""
    dropped: Mapping[str, int]
    """Number of pairs that the tokenizer cannot express, by reason."""

    @property
    def chance(self) -> float:
        """The loss of a model that does not look at the context: ln 2 nats."""
        return CHANCE

    @property
    def does(self) -> bool:
        """Whether the model does the task: at most DOES nats."""
        return self.nats <= DOES

    @property
    def worst(self) -> tuple[str, float]:
        """The frame of the largest mean loss, and that loss; ("", nats) without frames."""
        frames = self.nats_by.get("frame", {})
        level = max(frames, key=frames.__getitem__, default="")
        return level, frames.get(level, self.nats)

    def __str__(self) -> str:
        units = ", ".join(f"{factor} {n}" for factor, n in self.levels.items())
        word = "does it" if self.does else f"does not: more than {DOES} nats"
        return (
            f"{self.task}: {self.nats:.3f} ± {self.stderr:.3f} nats (chance {CHANCE:.3f}), "
            f"accuracy {self.accuracy:.2f} (chance 0.50), {self.n_pairs} {self.split} pairs"
            f"{f' (levels: {units})' if units else ''}; {word}"
        )


@torch.no_grad()
def score_batch(model: Any, batch: TaskBatch) -> TaskScore:
    """Return the score of `model` on one split as tokens.

    `model` is a SparseGPT, a DenseModel, or any Hugging Face causal language model. It is run
    without dropout, and left as it was.
    """
    nats, right, gains = [], [], []
    for rows in torch.arange(batch.n_pairs).split(AT_ONCE // 2):
        part = batch.take(rows).to(model.device)
        logits = scored_logits(model, part).float()
        nats.append(task_nats(logits, part).view(2, -1).mean(0).cpu())
        first, second = logit_difference(logits, part).view(2, -1).cpu()
        right.append(((first > 0).double() + (second > 0).double()) / 2)
        gains.append((first + second > 0).double())  # `second` counts for the other answer
    of_pair = torch.cat(nats).double()
    return TaskScore(
        task=batch.task,
        split=batch.split,
        nats=float(of_pair.mean()),
        stderr=clustered_stderr(of_pair, batch.groups),
        accuracy=float(torch.cat(right).mean()),
        paired=float(torch.cat(gains).mean()),
        n_pairs=batch.n_pairs,
        told_by_last_token=batch.told_by_last_token(),
        levels=batch.levels(),
        nats_by={factor: _means(of_pair, levels) for factor, levels in batch.groups.items()},
        n_by={factor: Counter(filter(None, levels)) for factor, levels in batch.groups.items()},
        targets=batch.targets,
        dropped=batch.dropped,
    )


def scored_logits(model: Any, batch: TaskBatch) -> Float[Tensor, "prompt vocab"]:
    """Return the logits of any causal language model at the scored position of every prompt.

    A model that has `last_logits(ids, last)` computes no others; of another one the scored ones
    are picked.
    """
    if hasattr(model, "last_logits"):
        with _evaluating(model):
            return model.last_logits(batch.ids, batch.last)
    with _evaluating(model):
        out = model(input_ids=batch.ids, attention_mask=batch.real.long())
    return batch.scored(out.logits)


def clustered_stderr(
    values: Float[Tensor, " pair"], groups: Mapping[str, tuple[str, ...]]
) -> float:
    """Return the standard error of the mean of `values`, whose pairs share what `groups` says.

        s.e.^2 = G/(G-1) sum over units g of (sum over i in g of (x_i - mean))^2 / n^2

    The G units of a factor are its levels, and every pair that names no level of it is a unit of
    its own. Of all factors, and of the pairs themselves, the largest error is taken. A factor of
    fewer than two levels says nothing and is passed over. Infinite for a single pair.
    """
    n, largest = len(values), 0.0
    spread = values - values.mean()
    alone = tuple(f"pair {i}" for i in range(n))
    for levels in (alone, *groups.values()):
        if len(set(levels) - {""}) < 2:
            continue
        units = [level or own for level, own in zip(levels, alone, strict=True)]
        numbers = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
        at, g = torch.tensor([numbers[unit] for unit in units]), len(numbers)
        sums = torch.zeros(g, dtype=values.dtype).index_add_(0, at, spread)
        largest = max(largest, float(g / (g - 1) * sums.square().sum()) ** 0.5 / n)
    return largest if n > 1 else float("inf")


def vocabulary_of(model: Any) -> int:
    """Return the number of logits per position of a model."""
    own = getattr(model, "vocab_size", None)  # a HF model may have an attribute of this name or not
    return int(own if own is not None else config_of(model).vocab_size)


def config_of(model: Any) -> Any:
    """Return the config of a model's text part; that of the model inside a DenseModel."""
    holder = model if hasattr(model, "config") else model.model
    return holder.config.get_text_config()


def positions_of(*models: Any) -> int | None:
    """Return how many positions every one of the models has, or None where no config says."""
    found = [getattr(config_of(model), "max_position_embeddings", None) for model in models]
    return min((n for n in found if n is not None), default=None)


def tokenizer_of(model: Any, who: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to a model: its own, or that in the folder it came from.

    Raises ValueError where there is none; `who` is the function that the message names.
    """
    if isinstance(model, str | Path):
        raise ValueError(f"{who}: {str(model)!r} is a name; open the model, then pass it")
    if (own := getattr(model, "tokenizer", None)) is not None:
        return own
    source = getattr(model, "source", None)  # of a SparseGPT
    folder = source.folder if source is not None else getattr(model, "name_or_path", "")
    if not folder:
        raise ValueError(
            f"{who}: the model was made in memory, so it has no folder with a tokenizer; pass "
            "tokenizer="
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{who}: no tokenizer in {folder} ({error}); pass tokenizer=") from error


def _means(nats: Float[Tensor, " pair"], levels: tuple[str, ...]) -> dict[str, float]:
    """Return {level: mean of the pairs with this level}; pairs that name none are left out."""
    of: dict[str, list[float]] = {}
    for level, x in zip(levels, nats.tolist(), strict=True):
        if level:
            of.setdefault(level, []).append(x)
    return {level: sum(xs) / len(xs) for level, xs in of.items()}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Run a module without dropout; every submodule gets its own mode back."""
    changed = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
