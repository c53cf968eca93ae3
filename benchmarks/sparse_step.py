"""A whole training step of the sparse model against one of a dense GPT-2 of the same shape.

    python benchmarks/sparse_step.py                   # about 5 minutes
    python benchmarks/sparse_step.py --shapes W --repeats 3 --profile

The baseline is Hugging Face's GPT2LMHeadModel with random weights, the same layers, width, heads,
vocabulary, positions and batch, no dropout, and fused AdamW: forward, backward, step. Ours is the
step of `sparse.fit`: forward, backward, pooled normalisation, Adam, projection, decay; with each of
the libraries that can compute the sparse products (`Products`). The same random tokens for all.

Interleaved in one process, one thread. Times are processor seconds, so that other work on the
machine counts little. Printed are the median of the repetitions' ratios and its quartiles; with
--profile also where our step goes with the fastest products.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from time import process_time
from typing import get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timing import quartiles
from transformers import GPT2Config, GPT2LMHeadModel

from sparse import SparseGPT, SparseGPTConfig
from sparse.ops.csr_linear import Products, csr_products, fastest_products
from sparse.training.groups import scale_
from sparse.training.sparsity import SparsityConfig, budgets, project_model_

SHAPES = {  # name: layers, width, vocabulary, positions, batch
    "S": (2, 256, 2048, 128, 8),
    "M": (4, 512, 4096, 128, 8),
    "W": (2, 1024, 4096, 128, 4),
}
DENSITIES = (1.0, 1 / 8, 1 / 16, 1 / 64)
D_HEAD = 16
KINDS = [name for name in get_args(Products) if name != "mkl" or fastest_products() == "mkl"]


class Clock:
    """Processor seconds per named part of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self.last = process_time()

    def lap(self, name: str) -> None:
        now = process_time()
        self.parts.setdefault(name, []).append(now - self.last)
        self.last = now


def dense_step(model, adam, ids) -> None:
    """The baseline."""
    adam.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    adam.step()


def sparse_step(model, adam, plan, densities, ids, products: Products, clock: Clock) -> None:
    """Ours."""
    clock.last = process_time()
    adam.zero_grad(set_to_none=True)
    with csr_products(model, products=products):
        clock.lap("compress")
        loss = model(ids, labels=ids).loss
    clock.lap("forward")
    loss.backward()
    clock.lap("backward")
    params = list(model.parameters())
    scale_(params, "normalise")
    clock.lap("normalise")
    adam.step()
    clock.lap("adam")
    project_model_(plan, densities)
    clock.lap("project")
    with torch.no_grad():
        torch._foreach_mul_([p for p in params if p.ndim > 1], 1 - 1e-5)
    clock.lap("decay")


def build(shape: str, density: float):
    """The two models, their optimizers and the plan of the projection."""
    n_layers, d, vocab, positions, _ = SHAPES[shape]
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=positions,
            n_embd=d,
            n_layer=n_layers,
            n_head=d // D_HEAD,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    sparse = SparseGPT(
        SparseGPTConfig(
            vocab_size=vocab,
            hidden_size=d,
            num_hidden_layers=n_layers,
            num_attention_heads=d // D_HEAD,
            head_dim=D_HEAD,
            intermediate_size=4 * d,
            max_position_embeddings=positions,
            positions="learned",
        )
    )
    sparsity = SparsityConfig(density=density, embedding_density=min(1.0, 4 * density))
    plan = budgets(sparse, sparsity)
    densities = (sparsity.density, sparsity.embedding_density)
    project_model_(plan, densities)
    dense_adam = torch.optim.AdamW(dense.parameters(), lr=1e-4, fused=True)
    sparse_adam = torch.optim.Adam(sparse.parameters(), lr=1e-4, eps=0.1, fused=True)
    return dense.train(), dense_adam, sparse.train(), sparse_adam, plan, densities


def measure(shape: str, density: float, repeats: int) -> tuple[dict[Products, list[float]], Clock]:
    """Ratios to the dense step per repetition, by products; and our parts with the fastest."""
    dense, dense_adam, *ours = build(shape, density)
    *_, positions, batch = SHAPES[shape]
    ratios: dict[Products, list[float]] = {name: [] for name in KINDS}
    clock = Clock()
    for repetition in range(repeats + 1):
        ids = torch.randint(SHAPES[shape][2], (batch, positions))
        start = process_time()
        dense_step(dense, dense_adam, ids)
        baseline = process_time() - start
        for name in ratios:
            laps = clock if repetition and name == fastest_products() else Clock()
            start = process_time()
            sparse_step(*ours, ids, name, laps)
            if repetition:
                ratios[name].append((process_time() - start) / baseline)
    return ratios, clock


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--profile", action="store_true", help="also print where our step goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("step / dense step, by what computes the sparse products")
    print(f"{'shape':6}{'density':>8}   " + "".join(f"{name:<22}" for name in KINDS))
    for shape in args.shapes:
        for density in DENSITIES:
            ratios, clock = measure(shape, density, args.repeats)
            columns = "".join(f"{quartiles(found):<22}" for found in ratios.values())
            print(f"{shape:6}{f'1/{round(1 / density)}':>8}   {columns}", flush=True)
            if args.profile:
                parts = {name: 1e3 * median(laps) for name, laps in clock.parts.items()}
                print("    ms:", ", ".join(f"{n} {ms:.1f}" for n, ms in parts.items()))
