"""One split of a task as tokens, and the task loss in nats.

loss      softplus(foil - target) in nats, mean over the 2 contexts of every pair; chance is ln 2
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

Targets = tuple[str, str]

PADDING = 1.05
"""A model may have this many times the tokenizer's entries, since many pad their embeddings."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskBatch:
    """One split as tokens. Rows 0..n-1 are the context_1 of n pairs, rows n..2n-1 their context_2.

    Rows i and i+n have equal real length; shorter rows are padded on the right, which a causal
    model never sees from the scored position.
    """

    task: str
    split: str
    ids: Int[Tensor, "prompt pos"]
    real: Bool[Tensor, "prompt pos"]
    """False at padding."""
    last: Int[Tensor, " prompt"]
    """Index of the scored position."""
    target: Int[Tensor, " prompt"]
    foil: Int[Tensor, " prompt"]
    targets: tuple[Targets, ...]
    """The distinct target strings in use: which of the task's candidates fitted."""
    dropped: dict[str, int]
    """Pairs left out, by reason."""

    @property
    def n_pairs(self) -> int:
        """Number of pairs, half the number of prompts."""
        return len(self.ids) // 2

    def counterfactual(self) -> Int[Tensor, "prompt pos"]:
        """Return the ids with every context exchanged for the other one of its pair."""
        return self.ids.roll(self.n_pairs, dims=0)

    def scored(self, logits: Float[Tensor, "prompt pos vocab"]) -> Float[Tensor, "prompt vocab"]:
        """Return the logits at the scored position of every prompt."""
        return logits[torch.arange(len(self.last), device=logits.device), self.last]

    def take(self, pairs: Int[Tensor, " n"]) -> TaskBatch:
        """Return the batch of the pairs with these indices, without needless padding."""
        rows = torch.cat([pairs, pairs + self.n_pairs])
        width = int(self.last[rows].max()) + 1
        cut = {"ids": self.ids[rows, :width], "real": self.real[rows, :width]}
        picked = {key: getattr(self, key)[rows] for key in ("last", "target", "foil")}
        return replace(self, **cut, **picked)

    def to(self, device: torch.device | str) -> TaskBatch:
        """Return the batch with its tensors on `device`."""
        names = ("ids", "real", "last", "target", "foil")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def task_nats(logits: Float[Tensor, "prompt vocab"], batch: TaskBatch) -> Float[Tensor, " prompt"]:
    """Two-token binary cross entropy of every prompt, in nats: softplus(foil - target).

    >>> from bridges import load_run
    >>> from sparse import get_task, last_logits, task_nats
    >>> run = load_run("tiny")
    >>> batch = get_task("single_double_quote").batch(run.tokenizer, "test")
    >>> nats = task_nats(last_logits(run.sparse, batch), batch)  # one number a prompt
    >>> bool(nats.mean() < 0.3)  # chance is ln 2 = 0.693
    True
    """
    return F.softplus(-logit_difference(logits, batch))


def logit_difference(
    logits: Float[Tensor, "prompt vocab"], batch: TaskBatch
) -> Float[Tensor, " prompt"]:
    """Logit of the target minus logit of the foil at the scored position, in logits."""
    row = torch.arange(len(batch.target), device=logits.device)
    return logits[row, batch.target] - logits[row, batch.foil]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise unless a model with `vocab_size` logits can belong to this tokenizer."""
    n = len(tokenizer)
    if not n <= vocab_size <= PADDING * n:
        raise ValueError(
            f"the tokenizer has {n} entries but the model has {vocab_size} logits (it may have "
            f"{n}..{int(PADDING * n)}); pass the tokenizer the model was trained with"
        )
