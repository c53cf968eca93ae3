"""Which of a nonsense twin's two directions a model likes better: the stronger control of a task.

    liking = mean over pairs of (d_1 + d_2)        d_c = target logit - foil logit after context c

A constant liking for one of the two targets adds to d_1 what it takes from d_2, so it cancels. With
the targets exchanged the liking changes its sign. Where it is positive, the model already tells the
contexts apart in that direction, and masks find a smaller circuit of a lower loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .batch import check_vocabulary, logit_difference
from .own import SPLITS
from .score import AT_ONCE, positions_of, scored_logits, tokenizer_of, vocabulary_of
from .task import Task


def easier_nonsense(
    task: Task, model: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> Task:
    """Return the nonsense twin of a task in the direction that the model likes better.

        liking = mean over train pairs of (d_1 + d_2)      d_c = target - foil after context c

    That is `task.nonsense()` where the liking is at least 0, in logits, and else the same with the
    two targets exchanged. It is the direction in which a small circuit is easier to get, and so the
    stronger control. Both have the name `<task>:nonsense`. `model` is a SparseGPT, a DenseModel or
    a Hugging Face causal language model; the tokenizer is by default its own. Raises ValueError
    where the task has no nonsense twin or the tokenizer cannot express it.

    >>> from bridges import load_run
    >>> from sparse import easier_nonsense, get_task
    >>> run = load_run("tiny")
    >>> pair = easier_nonsense(get_task("while_return_true"), run.sparse).train[0]
    >>> pair.target_1, pair.target_2  # `nonsense()` has " The" first
    (' This', ' The')
    """
    twin = task.nonsense()
    tokenizer = tokenizer or tokenizer_of(model, "easier_nonsense")
    check_vocabulary(tokenizer, vocabulary_of(model))
    return twin if liking(twin, model, tokenizer) >= 0 else exchanged(twin)


@torch.no_grad()
def liking(task: Task, model: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return by how many logits the model likes the task's direction, on the train split.

    It is the mean over pairs of the sum of both contexts' logit differences; exchanged targets turn
    its sign. `TaskScore.paired` is the share of pairs in which this sum is positive.
    """
    batch = task.batch(tokenizer, "train", positions_of(model))
    sums = []
    for rows in torch.arange(batch.n_pairs).split(AT_ONCE // 2):
        part = batch.take(rows).to(model.device)
        d = logit_difference(scored_logits(model, part).float(), part)
        sums.append(d.double().view(2, -1).sum(0).cpu())
    return float(torch.cat(sums).mean())


def exchanged(task: Task) -> Task:
    """Return the task with the two targets of every pair exchanged, and so those of alternatives.

    Raises ValueError for a one-sided pair: "anything else" cannot be a first target.
    """
    both = [*task.alternatives]
    both += [(p.target_1, p.target_2) for split in SPLITS for p in task.pairs(split)]
    if any(second is None for _, second in both):
        raise ValueError(f"task {task.name}: a one-sided pair has no second target to exchange")
    turned = {
        s: tuple(replace(p, target_1=p.target_2, target_2=p.target_1) for p in task.pairs(s))
        for s in SPLITS
    }
    others = tuple((second, first) for first, second in task.alternatives)
    return replace(task, alternatives=others, **turned)


def is_nonsense_of(task: Task, twin: Task) -> bool:
    """Return whether `twin` is the nonsense twin of `task`, in either direction."""
    if ":nonsense" in task.name:
        return False
    first = task.nonsense()
    return twin in (first, exchanged(first))
