"""What it costs to project a whole model, against one fused Adam step of the same tensors.

    python benchmarks/projection.py            # about 2 minutes
    python benchmarks/projection.py --repeats 3 --shapes W

Interleaved in one process, one thread: per repetition one Adam step, one projection of the result
(`project_model_`) and one of a copy by the plain form below, whose answers are compared bit for
bit. Times are processor seconds, so that other work on the machine counts little. Printed are the
median of the repetitions' ratios and its quartiles. The first repetition, in which every weight is
still there, is not counted.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timing import quartiles, seconds

from sparse import SparseGPT, SparseGPTConfig
from sparse.training.sparsity import Budget, SparsityConfig, budgets, project_model_

SHAPES = {  # name: layers, width, vocabulary
    "W": (2, 1024, 4096),
    "L12": (12, 256, 4096),
}
DENSITIES = (1 / 2, 1 / 8, 1 / 64)


def plain_(budget: Budget, weight: torch.Tensor, keep: int) -> None:
    """The plain form: magnitudes, topk per slice, topk of the rest, masks."""
    matrix = weight if weight.ndim == 2 else weight.view(1, -1)
    size = matrix.abs()
    protected = torch.zeros_like(size, dtype=torch.bool)
    if budget.floor:
        across = 1 - budget.dim
        best = size.topk(budget.floor, dim=across).indices
        protected.scatter_(across, best, True)
    rest = torch.where(protected, -1.0, size).flatten()
    left = keep - int(protected.sum())
    mask = protected.flatten()
    mask[rest.topk(left).indices] = True
    matrix.mul_(mask.view_as(matrix).float())


def model_of(shape: str) -> SparseGPT:
    """A model of random weights."""
    n_layers, width, vocab = SHAPES[shape]
    torch.manual_seed(0)
    config = SparseGPTConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=n_layers,
        num_attention_heads=width // 16,
        head_dim=16,
        intermediate_size=4 * width,
    )
    return SparseGPT(config)


def measure(shape: str, density: float, repeats: int) -> tuple[list[float], list[float]]:
    """Per repetition: projection / Adam, and the plain form / projection."""
    sparsity = SparsityConfig(density=density, embedding_density=min(1.0, 4 * density))
    plan = budgets(model_of(shape), sparsity)
    densities = (sparsity.density, sparsity.embedding_density)
    weights = [b.weight for b in plan]
    with torch.no_grad():
        for w in weights:
            w.normal_(0, 0.02)
    adam = torch.optim.Adam(weights, lr=1e-4, eps=0.1, fused=True)
    to_adam, to_ours = [], []
    for repetition in range(repeats + 1):
        for w in weights:
            w.grad = torch.randn_like(w)
        step = seconds(adam.step)
        copies = [w.detach().clone() for w in weights]

        def plain(copies=copies):
            for b, copy in zip(plan, copies, strict=True):
                if b.keep(densities) < copy.numel():
                    plain_(b, copy, b.keep(densities))

        ours, theirs = seconds(lambda: project_model_(plan, densities)), seconds(plain)
        for w, copy, b in zip(weights, copies, plan, strict=True):
            assert torch.equal(w, copy), f"{b.name}: the two forms disagree"
        if repetition:
            to_adam.append(ours / step)
            to_ours.append(theirs / ours)
    return to_adam, to_ours


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'shape':6}{'density':>8}   projection / fused Adam   plain form / projection")
    for shape in args.shapes:
        for density in DENSITIES:
            to_adam, to_ours = measure(shape, density, args.repeats)
            line = f"{shape:6}{f'1/{round(1 / density)}':>8}   "
            print(f"{line}{quartiles(to_adam, 6):<25} {quartiles(to_ours, 6)}", flush=True)
