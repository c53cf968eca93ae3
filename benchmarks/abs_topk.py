"""AbsTopK, forward and backward, against the plain form: topk, gather, scatter.

    OMP_NUM_THREADS=1 python benchmarks/abs_topk.py --repeats 15

1024 vectors of width d, k = d/4, one thread. Each ratio is the median (quartiles) over repetitions
in which the two take turns; times are processor time, so that a busy machine counts less. On a
CUDA device (--device cuda) the clock is that of CUDA events.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import quartiles

from sparse import abs_topk


def plain(x: Tensor, k: int) -> Tensor:
    """The usual way to write it; ties go anywhere."""
    index = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))


class Clock:
    """Seconds between two readings, on the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self):
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def measure(d: int, dtype: torch.dtype, repeats: int, device: str, rows: int) -> None:
    x = torch.randn(rows, d, device=device).to(dtype).requires_grad_()
    dy = torch.randn(rows, d, device=device).to(dtype)
    clock, k = Clock(device), d // 4
    taken = {plain: [], abs_topk: []}
    for repeat in range(repeats + 2):
        for form, times in taken.items():
            a = clock()
            y = form(x, k)
            b = clock()
            torch.autograd.grad(y, x, dy)
            c = clock()
            if repeat >= 2:
                times.append((clock.between(a, b), clock.between(b, c)))
    pairs = list(zip(taken[plain], taken[abs_topk], strict=True))
    both = [sum(theirs) / sum(ours) for theirs, ours in pairs]
    forward = [theirs[0] / ours[0] for theirs, ours in pairs]
    ns = torch.tensor(taken[abs_topk]).median(0).values / x.numel() * 1e9
    print(
        f"{str(dtype).removeprefix('torch.'):9} d={d:5}  forward and backward "
        f"{quartiles(both):18} forward {quartiles(forward):18} "
        f"ours {ns[0]:.2f} + {ns[1]:.2f} ns/entry"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("time of topk + gather + scatter / time of abs_topk, median (quartiles)")
    for dtype in (torch.float32, torch.bfloat16):
        for d in (256, 512, 1024, 4096):
            measure(d, dtype, options.repeats, options.device, options.rows)


if __name__ == "__main__":
    main()
