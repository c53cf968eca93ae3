"""How much less time a compiled circuit takes than the masked full model.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/compiled_circuit.py --repeats 5

Two layers, 1024 wide, 64 heads of 16, vocabulary 4096, texts 16 x 64, random weights of density
1/64; nodes drawn at random. Each ratio is the median (quartiles) over repetitions in which the
plain masked model (benchmarks/peer_pruning.py), the library's masked model and the compiled circuit
take turns. The plain model always computes every logit. `sliced` is compared with the masked model
without AbsTopK, the function it computes; its largest difference to that is printed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_pruning import PeerMasks, random_values, sparse_model
from timing import quartiles

from sparse import PruneConfig
from sparse.circuits.extract.circuit_module import CircuitModule
from sparse.circuits.mask import masked

KINDS, MODES = ("zero", "mean"), ("sliced", "exact")


def timed(f) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    out = f()
    return time.perf_counter() - start, out


@torch.no_grad()
def measure(mode: str, share: float, ablation: str, repeats: int) -> None:
    model = sparse_model("W", activation_fraction=0.25 if mode == "exact" else 1.0)
    values = random_values(model, 0.05 if ablation == "mean" else 0.0)
    rng = torch.Generator().manual_seed(2)
    keep = {at: torch.rand(len(v), generator=rng) < share for at, v in values.items()}
    ids = torch.randint(0, 4096, (16, 64), generator=rng)
    last = torch.full((16,), 63)
    peer = PeerMasks(model, values, PruneConfig())
    for tau, m in zip(peer.tau, keep.values(), strict=True):
        tau.copy_(torch.where(m, 1.0, -1.0))
    circuit = CircuitModule(model, keep, values, mode)

    def ours() -> torch.Tensor:
        with masked(model, keep, values):
            return model(ids).logits

    runs = {
        "plain": lambda: peer(ids),
        "masked": ours,
        "all": lambda: circuit(ids),
        "one": lambda: circuit(ids, last),
    }
    took = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            seconds, out = timed(run)
            if repeat:
                took[name].append(seconds)
            elif name == "masked":
                reference = out
            elif name == "all":
                gap = float((out - reference).abs().max() / reference.abs().max())

    def ratio(a: str, b: str) -> str:
        return quartiles([x / y for x, y in zip(took[a], took[b], strict=True)], unit="x")

    print(f"{mode}, {100 * share:g} % of nodes, {ablation} ablation: {circuit}")
    print(
        f"  evaluated position  over plain {ratio('plain', 'one')}, masked {ratio('masked', 'one')}"
    )
    print(
        f"  all logits          over plain {ratio('plain', 'all')}, masked {ratio('masked', 'all')}"
    )
    ms = 1000 * torch.tensor(took["one"]).median()
    print(f"  {ms:.1f} ms at the evaluated position; largest relative difference {gap:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ablation", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument(
        "--modes", choices=("sliced", "exact"), nargs="+", default=["sliced", "exact"]
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for mode in args.modes:
        for ablation in args.ablation:
            for share in args.shares:
                measure(mode, share, ablation, args.repeats)
