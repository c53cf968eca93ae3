"""One split of a task as tokens, and the task loss in nats.

loss      softplus(foil - target) in nats, mean over the 2 contexts of every pair; chance is ln 2
one-sided  target and foil are a token and REST, whose logit is log sum exp of all other logits, so
           that softplus(foil - target) is -log p(token), or -log(1 - p(token)) in the other context
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .pair import Targets

PADDING = 1.05
"""A model may have this many times the tokenizer's entries, since many pad their embeddings."""
REST = -1
"""Stands for "any token but the other one" among targets and foils, in one-sided pairs."""
CHANCE = math.log(2)
"""Task loss, in nats, of a model that gives both answers one half each, whatever the context."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskBatch:
    """One split of a task as tokens; a row is a prompt, that is a context to be continued.

    Rows 0..n-1 are the context_1 of n pairs, rows n..2n-1 their context_2. Rows i and i+n have
    equally many tokens, except in some released circuits (`sparse.release.load_circuit`). Every row
    begins with what the tokenizer puts before a text (`sparse.ops.prefix`). Shorter rows are
    padded on the right, after the scored position, so a causal model does not see the padding from
    there.
    """

    task: str
    split: str
    ids: Int[Tensor, "prompt pos"]
    real: Bool[Tensor, "prompt pos"]
    """Whether a token is part of the prompt; false at padding."""
    last: Int[Tensor, " prompt"]
    """Index of the scored position, that of the prompt's last token."""
    target: Int[Tensor, " prompt"]
    """The token that should follow, or REST: any token but the foil."""
    foil: Int[Tensor, " prompt"]
    """The token that should not follow, the target of the pair's other context, or REST."""
    targets: tuple[Targets, ...]
    """The distinct pairs of target strings in use, from those of the task's candidates that fit the
    tokenizer."""
    dropped: dict[str, int]
    """Number of pairs left out, by reason."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the pairs share: {factor: the level of each pair}; "" where a pair names none."""

    @property
    def n_pairs(self) -> int:
        """Number of pairs, half the number of prompts."""
        return len(self.ids) // 2

    @property
    def one_sided(self) -> bool:
        """Whether some pair has one target only, and REST in the place of the other."""
        return any(second is None for _, second in self.targets)

    def told_by_last_token(self) -> float:
        """Return the share of pairs whose two contexts end in different tokens.

        A model can do these by its last token alone, without attention.
        """
        rows = torch.arange(len(self.last), device=self.ids.device)
        first, second = self.ids[rows, self.last].view(2, -1)
        return float((first != second).float().mean())

    def levels(self) -> dict[str, int]:
        """Return {factor: number of its levels among the pairs}: how many units are independent."""
        return {factor: len(set(levels) - {""}) for factor, levels in self.groups.items()}

    def counterfactual(self) -> Int[Tensor, "prompt pos"]:
        """Return the ids with every context replaced by the other one of its pair."""
        return self.ids.roll(self.n_pairs, dims=0)

    def scored(self, logits: Float[Tensor, "prompt pos vocab"]) -> Float[Tensor, "prompt vocab"]:
        """Return the logits at the scored position of every prompt."""
        return logits[torch.arange(len(self.last), device=logits.device), self.last]

    def take(self, pairs: Int[Tensor, " n"]) -> TaskBatch:
        """Return the batch of the pairs with these indices, without needless padding."""
        rows = torch.cat([pairs, pairs + self.n_pairs])
        width = int(self.last[rows].max()) + 1
        picked: dict[str, Any] = {
            "ids": self.ids[rows, :width],
            "real": self.real[rows, :width],
            **{key: getattr(self, key)[rows] for key in ("last", "target", "foil")},
        }
        if self.groups:  # a list of indices: on a GPU reading it waits, so only where it is needed
            of = pairs.tolist()
            picked["groups"] = {f: tuple(at[i] for i in of) for f, at in self.groups.items()}
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> TaskBatch:
        """Return the batch with its tensors on `device`."""
        names = ("ids", "real", "last", "target", "foil")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def task_nats(logits: Float[Tensor, "prompt vocab"], batch: TaskBatch) -> Float[Tensor, " prompt"]:
    """Return the task loss of every prompt in nats: the cross entropy over its two answers.

        softplus(foil - target)     target and foil being the logits of the two answers

    In a one-sided pair the answers are a token and all others together (docs/method.md#task-loss).

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
    """Return the logit of the target minus that of the foil, at the scored position of a prompt.

    The logit of REST is log sum exp over all tokens but the pair's own, so that the sigmoid of the
    difference is the probability of the target over the whole vocabulary.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if not batch.one_sided:
        row = torch.arange(len(batch.target), device=logits.device)
        return logits[row, batch.target] - logits[row, batch.foil]
    token = torch.maximum(batch.target, batch.foil)[:, None]  # the one that is not REST, if any is
    rest = logits.scatter(1, token, -torch.inf).logsumexp(1, keepdim=True)

    def logit(of: Tensor) -> Tensor:
        own = logits.gather(1, of.clamp(min=0)[:, None])
        return torch.where(of[:, None] == REST, rest, own).squeeze(1)

    return logit(batch.target) - logit(batch.foil)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError unless a model with `vocab_size` logits can belong to this tokenizer.

    It can where n <= vocab_size <= PADDING n, n being the number of the tokenizer's entries.
    """
    n = len(tokenizer)
    if not n <= vocab_size <= PADDING * n:
        raise ValueError(
            f"the tokenizer has {n} entries but the model has {vocab_size} logits (it may have "
            f"{n}..{int(PADDING * n)}); pass the tokenizer the model was trained with"
        )
