"""How much less time mask training and the search for the size take than in the plain form.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/pruning.py --sizes S W --repeats 5

The plain form is benchmarks/peer_pruning.py; both prune the same frozen model of random weights of
density 1/64 on 8 pairs of 128 random tokens. Every ratio is the median (quartiles) over repetitions
in which the two take turns. `discretise` is one bisection from the same ranking and to the same
goal, two batches per probe; both k are printed.
"""

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_pruning import PeerMasks, random_values, sparse_model
from timing import quartiles

from sparse.circuits.mask import masked, straight_through
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.score import last_logits
from sparse.model.gpt import SparseGPT
from sparse.ops.csr_linear import csr_products
from sparse.tasks.batch import TaskBatch, logit_difference, task_nats

N_POS, N_PROMPTS = 128, 16


def random_batch(vocab: int, seed: int) -> TaskBatch:
    """Return 8 pairs of random prompts, a few of them shorter and padded on the right."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (N_PROMPTS, N_POS), generator=rng)
    last = torch.randint(N_POS - 8, N_POS, (N_PROMPTS // 2,), generator=rng).repeat(2)
    target, foil = torch.randint(0, vocab, (2, N_PROMPTS), generator=rng)
    return TaskBatch(
        task="random", split="train", ids=ids, real=torch.arange(N_POS) <= last[:, None],
        last=last, target=target, foil=foil, targets=(), dropped={},
    )  # fmt: skip


def solvable(model: SparseGPT, batch: TaskBatch) -> TaskBatch:
    """Return the batch with target and foil exchanged where the model prefers the foil."""
    right = logit_difference(last_logits(model, batch), batch) > 0
    target = torch.where(right, batch.target, batch.foil)
    return replace(batch, target=target, foil=batch.target + batch.foil - target)


class Ours:
    """The library's step, with one flat tau."""

    def __init__(self, model, ablation, config) -> None:
        self.model, self.ablation, self.config = model, ablation, config
        self.widths = [len(value) for value in ablation.values()]
        self.tau = torch.full((sum(self.widths),), config.bias, requires_grad=True)
        self.optimizer = torch.optim.AdamW(
            [self.tau], lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
        )

    def nats(self, m: torch.Tensor, batch: TaskBatch) -> torch.Tensor:
        keep = dict(zip(self.ablation, m.split(self.widths), strict=True))
        with masked(self.model, keep, self.ablation):
            return task_nats(last_logits(self.model, batch), batch).mean()

    def train_step(self, batch: TaskBatch) -> float:
        m = straight_through(self.tau, self.config.theta)
        loss = self.nats(m, batch) + self.config.k_coef * m.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.tau], self.config.clip)
        self.optimizer.step()
        with torch.no_grad():
            self.tau.clamp_(-1, 1)
        return loss.item()

    @torch.no_grad()
    def evaluate_at_k(self, k: int, order: torch.Tensor, batch: TaskBatch) -> float:
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[order[:k]] = True
        return self.nats(keep, batch).item()


def bisect(loss, n: int, goal: float, probes: int) -> int:
    """Return the smallest k that meets the goal, or where the search stood after `probes`."""
    low, high = 0, n
    while high - low > 1 and probes > 0:
        middle, probes = (low + high) // 2, probes - 1
        low, high = (low, middle) if loss(middle) <= goal else (middle, high)
    return high


def clock(f) -> tuple[float, float]:
    """Return what f returns and how many seconds it took."""
    start = time.perf_counter()
    return f(), time.perf_counter() - start


def measure(size: str, repeats: int, probes: int) -> None:
    model = sparse_model(size)
    config, ablation = PruneConfig(k_coef=1e-4, lr=3e-3), random_values(model)
    batches = [solvable(model, random_batch(model.config.vocab_size, seed)) for seed in range(2)]
    plain = [(b.ids, b.last, b.target, b.foil) for b in batches]
    names = ("ids", "real", "last", "target", "foil")
    both = replace(batches[0], **{k: torch.cat([getattr(b, k) for b in batches]) for k in names})
    theirs = PeerMasks(copy.deepcopy(model), ablation, config)  # csr_products goes by the weight
    rng = torch.Generator().manual_seed(3)
    scores = 0.01 * torch.randn(sum(map(len, ablation.values())), generator=rng)
    order = scores.argsort(descending=True, stable=True)

    with csr_products(model):
        mine = Ours(model, ablation, config)
        ranking = list(scores.split(mine.widths))
        k = len(order) // 4
        goal = mine.evaluate_at_k(len(order) // 3, order, both)
        cases = {
            "train step": (
                lambda: theirs.train_step(*plain[0]),
                lambda: mine.train_step(batches[0]),
            ),
            "evaluate at k": (
                lambda: theirs.evaluate_at_k(k, ranking, plain[:1]),
                lambda: mine.evaluate_at_k(k, order, batches[0]),
            ),
            "discretise": (
                lambda: bisect(
                    lambda k: theirs.evaluate_at_k(k, ranking, plain), len(order), goal, probes
                ),
                lambda: bisect(
                    lambda k: mine.evaluate_at_k(k, order, both), len(order), goal, probes
                ),
            ),
        }
        for what, (slow, fast) in cases.items():
            ratios, ms = [], []
            for repeat in range(1 if what == "discretise" else repeats + 1):
                (a, slow_s), (b, fast_s) = clock(slow), clock(fast)
                if repeat or what == "discretise":  # the first step warms up
                    ratios.append(slow_s / fast_s)
                    ms.append(1000 * fast_s)
            same = (
                f"k {a} and {b}" if what == "discretise" else f"losses differ by {abs(a - b):.0e}"
            )
            middle = torch.tensor(ms).median()
            shown = quartiles(ratios, unit="x")
            print(f"{size}  {what:14} {shown} of the plain form, {middle:.0f} ms; {same}")
            if what == "train step":
                with torch.no_grad():
                    for tau in theirs.tau:
                        tau.fill_(config.bias)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=("S", "W"), nargs="+", default=["S", "W"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--probes", type=int, default=20, help="of the bisection, at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        measure(size, args.repeats, args.probes)
