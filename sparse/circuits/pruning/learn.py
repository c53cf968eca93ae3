"""Learning which nodes a task needs: one number tau per node, by gradient descent.

x <- m x + (1 - m) mu                       at every node location, after AbsTopK
m = 1[tau >= 0],  dm/dtau := sigmoid'(tau / theta) / theta
loss = task nats + k_coef sum m             AdamW on tau

A node is kept (m = 1) where its score tau is at least 0; the others are held at mu (mask.py).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse.circuits.mask import Values, by_location, straight_through
from sparse.circuits.score import circuit_logits
from sparse.model.gpt import SparseGPT
from sparse.tasks.batch import TaskBatch, task_nats

from .config import PruneConfig


def learn(
    model: SparseGPT, batch: TaskBatch, config: PruneConfig, ablation: Values
) -> Float[Tensor, " n"]:
    """Return tau for all nodes in forward order: the higher, the more the task needs the node.

        loss = mean task nats + k_coef sum m

    `batch` is the train split. Each step draws `config.n_pairs` of its pairs, by the seed and the
    step alone, and clips tau to [-1, 1] after the update. The model's weights are not changed.
    """
    n = sum(len(value) for value in ablation.values())
    rng = torch.Generator().manual_seed(config.seed)
    tau = torch.full((n,), config.bias)
    if config.start == "noise":
        tau += config.noise * torch.randn(len(tau), generator=rng)
    tau = tau.clamp(-1, 1).to(batch.ids.device).requires_grad_()
    optimizer = torch.optim.AdamW(
        [tau], lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    for step in tqdm(range(config.n_steps), desc=f"prune {batch.task}", disable=None):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.n_steps)
        rng.manual_seed(config.seed * 1_000_003 + step)
        pairs = torch.randperm(batch.n_pairs, generator=rng)[: config.n_pairs]
        part = batch.take(pairs.to(tau.device))
        m = straight_through(tau, config.theta)
        logits = circuit_logits(model, part, by_location(m, ablation), ablation)
        nats = task_nats(logits, part).mean()
        optimizer.zero_grad()
        (nats + config.k_coef * m.sum()).backward()
        torch.nn.utils.clip_grad_norm_([tau], config.clip)
        optimizer.step()
        with torch.no_grad():
            tau.clamp_(-1, 1)
    return tau.detach().cpu()
