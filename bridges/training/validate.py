"""The unweighted terms of the co-training loss on held-out text, and the bridges' calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from bridges.losses.moments import Moments
from bridges.losses.quantities import nmse
from bridges.maps.bridge import BridgeSet
from bridges.protocol import ResidualModel
from sparse.model.gpt import SparseGPT
from sparse.model.modes import mode
from sparse.ops.csr_linear import csr_products
from sparse.training.config import BatchSource

from .config import CotrainConfig
from .hybrid import run_passes, score_passes


@torch.no_grad()
def calibrate(
    dense: ResidualModel, bridges: BridgeSet, batches: BatchSource, n_tokens: int, device
) -> None:
    """Set the bridges' limits, centring and scale from the first batches of the run.

    Whole batches are taken until they hold at least `n_tokens` tokens; the first of them gives the
    limits of outlying tokens. Afterwards `batches` is set back, so that training sees the same text
    again.
    """
    state, stream = batches.state_dict(), iter(batches)
    moments: list[Moments] = []
    seen = 0
    while seen < n_tokens or not moments:
        ids = next(stream).to(device)
        residuals = dense.residuals(ids)
        if not moments:
            bridges.set_limits(residuals)
        of_batch = bridges.moments(residuals)
        moments = list(map(Moments.join, moments, of_batch)) if moments else of_batch
        seen += ids.numel()
    batches.load_state_dict(state)
    bridges.centre(moments)


def validation_sequences(config: CotrainConfig, n_bridges: int, batch: int) -> int:
    """Return how many sequences an evaluation may score, to take a tenth of the training at most.

        n = 0.1 E B (4 + 3 m) / (2 + S)         at least 1

    E steps lie between two evaluations, B sequences are in a step, m of S bridges are crossed by
    each. Counted are passes of a sequence through one model: a step takes one of the dense model,
    three of the twin (backward is two) and, for every crossing, half of each three times; an
    evaluation takes one of each model and half of each for every bridge in either direction.

    >>> from bridges import PRESETS, validation_sequences
    >>> validation_sequences(PRESETS["cpu"].training("runs/new"), n_bridges=13, batch=8)
    74
    """
    steps = config.train.steps
    every = min(config.train.evaluate_every or steps, steps)
    return max(1, int(0.1 * every * batch / validation_cost(config, n_bridges)))


def validation_cost(config: CotrainConfig, n_bridges: int) -> float:
    """Return the cost of evaluating a sequence in costs of training on one: (2 + S) / (4 + 3 m)."""
    crossed = n_bridges if config.hybrid_sites == "all" else config.sites_per_sequence
    crossed = crossed if config.weights.hybrid else 0
    return (2 + n_bridges) / (4 + 3 * crossed)


@torch.no_grad()
def validate(
    dense: ResidualModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    validation: Sequence[Int[Tensor, "batch pos"]],
    device: torch.device | str = "cpu",
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Return the unweighted terms of the co-training loss, as means over the batches `validation`.

    Keys: ce, ce_dense, kl (nats per token) of the two models themselves; for every bridge, with s
    its dense site, encode.s and decode.s (NMSE over tokens that are not outlying, fractions of
    variance) and up.s and down.s (nats per token); and encode, decode, up, down, the means of these
    over the bridges. Hybrid passes cross at every bridge and are scored at every position. With an
    accelerator its processes share the batches, and all of them return the same numbers. Without
    batches the dict is empty.

    >>> from bridges import load_run, validate
    >>> run = load_run("tiny")
    >>> terms = validate(run.dense, run.sparse, run.bridges, [run.heldout()[:2]])
    >>> terms["decode"] < 0.5  # a fraction of variance; the mean itself has 1
    True
    """
    n = len(validation)
    if not n:
        return {}
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    mine, counts = range(rank, n, world), 1.0
    if not mine:  # this process has no share: it measures a batch for the names, and counts nothing
        mine, counts = range(1), 0.0
    sums: dict[str, float] = {}
    for i in tqdm(mine, "validate", leave=False, delay=2, disable=not progress):
        with mode(sparse, training=False), csr_products(sparse):
            measured = _measure(dense, sparse, bridges, validation[i].to(device))
        for name, value in measured.items():
            sums[name] = sums.get(name, 0.0) + counts * value.item()
    if accelerator:
        own = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
        total = accelerator.reduce(own, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        sums = dict(zip(sums, total, strict=True))
    return {name: value / n for name, value in sums.items()}


def _measure(
    dense: ResidualModel, sparse: SparseGPT, bridges: BridgeSet, ids: Tensor
) -> dict[str, Tensor]:
    run, pairs = run_passes(dense, sparse, bridges, ids), bridges.config.pairs
    scored = score_passes(dense, sparse, run, ids, (1.0, 1.0, 1.0), with_dense=True)
    out = {"ce": scored.main.ce, "ce_dense": scored.dense.ce, "kl": scored.main.kl}
    per_site = {
        "encode": [nmse(run.up[s], run.z[t], where=run.ordinary[s]) for s, t in pairs.items()],
        "decode": [nmse(run.down[s], run.h[s], where=run.ordinary[s]) for s in pairs],
        "up": list(scored.up.per_stream),
        "down": list(scored.down.per_stream),
    }
    for name, values in per_site.items():
        out[name] = torch.stack(values).mean()
        out |= {f"{name}.{s}": value for s, value in zip(pairs, values, strict=True)}
    return out
